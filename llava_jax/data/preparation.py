"""One look at everything before the first step: lengths, and what was refused, repaired or missing.

Lengths decide which conversations share a row, so they are counted once, by as many processes as
there are cores, and kept in a folder named by all they depend on. The pictures' pixels are not
looked at, only whether the files are there and begin as pictures do.

Dims: N entries taken of a source.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llava_jax import files, image
from llava_jax.conversation import Refused
from llava_jax.data.entry import Entry, Source
from llava_jax.data.examples import Renderer

PictureCheck = Literal["exist", "open"]

_NAMED = 5  # examples named of each kind
_CHUNK = 1000
_WORTH_PROCESSES = 5000  # starting them takes seconds


@dataclasses.dataclass
class Findings:
    """How often each kind of thing was found, and the first few of them."""

    count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.count[kind] += 1
        named = self.first.setdefault(kind, [])
        if len(named) < _NAMED:
            named.append(example)

    def merge(self, other: "Findings") -> None:
        self.count += other.count
        for kind, named in other.first.items():
            mine = self.first.setdefault(kind, [])
            mine += named[: _NAMED - len(mine)]

    def to_json(self) -> dict:
        return {
            kind: {"count": count, "first": self.first[kind]}
            for kind, count in self.count.most_common()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Findings":
        count = collections.Counter({kind: found["count"] for kind, found in value.items()})
        return cls(count, {kind: found["first"] for kind, found in value.items()})


@dataclasses.dataclass
class Lengths:
    """Of each entry taken: tokens (0 = refused), those learned, pictures and turns."""

    entry_N: np.ndarray
    tokens_N: np.ndarray
    learned_N: np.ndarray
    pictures_N: np.ndarray
    turns_N: np.ndarray
    refused: Findings
    repaired: Findings
    pictures: Findings  # missing or unreadable ones
    repeated: Findings  # ids or whole conversations that come more than once

    @property
    def usable(self) -> np.ndarray:
        return self.tokens_N > 0

    @property
    def bad(self) -> int:
        """Conversations that nothing will be learned from."""
        return self.refused.count.total() + self.pictures.count.total()


_ARRAYS = {
    "entry_N": np.int64,
    "tokens_N": np.int32,
    "learned_N": np.int32,
    "pictures_N": np.int16,
    "turns_N": np.int16,
}
_FINDINGS = ("refused", "repaired", "pictures", "repeated")


def key(source: Source, entry_N: np.ndarray, renderer: Renderer) -> str:
    """What the lengths of a source depend on, in short."""
    said = json.dumps([source.fingerprint, renderer.settings()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode() + entry_N.astype("<i8").tobytes()).hexdigest()[:16]


def measure(
    source: Source,
    entry_N: np.ndarray,
    renderer: Renderer,
    *,
    check: PictureCheck | None,
    advance: Callable[[int], None] = lambda count: None,
    processes: int | None = None,
) -> Lengths:
    """Renders every entry. check: what is looked at of its pictures."""
    chunks = [entry_N[start : start + _CHUNK] for start in range(0, len(entry_N), _CHUNK)]
    processes = processes or (_cores() if len(entry_N) >= _WORTH_PROCESSES else 1)
    parts = []
    seen: collections.Counter = collections.Counter()
    for part, hashes in _measured(source, chunks, renderer, check, processes):
        for what, digest, example in hashes:
            seen[digest] += 1
            if seen[digest] > 1:
                part.repeated.add(what, example)
        parts.append(part)
        advance(len(part.entry_N))
    return _joined(parts)


def _measured(source, chunks, renderer, check, processes):
    if processes == 1:
        for chunk in chunks:
            yield _measure_chunk(source, renderer, check, chunk)
        return
    # Not forked: JAX and its threads may already be in this process.
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(chunks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(source, renderer, check),
    ) as pool:
        try:
            yield from pool.map(_measure_in_worker, chunks)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that counted tokens was killed from outside (often by the kernel, for "
                "want of memory); nothing was written: run the same command again"
            ) from error


_given: dict[str, Any] = {}  # to a worker, once


def _begin_worker(source: Source, renderer: Renderer, check: PictureCheck | None) -> None:
    _given.update(source=source, renderer=renderer, check=check)


def _measure_in_worker(chunk: np.ndarray):
    return _measure_chunk(chunk=chunk, **_given)


def _measure_chunk(source: Source, renderer: Renderer, check: PictureCheck | None, chunk):
    found = Lengths(**_empty(len(chunk)))
    found.entry_N[:] = chunk
    hashes = []
    for place, index in enumerate(chunk):
        label = f"entry {index}"
        try:
            entry = source[int(index)]
            label = f"{entry.id} ({label})"
            example = renderer(entry)
        except Refused as error:
            found.refused.add(error.kind, f"{label}: {error}")
            continue
        found.tokens_N[place] = example.tokens
        found.learned_N[place] = example.learned
        found.pictures_N[place] = example.pictures
        found.turns_N[place] = example.turns
        for note in example.notes:
            found.repaired.add(note, label)
        if check and (problem := _broken_picture(entry, example.pictures, check)):
            found.pictures.add(problem[0], f"{label}: {problem[1]}")
        hashes += [
            ("an id that came before", _digest("id", entry.id), label),
            ("a conversation that came before", _conversation_digest(entry), label),
        ]
    return found, hashes


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode("utf8", "replace"), digest_size=12).digest()


def _conversation_digest(entry: Entry) -> bytes:
    names = [picture.name for picture in entry.pictures]
    return _digest("conversation", json.dumps([entry.conversations, names], sort_keys=True))


def _broken_picture(entry: Entry, count: int, check: PictureCheck) -> tuple[str, str] | None:
    """One a conversation is enough: it is lost with the first."""
    for picture in entry.pictures[:count]:
        if not picture.exists():
            nearest = picture.nearest()
            hint = f"; there is {nearest}" if nearest else ""
            return "picture missing", f"{picture.name}{hint}"
        if check == "open":
            try:
                image.check(picture.read())
            except (ValueError, OSError) as error:
                return "picture unreadable", f"{picture.name}: {error}"
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _empty(count: int) -> dict[str, Any]:
    arrays = {name: np.zeros(count, kind) for name, kind in _ARRAYS.items()}
    return {**arrays, **{name: Findings() for name in _FINDINGS}}


def _joined(parts: Sequence[Lengths]) -> Lengths:
    joined = _empty(0)
    for name in _ARRAYS:
        joined[name] = np.concatenate([joined[name], *(getattr(part, name) for part in parts)])
    for part in parts:
        for name in _FINDINGS:
            joined[name].merge(getattr(part, name))
    return Lengths(**joined)


def save(lengths: Lengths, folder: str | os.PathLike[str]) -> None:
    """lengths.npz and report.json, in a folder of their own: whole, or not at all."""
    with files.fresh_folder(folder) as fresh:
        with (fresh / "lengths.npz").open("wb") as file:
            np.savez(file, **{name: getattr(lengths, name) for name in _ARRAYS})
        report = {name: getattr(lengths, name).to_json() for name in _FINDINGS}
        files.write_json(fresh / "report.json", report)


def load(folder: str | os.PathLike[str]) -> Lengths | None:
    """What was saved; None if nothing was, or another version of this file saved it."""
    folder = files.path(folder)
    if not (folder / "lengths.npz").exists():
        return None
    try:
        with (folder / "lengths.npz").open("rb") as file, np.load(file) as stored:
            fields: dict[str, Any] = {name: stored[name] for name in _ARRAYS}
        report = json.loads((folder / "report.json").read_text())
        fields |= {name: Findings.from_json(report[name]) for name in _FINDINGS}
        return Lengths(**fields)
    except Exception as error:  # zip files and arrays break in many ways
        raise ValueError(
            f"got {folder}, which cannot be read ({error}); expected lengths of a preparation: "
            "remove the folder, and it is made again"
        ) from error
