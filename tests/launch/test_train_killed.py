"""A run that is killed, wherever it is, and started again, ends as if it had never been killed."""

import json
import random
import sys

import pytest

from tests import processes_running, training

# Work for a laptop: on one device, starting again is quick.
ONE_DEVICE = ["--config.held_out.answers=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    training.write(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    run(folder, "uninterrupted", [])
    return folder / "uninterrupted"


def run(folder, name: str, places: list[str], *options: str) -> str:
    """What a run printed that was killed at these places, and went on to its end."""
    arguments = ["--config", f"{folder}/small.py", "--workdir", f"{folder}/{name}", *options]
    argv = [sys.executable, "-m", "tests.launch.killed", json.dumps(places)]
    (ended,) = processes_running.run([*argv, *ONE_DEVICE, *arguments], count=1, limit_s=900)
    assert ended.code == 0, ended.output
    for place in places:
        assert f"ended -9: {place}" in ended.output, ended.output
    return ended.output


def test_killed_at_the_places_that_matter(folder, uninterrupted):
    places = [
        "rename 1 of */run.json",  # before the workdir is a run's
        "line 3",  # while a step is told
        "saving 1",  # step 4 is in the background
        "rename 1 of */checkpoints/12",  # it is written, and not complete
        "row 9",  # in a thread that reads ahead
        "rename 1 of */model",
    ]
    printed = run(folder, "places", places)
    training.check_same(folder / "places", uninterrupted)
    assert "goes on from step 16 of 16" in printed
    assert "goes on from step 8 of 16" in printed


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments(folder, uninterrupted, workers):
    draw = random.Random(workers)
    # From the first import to the end of a run is some 6 s; none must end before its time.
    places = [f"after {draw.uniform(0.2, 5):.2f} s" for _ in range(12)]
    name = f"random-{workers}"
    run(folder, name, places, f"--config.data.workers={workers}")
    training.check_same(folder / name, uninterrupted)
