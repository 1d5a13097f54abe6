"""The TPU compiler's answer to a program: its schedule and its memory, kept by what was asked."""

import gzip
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files


class Compiled(NamedTuple):
    """peak: bytes a chip must have at once. kept: it was found where an earlier answer was kept."""

    text: str
    peak: int
    seconds: float
    kept: bool


class DoesNotFit(Exception):
    """needed, limit: bytes. largest: what takes the most, in the compiler's words."""

    def __init__(self, needed: float, limit: float, largest: tuple[str, ...]):
        super().__init__(f"{needed / 2**30:.2f} GiB of {limit / 2**30:.2f} GiB")
        self.needed, self.limit, self.largest = needed, limit, largest


def compile_for(
    lowered: Any, topology: object, options: Mapping[str, str], folder: epath.Path
) -> Compiled:
    """lowered: of `jit(...).lower(...)` for the topology's devices. folder: of answers kept."""
    asked = hashlib.sha256()
    versions = {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}
    for part in (lowered.as_text(), repr(topology), json.dumps([dict(options), versions])):
        asked.update(part.encode())
    place = folder / f"{asked.hexdigest()[:32]}.json.gz"
    answer = _kept(place)
    kept = answer is not None
    if answer is None:
        answer = _compiled(lowered, options)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(place, gzip.compress(json.dumps(answer).encode()))
    if "needed" in answer:
        raise DoesNotFit(answer["needed"], answer["limit"], tuple(answer["largest"]))
    return Compiled(answer["text"], answer["peak"], answer["seconds"], kept)


def _compiled(lowered: Any, options: Mapping[str, str]) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(options))
    except Exception as error:
        if found := _does_not_fit(str(error)):
            return found
        raise
    return {
        "text": compiled.as_text(),
        "peak": compiled.memory_analysis().peak_memory_in_bytes,
        "seconds": time.perf_counter() - begin,
    }


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _does_not_fit(said: str) -> dict[str, Any] | None:
    """The compiler's refusal; in the first form it told what is largest, in the second it gave up
    early."""
    found = re.search(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", said) or re.search(
        r"memory required for HLO temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM "
        r"\(([\d.]+)([KMG]?)\)",
        said,
    )
    if not found:
        return None
    needed, limit = (float(found[n]) * _UNITS[found[n + 1]] for n in (1, 3))
    largest = re.findall(r"Size: (\S+)\n(?:\s+Operator: ([^\n]*)\n)?\s+Shape: (\S+)", said)
    words = []
    for size, operator, shape in largest[:5]:
        source = re.search(r'op_name="([^"]*)"', operator)
        words.append(" ".join([size, shape.partition("{")[0], source[1] if source else ""]).strip())
    return {"needed": needed, "limit": limit, "largest": words}


def _kept(place: epath.Path) -> dict[str, Any] | None:
    try:
        return json.loads(gzip.decompress(place.read_bytes()))
    except (OSError, EOFError, ValueError):  # none, or one that was cut off
        return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
