"""How fast, and in how much memory, launch/convert.py takes a released checkpoint in and out again.

Writes random values under the exact names, shapes and dtypes of a released LLaVA, imports that,
exports what came of it in the same layout, and looks whether every tensor has kept every bit.
Exit code 1 if one has not, if either way takes more than 3 times as long as copying as many bytes,
or more than 3 GiB.

Both sides of a comparison start with their input out of the page cache and end when `sync` says
that all is on the disk; the copy is made right before, by reading and writing pieces of 64 MB.
Times are of whole processes, with the start of Python. As much as twice the checkpoint is on the
disk at a time (7B: 30 GB), three times with --keep.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

# The lists of names are the tests', which nobody installs.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_jax import cli
from tests.weights import released
from tests.weights.released import Hole, Release

CHECKOUT = Path(__file__).resolve().parent.parent
MOST_TIMES_A_COPY = 3.0
MOST_GIB = 3.0
# Of less, the start of Python is most of the time.
TIMED_FROM_BYTES = 10**9
_PIECE_BYTES = 64 * 2**20
# An odd number of 2-byte words, so that no two rows of a matrix hold the same.
_BLOCK_BYTES = _PIECE_BYTES - 2 * 19
# Exponents without this bit are never all ones, in f16, bf16 and f32 alike: no NaN, no infinity.
_FINITE = np.uint16(0xFBFF)


@dataclasses.dataclass(frozen=True)
class Run:
    """One way. copy_seconds: for as many bytes, right before. cpu_seconds: of the process, over all
    cores; where these are shared, it tells a slow program from a busy machine."""

    way: str
    copy_seconds: float
    seconds: float
    cpu_seconds: float
    peak_gib: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.copy_seconds


def main() -> int:
    args = _parse()
    release = released.release(args.variant, args.layout)
    place = Path(args.dir)
    _check_room(place, release.nbytes * (3.2 if args.keep else 2.2))
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=place))
    try:
        runs, problems = _measure(release, work, args)
    finally:
        if args.keep:
            print(f"kept: {work}", file=sys.stderr)
        else:
            shutil.rmtree(work)
    problems += [
        f"{run.way} takes {got:.2f} {what}, expected at most {most:g}"
        for run in runs
        for got, most, what in (
            (run.ratio, MOST_TIMES_A_COPY, "times as long as a copy"),
            (run.peak_gib, MOST_GIB, "GiB"),
        )
        if got > most and (what == "GiB" or release.nbytes >= TIMED_FROM_BYTES)
    ]
    print(_table(args, release, runs, problems))
    return 1 if problems else 0


def _parse() -> argparse.Namespace:
    parser = cli.parser(__doc__, "python benchmarks/convert.py --variant tiny --layout hf --dir .")
    parser.add_argument("--variant", default="v1.5-7b", choices=sorted(released.VARIANTS))
    parser.add_argument("--layout", required=True, choices=released.LAYOUTS)
    parser.add_argument("--dir", required=True, help="where there is room; left as it was")
    parser.add_argument("--pickle", action="store_true", help="write .bin files (needs torch)")
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    args = parser.parse_args()
    if args.layout == "hf" and args.variant.startswith("v1-"):
        parser.error(f"got {args.variant} as hf, which was never released; expected original")
    return args


def _check_room(place: Path, wanted: float) -> None:
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise OSError(
            f"{place} has {free / 1e9:.1f} GB free, expected at least {wanted / 1e9:.1f}; "
            "choose another --dir or a smaller --variant"
        )


def _measure(release: Release, work: Path, args: argparse.Namespace) -> tuple[list[Run], list[str]]:
    source, ours, export = work / "source", work / "ours", work / "export"
    _say("writing the checkpoint")
    digests = _fill(released.lay_out(release, source, pickle=args.pickle))
    base = ["--base", source / "clip"] if release.clip else []
    pickle = ["--allow-pickle"] if args.pickle else []

    folders = [source / name for name in release.folders]
    copy_seconds = _copy(folders, work / "copy", release.nbytes)
    took = _convert(folders, "import", source / "model", ours, *base, *pickle)
    imported = Run("import", copy_seconds, *took)
    if not args.keep:
        shutil.rmtree(source)

    copy_seconds = _copy([ours], work / "copy", release.nbytes)
    took = _convert([ours], "export", ours, export, "--format", args.layout)
    exported = Run("export", copy_seconds, *took)

    _say("comparing")
    return [imported, exported], _differences(release, digests, export)


# The checkpoint.


def _fill(holes: Sequence[Hole]) -> dict[str, str]:
    """Random values into the files; the SHA-256 of each tensor."""
    words = np.random.default_rng(0).integers(0, 1 << 16, _BLOCK_BYTES // 2, np.uint16)
    words &= _FINITE
    block = words.view(np.uint8).data
    digests = {}
    for number, hole in enumerate(holes):
        digest = hashlib.sha256()
        with hole.file.open("r+b") as file:
            file.seek(hole.begin)
            for piece in _rolled(block, 2 * 7_654_321 * number, hole.spec.nbytes):
                file.write(piece)
                digest.update(piece)
        digests[hole.key] = digest.hexdigest()
    return digests


def _rolled(block: memoryview, begin: int, size: int) -> Iterator[memoryview]:
    """`size` bytes of the block, over and over, from byte `begin` on."""
    begin %= len(block)
    while size:
        piece = block[begin : begin + size]
        yield piece
        size -= len(piece)
        begin = 0


def _differences(release: Release, digests: dict[str, str], export: Path) -> list[str]:
    """What is not in the exported folder as it was released, by a reader of its own."""
    found = {}
    for file in sorted(export.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            data = opened.tell()
            header.pop("__metadata__", None)
            for key, entry in header.items():
                begin, end = entry["data_offsets"]
                opened.seek(data + begin)
                digest = hashlib.sha256()
                while begin < end:
                    piece = opened.read(min(_PIECE_BYTES, end - begin))
                    begin += len(piece)
                    digest.update(piece)
                kind = {"F16": "float16", "F32": "float32"}.get(entry["dtype"], entry["dtype"])
                found[key] = (kind, tuple(entry["shape"]), digest.hexdigest())
    expected = {
        key: (spec.dtype, spec.shape, digests[release.comes_back[key]])
        for key, spec in release.exported.items()
    }
    problems = [f"{key}: missing in the export" for key in expected.keys() - found]
    problems += [f"{key}: not meant to be in the export" for key in found.keys() - expected]
    problems += [
        f"{key}: got {found[key]}, expected {expected[key]}"
        for key in expected.keys() & found
        if found[key] != expected[key]
    ]
    return sorted(problems)


# Time and memory.


def _copy(folders: Sequence[Path], to: Path, size: int) -> float:
    """Seconds to copy the first `size` bytes of the files in these folders; they are gone then."""
    _say(f"copying {size / 1e9:.2f} GB")
    _out_of_cache(folders)
    start = time.monotonic()
    to.mkdir()
    for number, file in enumerate(_files(folders)):
        with file.open("rb") as source, (to / str(number)).open("wb") as target:
            while piece := source.read(min(_PIECE_BYTES, size)):
                target.write(piece)
                size -= len(piece)
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(to)
    return seconds


def _convert(
    inputs: Sequence[Path], verb: str, *arguments: str | Path
) -> tuple[float, float, float]:
    """Seconds, CPU seconds and GiB of one call of launch/convert.py."""
    _say(verb)
    _out_of_cache(inputs)
    command = [sys.executable, CHECKOUT / "launch" / "convert.py", verb, *arguments]
    # This checkout's package, whichever is installed.
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    start = time.monotonic()
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        said = process.stdout.read()
        # Its own peak, unlike getrusage(RUSAGE_CHILDREN): that is of the largest child so far.
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()  # or it would write on while the folders are removed
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    seconds = time.monotonic() - start
    if process.returncode:
        raise OSError(f"{verb} ended with exit code {process.returncode}; its own message is above")
    print(said, end="", file=sys.stderr)
    kib = 1024 if sys.platform == "darwin" else 1  # macOS counts bytes
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / kib / 2**20


def _out_of_cache(folders: Sequence[Path]) -> None:
    os.sync()  # pages that are not on the disk cannot be dropped
    for file in _files(folders):
        with file.open("rb") as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folders: Sequence[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]


def _table(
    args: argparse.Namespace, release: Release, runs: Sequence[Run], problems: Sequence[str]
) -> str:
    lines = [
        f"{args.variant} as {args.layout}{' (.bin)' if args.pickle else ''}: "
        f"{len(release.exported)} tensors, {release.nbytes / 1e9:.2f} GB",
        f"{'':<8} {'copy s':>8} {'takes s':>8} {'ratio':>6} {'cpu s':>6} {'peak GiB':>9}",
    ]
    for run in runs:
        lines.append(
            f"{run.way:<8} {run.copy_seconds:>8.1f} {run.seconds:>8.1f} {run.ratio:>6.2f} "
            f"{run.cpu_seconds:>6.1f} {run.peak_gib:>9.2f}"
        )
    lines.append(f"asked: ratio ≤ {MOST_TIMES_A_COPY:g}, peak ≤ {MOST_GIB:g} GiB, every hash equal")
    lines += [f"FAILED: {problem}" for problem in problems] or ["all of it holds"]
    return "\n".join(lines)


def _say(what: str) -> None:
    print(f"[{what}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
