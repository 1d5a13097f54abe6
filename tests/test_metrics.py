"""What a run tells: every number to the bit, each step once, and extras that never end a run."""

import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_jax import metrics
from llava_jax.metrics import Clock, Log

VALUES = {"loss": 0.1 + 0.2, "loss/a": 1 / 3, "lr": 5e-324, "skipped_steps": 0}


def log(workdir, resume_at=0, tensorboard=False, **options) -> Log:
    return Log(workdir, resume_at=resume_at, tensorboard=tensorboard, **options)


def lines(workdir, name=metrics.METRICS) -> list[bytes]:
    return (workdir / name).read_bytes().split(b"\n")[:-1]


# --- the files ---


def test_numbers_read_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2**64, 3000, np.uint64).view(np.float64).tolist()  # any float there is
    drawn += [0.0, -0.0, math.inf, -math.inf, 1e16, 2**53 + 2.0, float(np.float32(0.1))]
    with log(tmp_path) as told:
        for number, value in enumerate(drawn):
            told.step(number, {"loss": value, "conversations": number})
    steps = metrics.read(tmp_path).steps
    assert [step["step"] for step in steps] == [step["conversations"] for step in steps]
    back = [step["loss"] for step in steps]
    for value, got in zip(drawn, back, strict=True):
        same = struct.pack("d", value) == struct.pack("d", got)
        assert same or (math.isnan(value) and math.isnan(got))
    for line in lines(tmp_path):  # as strict readers want it
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_number_may_be_numpys_or_on_a_device(tmp_path):
    values: Any = {"loss": np.float32(0.1), "norm": jax.numpy.float32(0.1)}
    with log(tmp_path) as told:
        told.step(0, values)
        told.event(0, "held_out", loss=np.float32(0.1), counts=np.arange(3))
    (step,), (event,) = metrics.read(tmp_path)
    assert step["loss"] == step["norm"] == event["loss"] == float(np.float32(0.1))
    assert event["counts"] == [0, 1, 2]


def run(workdir: Path, start: int, stop: int) -> None:
    with log(workdir, start) as told:
        for number in range(start, stop):
            told.step(number, {"loss": math.sin(number), "norm": math.nan})
            if number % 3 == 2:
                told.event(number, "held_out", loss=number / 7, text="né 猫")


def without_times(workdir: Path) -> list[dict]:
    return [{**event, "time": ""} for event in metrics.read(workdir).events]


@pytest.mark.parametrize("torn", [b"", b"{", b"\0\0\0", b'{"step'])
def test_a_run_that_goes_on_ends_with_the_file_of_one_that_did_not_stop(tmp_path, torn):
    run(tmp_path / "whole", 0, 20)
    for stop, again in ((9, 6), (7, 7), (13, 0), (12, 11)):
        run(tmp_path / "parts", again if (tmp_path / "parts").exists() else 0, stop)
        with (tmp_path / "parts" / metrics.METRICS).open("ab") as file:
            file.write(torn)
    run(tmp_path / "parts", 12, 20)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")


def test_a_line_cut_anywhere_is_a_line_that_was_not_written(tmp_path):
    run(tmp_path, 0, 3)
    name = tmp_path / metrics.EVENTS
    whole = name.read_bytes()
    for cut in range(len(whole) + 1):  # also within a character
        name.write_bytes(whole[:cut])
        with log(tmp_path, 3):
            pass
        # All but the line break: nothing is missing.
        assert name.read_bytes() == (whole if cut >= len(whole) - 1 else b""), cut


def test_what_happened_once_is_history(tmp_path):
    with log(tmp_path) as told:
        told.event(9, "stopped", reason="SIGTERM")
        told.event(9, "held_out", loss=1.0)
    with log(tmp_path, 5) as told:
        told.event(5, "resumed")
    with log(tmp_path, 5):
        pass
    assert [event["kind"] for event in metrics.read(tmp_path).events] == ["stopped", "resumed"]


def test_a_killed_run_loses_nothing(tmp_path):
    program = f"""
from llava_jax.metrics import Log
import os, signal
with Log({str(tmp_path)!r}, resume_at=0, tensorboard=False) as told:
    for number in range(7):
        told.step(number, {{"loss": number}})
    told.event(6, "saved")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    history = metrics.read(tmp_path)
    assert [step["loss"] for step in history.steps] == list(range(7))
    assert [event["kind"] for event in history.events] == ["saved"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (metrics.METRICS, b"hello"),
        (metrics.METRICS, b'[{"step": 1}]\n'),
        (metrics.METRICS, b'{"step": 0, "loss": 1.0}\n{"loss": 1.0}\n'),
        (metrics.METRICS, b'{"step": 0, "loss": "low"}\n'),
        (metrics.METRICS, b'{"step": true, "loss": 1.0}\n'),
        (metrics.METRICS, b'{"step": 0, "lo\n{"step": 1, "loss": 1.0}\n'),
        (metrics.METRICS, b"[" * 100_000 + b"\n"),
        (metrics.EVENTS, b'{"step": 0, "loss": 1.0}\n'),
        (metrics.EVENTS, b'{"step": -1, "kind": "saved"}\n'),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path, name, content):
    ours = b'{"step": 0, "loss": 1.0}\n'
    (tmp_path / metrics.METRICS).write_bytes(ours)
    (tmp_path / name).write_bytes(content)
    for use in (metrics.read, log):
        with pytest.raises(ValueError, match=rf"{name}, line \d: got b.*expected a line that a"):
            use(tmp_path)
    assert (tmp_path / name).read_bytes() == content
    assert name == metrics.METRICS or (tmp_path / metrics.METRICS).read_bytes() == ours


def test_nothing_was_told_yet(tmp_path):
    assert metrics.read(tmp_path / "none") == ([], [])
    with log(tmp_path / "new" / "folder"):
        pass
    assert metrics.read(tmp_path / "new" / "folder") == ([], [])


def test_half_a_character_is_still_a_line(tmp_path):
    with log(tmp_path) as told:
        told.event(0, "answers", answers=["\ud800", math.inf])
    assert metrics.read(tmp_path).events[0]["answers"] == ["\ud800", "inf"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    told = log(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"left.*metrics\.jsonl"):
        patch.setattr(os, "write", full)
        told.step(0, VALUES)


def test_a_system_that_takes_half_a_line_is_given_the_other(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    with log(tmp_path) as told:
        told.step(0, VALUES)
    assert metrics.read(tmp_path).steps == [{"step": 0, **VALUES}]


def test_a_step_told_twice_is_a_bug(tmp_path):
    with log(tmp_path, 5) as told:
        with pytest.raises(AssertionError, match="step 4 after step 4"):
            told.step(4, VALUES)
        told.step(5, VALUES)
        with pytest.raises(AssertionError, match="step 5 after step 5"):
            told.step(5, VALUES)


# --- TensorBoard ---


def event_files(workdir: Path) -> list:
    """All events, file by file in the order of their names, as TensorBoard reads them."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.crc32c import crc32c

    protocol: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    events = []
    for file in sorted((workdir / metrics.TENSORBOARD).iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            (crc,) = struct.unpack_from("<I", data, at + 8)
            plain = crc32c(data[at : at + 8])
            assert crc == ((plain >> 15 | plain << 17) + 0xA282EAD8) % 2**32
            events.append(protocol.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return events


def test_tensorboard_gets_each_step_once(tmp_path):
    for start, stop in ((0, 5), (3, 6)):
        with log(tmp_path, start, tensorboard=True) as told:
            for number in range(start, stop):
                told.step(number, {"loss": number / 2, "loss/a": math.nan})
            told.event(stop - 1, "held_out", loss=4.5, note="<b>né</b>")
    shown: dict[str, list] = {}
    for event in event_files(tmp_path):
        if event.HasField("session_log") and event.session_log.status == 1:
            # What a reader does when a run starts again at a step.
            shown = {tag: [p for p in pts if p[0] < event.step] for tag, pts in shown.items()}
        for value in event.summary.value:
            told = value.tensor.string_val[0] if value.HasField("tensor") else value.simple_value
            shown.setdefault(value.tag, []).append((event.step, told))
    assert shown["loss"] == [(number, number / 2) for number in range(6)]
    assert len(shown["loss/a"]) == 6
    assert shown["held_out/loss"] == [(5, 4.5)]
    assert "<b>né</b>" in shown["held_out/text_summary"][0][1].decode()


def test_without_tensorboardx_a_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with log(tmp_path, tensorboard=True) as told:
        told.step(0, VALUES)
    assert metrics.read(tmp_path).steps == [{"step": 0, **VALUES}]
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: TensorBoard is off: ")
    assert "pip install 'llava-jax[metrics]'" in note


# --- W&B ---


class FakeWandb(types.ModuleType):
    """Fails where it is told to."""

    def __init__(self, fails_at: str = "", error: BaseException | None = None):
        super().__init__("wandb")
        self.fails_at, self.error = fails_at, error
        self.inits: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def _may_fail(self, place: str) -> None:
        if place == self.fails_at and self.error:
            raise self.error

    def init(self, **options):
        self.inits.append(options)
        self._may_fail("init")
        return self

    def log(self, values, step):
        self._may_fail("log")
        self.logged.append((step, values))

    def finish(self):
        self._may_fail("finish")
        self.finished += 1


def test_wandb_gets_the_numbers_and_the_run_keeps_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 1):
        with log(tmp_path, start, wandb="llava", run={"seed": 1}) as told:
            told.step(start, VALUES)
            told.event(start, "held_out", loss=2.0, text="t")
    first, second = fake.inits
    assert first == second
    assert (first["project"], first["resume"], first["config"]) == ("llava", "allow", {"seed": 1})
    with log(tmp_path, 2, wandb="another"):
        pass
    assert fake.inits[2]["id"] != first["id"]
    assert fake.logged == [
        (0, VALUES),
        (0, {"held_out/loss": 2.0}),
        (1, VALUES),
        (1, {"held_out/loss": 2.0}),
    ]
    assert fake.finished == 3


@pytest.mark.parametrize("place", ["import", "init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no\nway"), SystemExit(1), ConnectionError()])
def test_wandb_is_never_fatal(tmp_path, monkeypatch, capsys, place, error):
    fake = None if place == "import" else FakeWandb(place, error)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with log(tmp_path, wandb="llava") as told:
        for number in range(3):
            told.step(number, VALUES)
    assert len(metrics.read(tmp_path).steps) == 3
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: W&B is off")


def test_a_run_is_interrupted_in_wandb_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("log", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), log(tmp_path, wandb="llava") as told:
        told.step(0, VALUES)


# --- time and memory ---


def test_laps_and_what_they_waited_for():
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = Clock(lambda: now)
    work(2)
    with clock.waiting():
        work(0.5)
    with pytest.raises(StopIteration), clock.waiting():
        work(0.25)
        raise StopIteration
    work(1)
    assert clock.lap() == {"seconds_step": 3.75, "seconds_input": 0.75}
    work(1)
    assert clock.lap() == {"seconds_step": 1, "seconds_input": 0}
    with clock.waiting():
        work(9)
    clock.restart()
    work(1)
    assert clock.lap() == {"seconds_step": 1, "seconds_input": 0}
