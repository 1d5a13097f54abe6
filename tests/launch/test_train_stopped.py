"""A run that is stopped by a signal, or goes on with other devices or processes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_jax import metrics
from tests import processes_running, training

STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    training.write(folder)
    return folder


def argv(folder: Path, name: str, *options: str) -> list[str]:
    given = ["--config", f"{folder}/small.py", "--workdir", f"{folder}/{name}"]
    # Saved by a signal, and at the end.
    rare = ["--config.checkpoints.every=100", "--config.checkpoints.keep=1"]
    held_out = ["--config.held_out.every=0"]
    return [sys.executable, "launch/train.py", *given, *rare, *held_out, *options]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    (ended,) = processes_running.run(argv(folder, "uninterrupted"), count=1, limit_s=300)
    assert ended.code == 0, ended.output
    return folder / "uninterrupted"


def stop(folder: Path, name: str, place: str, *options: str, count: int = 1, **settings) -> str:
    """What a run printed that got a signal at its fifth step, and ended within ten more."""
    driver = [sys.executable, "-m", "tests.launch.killed", json.dumps([place])]
    settings.setdefault("limit_s", 300)
    ended = processes_running.run(
        [*driver, *argv(folder, name, *options)[2:]], count=count, **settings
    )
    code = 75 if place.startswith("SIGTERM") else 130
    assert [process.code for process in ended] == [code] * count, ended[0].output
    assert 4 <= len(training.told(folder / name)) <= 14
    return ended[0].output


def go_on(folder: Path, name: str, *options: str, **settings) -> str:
    count = settings.pop("count", 1)
    settings.setdefault("limit_s", 300)
    ended = processes_running.run(argv(folder, name, *options), count, **settings)
    assert [process.code for process in ended] == [0] * count, ended[0].output
    return ended[0].output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_the_run(folder, name, request):
    printed = stop(folder, name, f"{name} 5 to 0")
    steps = len(training.told(folder / name))
    assert f"stopped by {name} and saved; to go on: python " in printed
    assert not (folder / name / "model").exists()
    events = [(event["step"], event["kind"]) for event in metrics.read(folder / name).events]
    assert events == [(steps - 1, "stopped")]
    if name == "SIGTERM":  # from here on both are the same
        assert f"goes on from step {steps} of {STEPS}" in go_on(folder, name)
        training.check_same(folder / name, request.getfixturevalue("uninterrupted"))


def test_a_signal_to_one_process_stops_both_and_one_goes_on(folder):
    """Two processes of a device each, then one of two."""
    go_on(folder, "two", count=2)
    stop(folder, "stopped-two", "SIGTERM 5 to 1", count=2)
    steps = len(training.told(folder / "stopped-two"))
    assert f"goes on from step {steps} of" in go_on(folder, "stopped-two", devices=2)
    check_close(folder / "stopped-two", folder / "two")


@pytest.mark.slow
def test_eight_devices_become_four(folder):
    longer = "--config.epochs=4"
    go_on(folder, "eight", longer, devices=8)
    stop(folder, "four", "SIGTERM 5 to 0", longer, devices=8)
    steps = len(training.told(folder / "four"))
    assert f"goes on from step {steps} of 12" in go_on(folder, "four", longer, devices=4)
    check_close(folder / "four", folder / "eight")


def check_close(workdir: Path, other: Path) -> None:
    mine, theirs = training.learned(workdir), training.learned(other)
    for path, leaf in mine.items():
        if path.startswith("trainable/"):
            apart = np.abs(leaf - theirs[path]).max() / np.abs(theirs[path]).max()
            print(f"{path}: {apart:.1e}")
            assert apart < 1e-6, path
    for step, expected in zip(training.told(workdir), training.told(other), strict=True):
        np.testing.assert_allclose(step["loss"], expected["loss"], rtol=1e-6)
        np.testing.assert_allclose(step["norm"], expected["norm"], rtol=1e-5)
        assert step["lr"] == expected["lr"]
