"""Batches: the same ones, byte for byte, whoever reads them, and what ends a run."""

import dataclasses
import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest

from llava_jax.batch import validate
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.pipeline import Read, read_ahead
from llava_jax.data.rows import Segment
from llava_jax.data.schedule import Schedule, schedule
from tests.data import small

EPOCHS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small.write(folder)
    # One that is missing: replacements and notes must be the same everywhere too.
    (folder / "images/3.png").unlink()
    return folder


def opened(folder, *, pack: bool = True, workers: int = 0, **data) -> Dataset:
    config = small.changed(
        small.write(folder),
        data={"workers": workers, "max_bad_fraction": 0.5, **data},
        batch={"pack": pack, "by_length": not pack},
        epochs=EPOCHS,
    )
    (folder / "images/3.png").unlink()
    return open_dataset(config)


def whole(reads: list[list[Read]]) -> list[bytes]:
    """The global batches of several hosts' parts, as bytes."""
    out = []
    for parts in zip(*reads, strict=True):
        assert len({part.step for part in parts}) == 1
        arrays = [np.concatenate(a) for a in zip(*(part.batch for part in parts), strict=True)]
        told = [segments for part in parts for segments in part.segments]
        out.append(b"".join(a.tobytes() for a in arrays) + repr(told).encode())
    return out


def read_by(dataset: Dataset, hosts: int, *, multiple: int = 8, start: int = 0) -> list[bytes]:
    plan = schedule(dataset, multiple=multiple)
    places = np.array_split(np.arange(plan.rows_per_step), hosts)
    return whole(
        [list(read_ahead(dataset, plan, places=list(mine), start=start)) for mine in places]
    )


@pytest.mark.parametrize("pack", [True, False])
def test_any_number_of_hosts_and_any_step_to_begin_at(folder, pack):
    dataset = opened(folder, pack=pack)
    once = read_by(dataset, hosts=1)
    assert len(once) == len(schedule(dataset, multiple=8)) > 3
    assert len(set(once)) == len(once)
    for hosts in (2, 4, 8):
        assert read_by(dataset, hosts) == once
    for start in range(1, len(once)):
        assert read_by(dataset, hosts=1 + start % 2, start=start) == once[start:]


@pytest.mark.parametrize(("pack", "workers", "hosts", "start"), [(True, 2, 1, 0), (False, 1, 2, 3)])
def test_any_number_of_workers(folder, pack, workers, hosts, start):
    once = read_by(opened(folder, pack=pack), hosts=1)
    dataset = opened(folder, pack=pack, workers=workers)
    assert read_by(dataset, hosts, start=start) == once[start:]


def test_every_epoch_shows_everything_once(folder):
    dataset = opened(folder)
    plan = schedule(dataset)
    shown: list[list[str]] = [[] for _ in range(EPOCHS)]
    for read in read_ahead(dataset, plan):
        validate(read.batch, tokens_per_image=4, image_size=small.SIZE, vocab_size=514)
        epoch, _ = plan.epoch(read.step)
        shown[epoch] += [segment.id for row in read.segments for segment in row]
    for ids in shown:
        assert sorted(ids) == sorted(entry["id"] for entry in small.entries())
    assert shown[0] != shown[1]


def test_an_epochs_last_step_ends_in_empty_rows(folder):
    dataset = opened(folder)
    rows = len(dataset.plan(0))
    multiple = next(m for m in (4, 5, 6, 7) if rows % m)
    plan = schedule(dataset, multiple=multiple)
    reads = list(read_ahead(dataset, plan))
    last = reads[-(-rows // multiple) - 1]
    assert plan.rows_per_step == multiple
    assert plan.epoch(last.step + 1) == (1, 0)
    assert list(map(bool, last.segments)) == [i < rows % multiple for i in range(multiple)]
    assert last.batch.token_RT.shape == reads[0].batch.token_RT.shape


def test_rows_of_a_step(folder):
    packed, single = opened(folder), opened(folder, pack=False)
    per_row = len(packed) / len(packed.plan(0))
    assert schedule(packed).rows_per_step == round(8 / per_row)
    assert schedule(packed, multiple=16).rows_per_step == 16
    everything = small.changed(single.config, batch={"conversations": 1000})
    assert schedule(open_dataset(everything)).rows_per_step == 60
    assert schedule(open_dataset(everything), multiple=8).rows_per_step == 64
    assert schedule(single).rows_per_step == schedule(single, multiple=4).rows_per_step == 8
    with pytest.raises(ValueError, match="conversations = 8, one a row, for 3 parts"):
        schedule(single, multiple=3)
    with pytest.raises(ValueError, match=r"got step \d+, expected 0 to"):
        schedule(single).examples(len(schedule(single)), 0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"places": []}, r"got places \[\] of a step's rows"),
        ({"places": [0, 9]}, r"got places \[0, 9\] .* expected some of 0 to"),
        ({"places": [-1]}, r"got places \[-1\]"),
        ({"start": -1}, "got start -1, expected 0 to"),
        ({"start": 10**6}, "got start 1000000, expected 0 to"),
    ],
)
def test_rows_and_steps_that_do_not_exist(folder, given, says):
    dataset = opened(folder)
    with pytest.raises(ValueError, match=says):
        next(read_ahead(dataset, schedule(dataset), **given))
    with pytest.raises(ValueError, match="got rows in multiples of 0"):
        schedule(dataset, multiple=0)


def test_the_seed_changes_the_order_and_settings_change_nothing_else(folder):
    dataset = opened(folder)
    assert read_by(dataset, 1) == read_by(opened(folder, threads=5), 1)
    config = small.changed(dataset.config, seed=8)
    assert read_by(open_dataset(config), 1) != read_by(dataset, 1)


class Fatal:
    """A source with an entry that kills, or fails, whoever reads it."""

    fingerprint = "fatal"

    def __init__(self, source, entry: int, kills: bool):
        self.source, self.entry, self.kills = source, entry, kills

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == self.entry and self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.entry:
            raise OSError("cannot read chat.json")
        return self.source[index]


def fatal(dataset: Dataset, *, kills: bool) -> Dataset:
    """It dies of the last row of the first epoch."""
    last = len(dataset.plan(0)) - 1
    entry = int(dataset.entry_N[dataset.plan(0)[last][0]])
    source = Fatal(dataset.sources["small"], entry, kills)
    return dataclasses.replace(dataset, sources={"small": source})  # pyright: ignore


def test_a_worker_that_is_killed_ends_the_run_at_once(folder):
    """By a sentence that names it; rerun, from the next step, the rest is the same."""
    once = read_by(opened(folder), hosts=1, multiple=1)
    dataset = fatal(opened(folder, workers=1), kills=True)
    got = []
    with pytest.raises(
        ChildProcessError, match=r"input worker \(process \d+\) was killed by SIGKILL.*run the same"
    ):
        for read in read_ahead(dataset, schedule(dataset)):
            got.append(read)
    assert multiprocessing.active_children() == []
    assert 0 < len(got) < len(once) / 2
    assert whole([got]) == once[: len(got)]
    assert read_by(opened(folder), hosts=1, multiple=1, start=len(got)) == once[len(got) :]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_rows_reach_the_reader(folder, workers):
    dataset = fatal(opened(folder, workers=workers), kills=False)
    with pytest.raises(OSError, match=r"cannot read chat\.json"):
        list(read_ahead(dataset, schedule(dataset)))


def test_a_reader_that_stops_early_leaves_nothing_running(folder):
    dataset = opened(folder, workers=1)
    reads = read_ahead(dataset, schedule(dataset))
    assert [read.step for read in itertools.islice(reads, 2)] == [0, 1]
    reads.close()
    assert multiprocessing.active_children() == []


def test_segments_name_what_was_skipped(folder):
    dataset = opened(folder)
    segments: list[Segment] = [
        segment
        for read in read_ahead(dataset, Schedule((dataset.plan(0),), 4))
        for row in read.segments
        for segment in row
    ]
    expected = {entry["id"] for entry in small.entries() if "3.png" in str(entry.get("image"))}
    assert {segment.id for segment in segments if segment.skipped} == expected
