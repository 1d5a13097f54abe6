"""What a run tells of itself: files in its workdir, TensorBoard, W&B; and reading them back.

    WORKDIR/metrics.jsonl   a line a step: {"step": 0, "loss": 5.54, …}
    WORKDIR/events.jsonl    what happened: {"step": 499, "kind": "held_out", "time": …, "loss": 2.1}
    WORKDIR/tensorboard/    event files, one more each time the run goes on

Steps count from 0; an event has the number of the step it came after. Numbers read back to the
bit; what is not finite stands as "nan", "inf" or "-inf", for JSON knows no such numbers.

On a disk a line is handed to the system when its step is done, so a killed run loses at most half
of one. An object in a bucket cannot grow: there the files are held in memory and written whole
every minute, less often where that would take more than a hundredth of the time, and by `flush`.

One process of a run has a Log.
"""

import contextlib
import datetime
import importlib
import json
import math
import operator
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files

METRICS, EVENTS, TENSORBOARD = "metrics.jsonl", "events.jsonl", "tensorboard"

# These stay when a run goes back to an earlier step: they happened, and will not happen again.
_HISTORY = ("resumed", "stopped", "wandb")
_BEGINNING = b'{"step": '
_NOT_FINITE = ("nan", "inf", "-inf")
_REMEDY = {
    "TensorBoard": "; it is written with pip install 'llava-jax[metrics]'",
    "W&B": "; it comes with pip install wandb",
}
_EVERY = 60.0  # seconds
_MOST_TIME = 0.01  # of a run, for writing what lies in a bucket


class History(NamedTuple):
    """steps: {"step": 0, "loss": …}; events: {"step": …, "kind": …, "time": …, and its facts}."""

    steps: list[dict[str, float]]
    events: list[dict[str, Any]]


def read(workdir: str | os.PathLike[str]) -> History:
    """What a run has told so far; nothing if there is none. Also while it runs."""
    folder = files.path(workdir)
    steps = _records(folder / METRICS, _is_step)
    events = _records(folder / EVENTS, _is_event)

    def number(value: float | str) -> float:
        return float(value) if isinstance(value, str) else value

    numbers = [{name: number(value) for name, value in record.items()} for _, record in steps]
    return History(numbers, [record for _, record in events])


class Log:
    """resume_at: the step that will be done next; what was told of it and later ones is removed, so
    that the file of a run that was killed has each step once.

    tensorboard: also for TensorBoard. wandb: also to this project of W&B, under the run's old id.
    Both are extras: whatever fails in them turns them off with a note. run: the config, for W&B.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_at: int,
        tensorboard: bool,
        wandb: str = "",
        run: Mapping[str, Any] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ):
        folder = files.path(workdir)
        # Both are read before either is changed: one of them may not be ours.
        steps = _records(folder / METRICS, _is_step)
        events = _records(folder / EVENTS, _is_event)
        self._next = resume_at
        self._clock, self._last_flush, self._wait = clock, clock(), _EVERY
        steps = [line for line, record in steps if record["step"] < resume_at]
        self._steps = _Lines(folder / METRICS, steps)
        events = [e for e in events if e[1]["step"] < resume_at or e[1]["kind"] in _HISTORY]
        self._events = _Lines(folder / EVENTS, [line for line, _ in events])
        self._extras: dict[str, Any] = {}
        if tensorboard:
            self._add("TensorBoard", lambda: _TensorBoard(folder / TENSORBOARD, resume_at))
        if wandb:
            known = [record["id"] for _, record in events if record.get("project") == wandb]
            name = known[-1] if known else uuid.uuid4().hex[:12]
            self._add("W&B", lambda: _Wandb(wandb, name, folder, run))
            if "W&B" in self._extras and not known:
                self.event(resume_at, "wandb", project=wandb, id=name)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._tell_all(lambda extra: extra.close())
        # The error of a failing run is told, not the one that came of it.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._steps.close()
            self._events.close()

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl. Each step is told once, in order."""
        assert number >= self._next, f"step {number} after step {self._next - 1}"
        assert "step" not in values, values
        self._next = number + 1
        plain = {name: v if type(v) is int else float(v) for name, v in values.items()}
        self._steps.append({"step": number, **plain})
        self._tell_all(lambda extra: extra.numbers(number, plain))
        if self._clock() - self._last_flush > self._wait:
            self.flush()

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Something that happened after a step. facts: numbers, texts, lists and dicts of them."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._events.append({"step": step, "kind": kind, "time": now, **facts})
        numbers = {f"{kind}/{name}": v for name, v in facts.items() if isinstance(v, float | int)}
        others = {name: v for name, v in facts.items() if f"{kind}/{name}" not in numbers}
        if numbers:
            self._tell_all(lambda extra: extra.numbers(step, numbers))
        if others:
            self._tell("TensorBoard", lambda extra: extra.text(step, kind, others))

    def flush(self) -> None:
        """Brings all that was told so far to its disk or bucket: before a checkpoint counts, so
        that a run that goes on from it lacks nothing. A bucket that fails is tried again later."""
        start = self._clock()
        self._steps.flush()
        self._events.flush()
        self._tell("TensorBoard", lambda extra: extra.flush())
        self._last_flush = self._clock()
        self._wait = max(_EVERY, (self._last_flush - start) / _MOST_TIME)

    def _add(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self._extras[name] = make()
        except (Exception, SystemExit) as error:
            remedy = _REMEDY[name] if isinstance(error, ModuleNotFoundError) else ""
            _note(f"{name} is off: {_short(error)}{remedy}")

    def _tell_all(self, do: Callable[[Any], None]) -> None:
        for name in list(self._extras):
            self._tell(name, do)

    def _tell(self, name: str, do: Callable[[Any], None]) -> None:
        if name not in self._extras:
            return
        try:
            do(self._extras[name])
        except (Exception, SystemExit) as error:
            del self._extras[name]
            _note(f"{name} is off from here on: {_short(error)}")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _short(error: BaseException) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class _Lines:
    """A file that grows by lines of JSON; see the module's docstring for how."""

    def __init__(self, path: epath.Path, lines: list[bytes]):
        self._path = path
        data = b"".join(line + b"\n" for line in lines)
        if not path.exists() or path.read_bytes() != data:
            files.write_bytes(path, data)
        self._held, self._fresh = bytearray(data), False
        self._file = None if _is_remote(path) else os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, record: Mapping[str, Any]) -> None:
        line = _line(record)
        if self._file is None:
            self._held += line
            self._fresh = True
            return
        while line:
            with _naming(self._path):
                line = line[os.write(self._file, line) :]

    def flush(self) -> None:
        if self._file is not None:
            with _naming(self._path):
                os.fsync(self._file)
        elif self._fresh:
            with _tried_again(self._path):
                files.write_bytes(self._path, bytes(self._held))
                self._fresh = False

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            os.close(self._file)
        elif self._fresh:
            files.write_bytes(self._path, bytes(self._held))


@contextlib.contextmanager
def _tried_again(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # buckets' clients have kinds of their own
        _note(f"{path} is not up to date, and tried again later: {_short(error)}")


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """A system call knows a descriptor only; who reads its error wants the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _line(record: Mapping[str, Any]) -> bytes:
    plain = operator.methodcaller("tolist")  # of NumPy's and JAX's
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=plain)
        return text.encode() + b"\n"
    except (UnicodeEncodeError, ValueError):  # half a character; what is not finite
        return json.dumps(_legal(record), allow_nan=False, default=plain).encode() + b"\n"


def _legal(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _legal(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(inside) for inside in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


_Records = list[tuple[bytes, dict[str, Any]]]


def _records(path: epath.Path, is_ours: Callable[[Any], bool]) -> _Records:
    """The lines and what they say, without the half line that a killed run may leave at the end."""
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    last = last.rstrip(b"\0")  # a disk that lost power has them
    if _parsed(last, is_ours) is not None or not _BEGINNING.startswith(last[: len(_BEGINNING)]):
        lines.append(last)
    records = []
    for number, line in enumerate(lines, 1):
        record = _parsed(line, is_ours)
        if record is None:
            raise ValueError(
                f"{path}, line {number}: got {line[:60]!r}, expected a line that a run of "
                "llava_jax wrote; move the file away, or choose another workdir"
            )
        records.append((line, record))
    return records


def _parsed(line: bytes, is_ours: Callable[[Any], bool]) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    ours = isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0
    return record if ours and is_ours(record) else None


def _is_step(record: Mapping[str, Any]) -> bool:
    return all(
        type(value) in (int, float) or (isinstance(value, str) and value in _NOT_FINITE)
        for value in record.values()
    )


def _is_event(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("kind"), str)


class _TensorBoard:
    """Event files without TensorFlow. A reader forgets what older files say of later steps."""

    def __init__(self, folder: epath.Path, resume_at: int):
        # Not its SummaryWriter: that one's queue is not empty after a flush.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter

        self._summary: Any = summary
        self._events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._local = tempfile.TemporaryDirectory() if _is_remote(folder) else None
        where = Path(self._local.name if self._local else str(folder))
        where.mkdir(exist_ok=True)
        # Its own names have seconds: of two runs within one, the second would erase the first.
        suffix = f".{time.time_ns()}"
        self._writer = EventsWriter(str(where / "events"), suffix)
        (self._file,) = where.glob(f"*{suffix}")
        self._remote = folder / self._file.name if self._local else None
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=resume_at, session_log=start)

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), **fields))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        pairs = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": pairs})

    def text(self, step: int, kind: str, facts: Mapping[str, Any]) -> None:
        told = _line(facts).decode()
        # Indented, Markdown takes it for code: text that comes as it is.
        self._write(step=step, summary=self._summary.text(kind, f"    {told}"))

    def flush(self) -> None:
        self._writer.flush()
        if self._remote is not None:
            with _tried_again(self._remote):
                files.write_bytes(self._remote, self._file.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._local is not None:
            self._local.cleanup()


class _Wandb:
    """Gets the numbers; texts are in events.jsonl and on the page."""

    def __init__(self, project: str, name: str, folder: epath.Path, run: Mapping[str, Any]):
        import wandb

        where = {} if _is_remote(folder) else {"dir": str(folder)}
        self._run = wandb.init(
            project=project, id=name, resume="allow", name=folder.name, config=dict(run), **where
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Clock:
    """Where a loop's time goes: its laps, and of them the wait for input.

    Devices work on while the loop goes ahead of them. So a lap is a step's time where the loop,
    once a lap, fetches a number of the step before.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.restart()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def lap(self) -> dict[str, float]:
        now = self._clock()
        seconds = {"seconds_step": now - self._start, "seconds_input": self._waited}
        self._start, self._waited = now, 0.0
        return seconds

    def restart(self) -> None:
        """What was done since the last lap (a held-out loss, a save) is of no step."""
        self._start, self._waited = self._clock(), 0.0
