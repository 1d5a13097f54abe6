"""The TPU compiler's answer to a program: its schedule and its memory, kept by what was asked."""

import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
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
    """needed, limit: bytes. largest: what takes the most, in the compiler's words where it says."""

    def __init__(self, needed: float, limit: float, largest: tuple[str, ...]):
        super().__init__(f"{needed / 2**30:.2f} GiB of {limit / 2**30:.2f} GiB")
        self.needed, self.limit, self.largest = needed, limit, largest


def compile_for(
    lowered: Any,
    topology: object,
    options: Mapping[str, str],
    folder: epath.Path,
    on_wait: Callable[[int], None] = lambda seconds: None,
) -> Compiled:
    """lowered: of `jit(...).lower(...)` for the topology's devices. folder: of answers kept.
    on_wait: told every minute how long the compiler has been at it, from its beginning on."""
    asked = hashlib.sha256()
    by = versions()
    if told := os.environ.get("LIBTPU_INIT_ARGS"):
        by["LIBTPU_INIT_ARGS"] = told
    for part in (lowered.as_text(), repr(topology), json.dumps([dict(options), by])):
        asked.update(part.encode())
    place = folder / f"{asked.hexdigest()[:32]}.json.gz"
    answer = _kept(place)
    kept = answer is not None
    if answer is None:
        folder.mkdir(parents=True, exist_ok=True)  # before the minutes that an answer takes
        answer = _interruptible(lambda: _compiled(lowered, options), on_wait)
        files.write_bytes(place, gzip.compress(json.dumps(answer).encode()))
    if "needed" in answer:
        raise DoesNotFit(answer["needed"], answer["limit"], tuple(answer["largest"]))
    return Compiled(answer["text"], answer["peak"], answer["seconds"], kept)


def versions() -> dict[str, str]:
    return {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}


def _interruptible(
    work: Callable[[], dict[str, Any]], on_wait: Callable[[int], None]
) -> dict[str, Any]:
    """Python hears of Ctrl-C only between its own instructions, and the compiler is one of them."""
    done: list[dict[str, Any] | BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    on_wait(0)
    thread.start()
    begin, minutes = time.monotonic(), 1
    while thread.is_alive():
        if time.monotonic() - begin >= 60 * minutes:
            on_wait(60 * minutes)
            minutes += 1
        thread.join(timeout=0.5)
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def _compiled(lowered: Any, options: Mapping[str, str]) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(options))
    except Exception as error:
        if found := _does_not_fit(str(error)):
            return found
        if "No such compile option" in str(error):
            raise ValueError(
                f"the TPU compiler says of config.compute.compiler: {error}"
            ) from error
        raise
    return {
        "text": compiled.as_text(),
        "peak": compiled.memory_analysis().peak_memory_in_bytes,
        "seconds": time.perf_counter() - begin,
    }


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _does_not_fit(said: str) -> dict[str, Any] | None:
    """The compiler's refusal; in the first form it told what is largest, in the second it gave up
    early."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", said) or re.search(
        r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM "
        r"\(([\d.]+)([KMGT]?)\)",
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
        answer = json.loads(gzip.decompress(place.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):  # none, or one that was damaged
        return None
    whole = isinstance(answer, dict) and any(kind <= answer.keys() for kind in _ANSWERS)
    return answer if whole else None


_ANSWERS = ({"text", "peak", "seconds"}, {"needed", "limit", "largest"})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
