"""Whether the pictures that conversations speak of are there, and begin as pictures do.

Nothing of it is kept: files come and go. A conversation without its picture stays in the plan,
which depends on no file; when it is read, its picture is replaced and nothing is learned from it.

Dims: N conversations.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from llava_jax import image
from llava_jax.data.entry import Entry, Source
from llava_jax.data.findings import Findings
from llava_jax.data.spreading import spread

Depth = Literal["exist", "open"]


@dataclasses.dataclass
class Checked:
    """broken_N: which of the conversations lack a picture, or have one that cannot be one."""

    broken_N: np.ndarray
    findings: Findings


def check(
    source: Source,
    entry_N: np.ndarray,
    pictures_N: np.ndarray,
    depth: Depth,
    *,
    advance: Callable[[int], None] = lambda count: None,
    processes: int | None = None,
) -> Checked:
    """pictures_N: how many of an entry's are shown, from the first on."""
    findings, broken = Findings(), [np.zeros(0, bool)]
    numbers = np.arange(len(entry_N))
    given = (source, entry_N, pictures_N, depth)
    for found, mine in spread(_check_chunk, numbers, *given, advance=advance, processes=processes):
        findings.merge(found)
        broken.append(mine)
    return Checked(np.concatenate(broken), findings)


def _check_chunk(
    chunk: np.ndarray, source: Source, entry_N: np.ndarray, pictures_N: np.ndarray, depth: Depth
) -> tuple[Findings, np.ndarray]:
    findings, broken = Findings(), np.zeros(len(chunk), bool)
    for place, number in enumerate(chunk):
        if pictures_N[number]:
            entry = source[int(entry_N[number])]
            if problem := _first_problem(entry, int(pictures_N[number]), depth):
                kind, what = problem
                findings.add(kind, f"{entry.id} (entry {entry_N[number]}): {what}")
                broken[place] = True
    return findings, broken


def _first_problem(entry: Entry, count: int, depth: Depth) -> tuple[str, str] | None:
    """One a conversation is enough: it is lost with the first."""
    for picture in entry.pictures[:count]:
        if not picture.exists():
            nearest = picture.nearest()
            hint = f"; there is {nearest}" if nearest else ""
            return "picture missing", f"{picture.name}{hint}"
        if depth == "open":
            try:
                image.check(picture.read())
            except (ValueError, OSError) as error:
                return "picture unreadable", f"{picture.name}: {error}"
    return None
