"""Every conversation rendered before the first step: lengths, and what was refused or repaired.

Lengths decide which conversations share a row. They are kept in a folder named by all they depend
on, so that a run starts at once the second time.

Dims: N entries taken of a source.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llava_jax import files
from llava_jax.conversation import Refused
from llava_jax.data.entry import Entry, Source
from llava_jax.data.examples import Renderer
from llava_jax.data.findings import Findings
from llava_jax.data.spreading import spread


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
    repeated: Findings  # ids or whole conversations that come more than once

    @property
    def usable(self) -> np.ndarray:
        return self.tokens_N > 0


_ARRAYS = {
    "entry_N": np.int64,
    "tokens_N": np.int32,
    "learned_N": np.int32,
    "pictures_N": np.int16,
    "turns_N": np.int32,
}
_FINDINGS = ("refused", "repaired", "repeated")


def key(source: Source, entry_N: np.ndarray, renderer: Renderer) -> str:
    """What the lengths of a source depend on, in short."""
    said = json.dumps([source.fingerprint, renderer.settings()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode() + entry_N.astype("<i8").tobytes()).hexdigest()[:16]


def measure(
    source: Source,
    entry_N: np.ndarray,
    renderer: Renderer,
    *,
    advance: Callable[[int], None] = lambda count: None,
    processes: int | None = None,
) -> Lengths:
    parts = []
    seen: collections.Counter = collections.Counter()
    measured = spread(
        _measure_chunk, entry_N, source, renderer, advance=advance, processes=processes
    )
    for part, hashes in measured:
        for what, digest, example in hashes:
            seen[digest] += 1
            if seen[digest] > 1:
                part.repeated.add(what, example)
        parts.append(part)
    return _joined(parts)


def _measure_chunk(
    chunk: np.ndarray, source: Source, renderer: Renderer
) -> tuple[Lengths, list[tuple[str, bytes, str]]]:
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
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(lengths, name) for name in _ARRAYS})
    report = {name: getattr(lengths, name).to_json() for name in _FINDINGS}
    report["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    try:
        with files.fresh_folder(folder) as fresh:
            files.write_bytes(fresh / "lengths.npz", buffer.getvalue())
            files.write_json(fresh / "report.json", report)
    except (ValueError, OSError):
        # Another process may have been quicker; what it counted is the same.
        if load(folder) is None:
            raise


def load(folder: str | os.PathLike[str]) -> Lengths | None:
    """What was saved; None if nothing was."""
    folder = files.path(folder)
    if not (folder / "report.json").exists():
        return None
    try:
        report = json.loads((folder / "report.json").read_text())
        stored = (folder / "lengths.npz").read_bytes()
        if hashlib.sha256(stored).hexdigest() != report["sha256"]:
            raise ValueError("lengths.npz is not what was written")
        with np.load(io.BytesIO(stored)) as arrays:
            fields: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
        fields |= {name: Findings.from_json(report[name]) for name in _FINDINGS}
        return Lengths(**fields)
    except Exception as error:  # JSON, zip files and arrays break in many ways
        raise ValueError(
            f"got {folder}, which cannot be read ({error}); expected the lengths of a preparation: "
            "remove the folder, and they are counted again"
        ) from error
