"""Batches, read ahead by Grain: batch i is the same whoever reads it, in however many parts.

Each host names the places of a step's rows that it wants, and gets those, at random access: to
resume is to begin at step i.

Dims: R rows of a step, of which a host reads some.
"""

import dataclasses
import multiprocessing
import re
import signal
from collections.abc import Generator, Sequence

import numpy as np

from llava_jax.batch import Batch
from llava_jax.data.dataset import Dataset
from llava_jax.data.rows import Row, Segment, read_row
from llava_jax.data.schedule import Schedule

try:
    import grain
    from absl import flags
except ImportError as error:
    raise ValueError("reading ahead needs one more package; run pip install grain") from error

_AHEAD = 2  # batches ready and waiting


@dataclasses.dataclass(frozen=True)
class Rows:
    """A host's rows as a sequence: all of its first step, then all of its second, …"""

    dataset: Dataset
    schedule: Schedule
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.schedule) * len(self.places)

    def __getitem__(self, index: int) -> Row:
        step, place = divmod(int(index), len(self.places))
        return read_row(self.dataset, self.schedule.examples(step, self.places[place]))


@dataclasses.dataclass(frozen=True)
class Read:
    """A host's part of a step. segments: of each of its rows, what is in it."""

    step: int
    batch: Batch
    segments: tuple[tuple[Segment, ...], ...]


def read_ahead(
    dataset: Dataset,
    schedule: Schedule,
    *,
    places: Sequence[int] | None = None,
    start: int = 0,
) -> Generator[Read, None, None]:
    """Steps from `start` to the last. places: of a step's rows, those this host reads; else all."""
    places = tuple(range(schedule.rows_per_step) if places is None else places)
    known = range(schedule.rows_per_step)
    if not places or any(place not in known for place in places):
        raise ValueError(
            f"got places {list(places)} of a step's rows, expected some of 0 to {known[-1]}"
        )
    if not 0 <= start <= len(schedule):
        raise ValueError(f"got start {start}, expected 0 to {len(schedule)}, the number of steps")
    data = dataset.config.data
    rows = grain.MapDataset.source(Rows(dataset, schedule, places))
    threads = max(1, data.threads)
    ahead = _AHEAD * len(places)
    iterator = rows[start * len(places) :].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    )
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own, and ours are not absl's
        iterator = iterator.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=data.workers, per_worker_buffer_size=max(1, ahead // data.workers)
            )
        )
    # Behind the workers: before them, each would make batches of the rows it happens to have.
    iterator = iterator.batch(len(places), batch_fn=_collated)
    running = iter(grain.experimental.ThreadPrefetchIterDataset(iterator, prefetch_buffer_size=1))
    workers: set[int | None] = set()
    try:
        for step in range(start, len(schedule)):
            try:
                batch, segments = next(running)
            except RuntimeError as error:
                raise _worker_died(error, workers) from error
            workers = workers or {child.pid for child in multiprocessing.active_children()}
            yield Read(step, batch, segments)
    finally:
        running.close()


def _worker_died(error: RuntimeError, workers: set[int | None]) -> Exception:
    """Grain says of a killed worker only its exit code."""
    code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if code is None:
        return error
    gone = workers - {child.pid for child in multiprocessing.active_children()}
    who = f"input worker (process {', '.join(map(str, gone))})" if gone else "an input worker"
    number = -int(code[1])
    how = f"was killed by {signal.Signals(number).name}" if number > 0 else f"ended with {code[1]}"
    hint = ", often the kernel's answer to want of memory" if number == signal.SIGKILL else ""
    return ChildProcessError(
        f"{who} {how}{hint}; expected it to read on: run the same command again, which goes on "
        "from the last checkpoint, with fewer config.data.workers if memory is short"
    )


def _collated(rows: Sequence[Row]) -> tuple[Batch, tuple[tuple[Segment, ...], ...]]:
    batch = Batch._make(
        np.stack(arrays) for arrays in zip(*(row.arrays for row in rows), strict=True)
    )
    return batch, tuple(row.segments for row in rows)
