"""How many pictures per second our loader makes ready, beside torch's DataLoader with transformers.

Both read the same encoded files from the disk, in turns (ours, theirs, ours, …), and deliver
batches of 16 pictures in the main process. Each side is tried with several numbers of workers, and
in each round the best of either side is compared. What they deliver differs on purpose: ours
bytes, which the model normalises on the device; theirs normalised float32, four times as large.
The pixels are compared before anything is timed.

Before that, 10,000 pictures go through our loader, and its memory must stay where it was. Exit
code 1 if memory grows, or if ours is less than 1.5 times as fast.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_jax import cli, config, conversation
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.pipeline import read_ahead
from llava_jax.data.schedule import schedule
from llava_jax.image import ImageProcessing, Mode

LEAST_RATIO = 1.5
MOST_MIB = 30.0  # more between 1,000 and 10,000 pictures is a leak
MODES: tuple[Mode, ...] = ("crop", "pad")
WORKERS = (1, 2)
BATCH = 16
_GENERATED = 96
_MARKS = (1_000, 5_000, 10_000)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


Epoch = Callable[[], Iterator[Sized]]  # all pictures once, in batches


class Way(NamedTuple):
    """One way to read. in_process: the CPU time of this process is all that it takes."""

    name: str
    ours: bool
    epoch: Epoch
    in_process: bool


class Took(NamedTuple):
    seconds: float
    cpu_seconds: float


def main() -> int:
    args = _parse()
    _check_peer()
    with contextlib.ExitStack() as stack:
        if args.images is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="input-")))
            _say(f"drawing {_GENERATED} photographs")
            _draw(folder, _GENERATED)
        else:
            folder = Path(args.images)
        files = _files(folder)
        size = sum(file.stat().st_size for file in files) / len(files)
        print(f"{len(files)} files of {size / 1e3:.0f} kB, {args.size} px, {_machine()}")
        problems = _watch_memory(files, args.size)
        for mode in MODES:
            problems += _compare(files, ImageProcessing(mode, args.size), args.rounds)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def _parse() -> argparse.Namespace:
    parser = cli.parser(__doc__, "python benchmarks/input.py --rounds 5")
    parser.add_argument("--images", help="a folder of pictures; by default some are drawn")
    parser.add_argument("--size", type=int, default=336, help="of the tower's pictures")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"got --rounds {args.rounds}, expected 1 or more")
    return args


def _check_peer() -> None:
    if missing := [
        name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None
    ]:
        raise ValueError(f"got no {missing[0]}, which ours is compared with: pip install it")


def _files(folder: Path) -> list[Path]:
    found = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in _SUFFIXES]
    if not found:
        raise ValueError(f"got {folder} without pictures, expected some of {', '.join(_SUFFIXES)}")
    return list(itertools.islice(itertools.cycle(found), max(len(found), 4 * BATCH)))


def _draw(folder: Path, count: int) -> None:
    """Like photographs to a decoder: smooth shapes, edges, grain; COCO's usual sizes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = (640, 480) if number % 4 else (480, 640)
        blobs = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
        smooth = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
        slope = np.linspace(-40, 40, width)[None, :, None]
        edges = 30 * (np.add.outer(np.arange(height), np.arange(width)) // 60 % 2)[..., None]
        pixels = smooth + slope + edges + rng.normal(0, 5, smooth.shape)
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number:04}.jpg", quality=90)


def _compare(files: Sequence[Path], processing: ImageProcessing, rounds: int) -> list[str]:
    _say(f"comparing pixels: {processing.mode}")
    peers = _peers(processing)
    for name, read in peers.items():
        if name != "torchvision":
            _check_pixels(files[:BATCH], processing, name, read)
    with contextlib.ExitStack() as stack:
        # Theirs first: their workers are forks, which should not find threads of ours.
        theirs = list(_theirs(files, peers))
        ways = [*theirs, *_ours(files, processing, stack)]
        took: dict[str, list[Took]] = {way.name: [] for way in ways}
        for way in ways:
            _say(f"warming up: {way.name}")
            _time(way.epoch, len(files))
        for number in range(rounds):
            _say(f"round {number + 1} of {rounds}")
            for way in _in_turns(ways):
                took[way.name].append(_time(way.epoch, len(files)))
    return _report(processing.mode, ways, took, len(files))


def _in_turns(ways: Sequence[Way]) -> Iterator[Way]:
    """Ours, theirs, ours, …: what slows the machine slows both."""
    sides = ([way for way in ways if way.ours], [way for way in ways if not way.ours])
    for pair in itertools.zip_longest(*sides):
        yield from (way for way in pair if way is not None)


def _time(epoch: Epoch, count: int) -> Took:
    cpu, start = time.process_time(), time.monotonic()
    seen = sum(len(batch) for batch in epoch())
    took = Took(time.monotonic() - start, time.process_time() - cpu)
    assert seen == count, f"{seen} pictures came, of {count}"
    return took


def _ours(
    files: Sequence[Path], processing: ImageProcessing, stack: contextlib.ExitStack
) -> Iterator[Way]:
    """The loader itself, in threads and in processes, and the whole pipeline around it."""
    read = functools.partial(_read, processing)
    batches = _batches(files)
    yield Way("ours, in the main thread", True, lambda: map(read, batches), True)
    for workers in WORKERS:
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
        epoch = functools.partial(_ahead, threads, read, batches, workers)
        yield Way(f"ours, threads: {workers}", True, epoch, True)
    for workers in WORKERS:
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, spawn)
        processes = stack.enter_context(pool)
        epoch = functools.partial(_ahead, processes, read, batches, workers)
        yield Way(f"ours, processes: {workers}", True, epoch, False)
    for workers in WORKERS:
        dataset = _dataset(files, processing, workers, stack)
        epoch = functools.partial(_pipeline, dataset)
        yield Way(f"ours, pipeline, threads: {workers}", True, epoch, True)


def _dataset(
    files: Sequence[Path], processing: ImageProcessing, threads: int, stack: contextlib.ExitStack
) -> Dataset:
    """A caption of each file, as stage 1 reads them: four to a row, text and all."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="input-")))
    checkout = Path(__file__).resolve().parent.parent
    shutil.copy(checkout / "tests/golden/tokenizer.model", folder)
    root = files[0].parent
    said = {"human": f"{conversation.IMAGE_TAG}\nWhat is this?", "gpt": "A picture."}
    turns = [{"from": role, "value": text} for role, text in said.items()]
    entries = [
        {"image": os.path.relpath(file, root), "id": str(number), "conversations": turns}
        for number, file in enumerate(files)
    ]
    (folder / "chat.json").write_text(json.dumps(entries))
    data = config.Data(
        sources={"captions": config.Source(str(folder / "chat.json"), (str(root),))},
        tokenizer=str(folder),
        template="plain",
        image_mode="crop" if processing.mode == "crop" else "pad",
        image_size=processing.size,
        patch_size=processing.size // 2,  # few tokens: the pixels are the same
        conversation_tokens=64,
        prepared=str(folder / "prepared"),
        threads=threads,
    )
    batch = config.Batch(conversations=BATCH, tokens=256, images=4)
    return open_dataset(config.Config(data=data, batch=batch))


def _pipeline(dataset: Dataset) -> Iterator[list[str]]:
    for read in read_ahead(dataset, schedule(dataset)):
        yield [name for row in read.segments for segment in row for name in segment.pictures]


def _batches(files: Sequence[Path]) -> list[Sequence[Path]]:
    return [files[at : at + BATCH] for at in range(0, len(files), BATCH)]


def _read(processing: ImageProcessing, files: Sequence[Path]) -> np.ndarray:
    return np.concatenate([processing.process(file) for file in files])


def _ahead(
    pool: concurrent.futures.Executor,
    read: Callable[[Sequence[Path]], np.ndarray],
    batches: Iterable[Sequence[Path]],
    workers: int,
) -> Iterator[np.ndarray]:
    """Batches in order, twice as many as workers on their way, as many as DataLoader has."""
    running: deque[concurrent.futures.Future[np.ndarray]] = deque()
    for batch in batches:
        running.append(pool.submit(read, batch))
        if len(running) > 2 * workers:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


class _Pictures:
    """A torch Dataset of a folder's pictures."""

    def __init__(self, files: Sequence[Path], read: Callable[[Path], Any]):
        self._files, self._read = files, read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        return self._read(self._files[index])


def _peers(processing: ImageProcessing) -> dict[str, Callable[[Path], Any]]:
    """Ways to make one picture ready with transformers, by name."""
    import transformers

    size = processing.size
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }
    clip = transformers.CLIPImageProcessorPil(**sizes)
    background = processing.background if processing.mode == "pad" else None
    peers = {"CLIP processor": functools.partial(_ready, clip, background)}
    if processing.mode == "pad":
        llava = transformers.LlavaImageProcessorPil(do_pad=True, **sizes)
        peers["LLaVA processor"] = functools.partial(_ready, llava, None)
    if importlib.util.find_spec("torchvision"):  # not the same pixels
        fast = transformers.CLIPImageProcessor(**sizes)
        peers["torchvision"] = functools.partial(_ready, fast, background)
    return peers


def _ready(processor: Any, background: tuple[int, int, int] | None, file: Path) -> Any:
    picture = Image.open(file).convert("RGB")
    if background and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), background)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def _theirs(files: Sequence[Path], peers: dict[str, Callable[[Path], Any]]) -> Iterator[Way]:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)  # as in its workers: one picture is too little to share out
    for (name, read), workers in itertools.product(peers.items(), (0, *WORKERS)):
        loader = DataLoader(
            _Pictures(files, read),  # pyright: ignore[reportArgumentType]
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        label = f"DataLoader, {name}, workers: {workers}"
        yield Way(label, False, functools.partial(iter, loader), workers == 0)


def _check_pixels(
    files: Sequence[Path],
    processing: ImageProcessing,
    name: str,
    read: Callable[[Path], Any],
) -> None:
    import transformers

    clip = transformers.CLIPImageProcessorPil()
    for file in files:
        with Image.open(file) as picture:
            if picture.mode != "RGB" or picture.has_transparency_data:
                continue  # read in other ways on purpose: 16 bits, hidden colours
        theirs = read(file).permute(1, 2, 0).numpy()
        pixels = np.rint((theirs * clip.image_std + clip.image_mean) * 255)
        if not np.array_equal(pixels, processing.process(file)[0]):
            raise ValueError(f"got other pixels of {file} from the {name}, expected the same")


def _report(mode: Mode, ways: Sequence[Way], took: dict[str, list[Took]], count: int) -> list[str]:
    print(f"\n{mode:<46} {'pictures/s':>10} {'cpu ms each':>12}")
    medians = {
        name: statistics.median(one.seconds for one in times) for name, times in took.items()
    }
    cpu = {
        way.name: min(one.cpu_seconds for one in took[way.name]) / count
        for way in ways
        if way.in_process
    }
    for way in ways:
        own = f"{cpu[way.name] * 1e3:.2f}" if way.in_process else "–"
        print(f"{way.name:<46} {count / medians[way.name]:>10.1f} {own:>12}")
    ours, theirs = (
        [min(one.seconds for one in turn) for turn in zip(*times, strict=True)]
        for times in (
            [took[way.name] for way in ways if way.ours is side] for side in (True, False)
        )
    )
    ratios = sorted(slow / fast for slow, fast in zip(theirs, ours, strict=True))
    ratio = statistics.median(ratios)
    print(
        f"best of theirs to best of ours: {ratio:.2f} (rounds {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}), asked ≥ {LEAST_RATIO:g}"
    )
    own, peer = (
        min(cpu[way.name] for way in ways if way.in_process and way.ours is side)
        for side in (True, False)
    )
    print(f"by CPU time, in one process: {peer / own:.2f}")
    if ratio < LEAST_RATIO:
        return [f"{mode}: got {ratio:.2f} times the pictures per second, expected {LEAST_RATIO:g}"]
    return []


def _watch_memory(files: Sequence[Path], size: int) -> list[str]:
    """Half the pictures cropped, half padded. Before torch is there: its peak would hide ours."""
    reads = [functools.partial(_read, ImageProcessing(mode, size)) for mode in MODES]
    batches = itertools.cycle(_batches(files))
    seen, peaks = 0, []
    with (
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        cli.Progress(_MARKS[-1], "watching memory", "pictures") as progress,
    ):
        for mark in _MARKS:
            while seen < mark:
                for read in reads:
                    for batch in _ahead(pool, read, itertools.islice(batches, 4), 2):
                        seen += len(batch)
                        progress.advance(len(batch))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    told = ", ".join(f"{peak:.1f} after {mark:,}" for mark, peak in zip(_MARKS, peaks, strict=True))
    print(f"MiB at the peak, two threads: {told}")
    if peaks[-1] - peaks[0] > MOST_MIB:
        return [f"memory grew from {peaks[0]:.0f} to {peaks[-1]:.0f} MiB, expected it to stay"]
    return []


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, load {os.getloadavg()[0]:.1f}"


def _say(what: str) -> None:
    print(f"[{what}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
