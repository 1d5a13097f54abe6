"""What a run says while it goes: a bar, metrics.jsonl and events.jsonl, TensorBoard, its pages.

All processes count alike, so that they stop alike; the first one writes.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
from etils import epath

from llava_jax import cli, files, flops, metrics, processes
from llava_jax import config as configs
from llava_jax.config import Config
from llava_jax.data import report
from llava_jax.data.dataset import Dataset
from llava_jax.data.pipeline import Read
from llava_jax.data.schedule import Schedule
from llava_jax.data.showing import readable
from llava_jax.data.skipped import Skipped
from llava_jax.held_out import Asked
from llava_jax.metrics import Clock
from llava_jax.optim import Part
from llava_jax.pages import inspection, run_report
from llava_jax.pages.page import data_uri
from llava_jax.program import Program
from llava_jax.step import Metrics

_MOST_SKIPPED = 5  # steps in a row of which nothing was learned, for it was not finite
_SHOWN_ROWS = 4


def say(*lines: str) -> None:
    """On a pod, once."""
    if processes.is_first():
        for line in lines:
            print(line, flush=True)


def progress(
    total: int, label: str, unit: str, *, done: int = 0
) -> contextlib.AbstractContextManager[Any]:
    return cli.Progress(total, label, unit, done=done) if processes.is_first() else _Quiet()


class _Quiet:
    """A bar that nobody sees."""

    def __enter__(self) -> "_Quiet":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, count: int = 1, note: str = "") -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A step handed to the devices, whose numbers are fetched when the next one is."""

    number: int
    result: Metrics
    read: Read


class Telling:
    """first: the step it begins with. skipped: steps before it that changed nothing. command: that
    goes on with the run. clock: its `waiting` goes around the wait for input."""

    def __init__(
        self,
        config: Config,
        workdir: epath.Path,
        dataset: Dataset,
        steps: Schedule,
        program: Program,
        parts: Sequence[Part],
        first: int,
        skipped: int,
        *,
        command: str,
        asked: Sequence[Asked] = (),
    ):
        self.clock, self.skipped = Clock(), skipped
        self._config, self._workdir, self._dataset, self._steps = config, workdir, dataset, steps
        self._parts, self._first, self._command = parts, first, command
        self._asked = asked
        self._costs = flops.costs(program.model.config, config.optim.trains)
        devices = program.layout.devices
        peak = flops.peak(devices[0])
        self._machine = f"{len(devices)} × {devices[0].device_kind}"
        self._peak = None if peak is None else peak * len(devices)
        self._in_a_row = 0
        self._waiting: _Waiting | None = None
        many = processes.count() > 1
        name = f"skipped-{processes.index()}.jsonl" if many else "skipped.jsonl"
        self._dropped = Skipped(workdir / name)
        self._log: metrics.Log | None = None
        self._bar: Any = None
        self._opened = contextlib.ExitStack()
        self._profile = self._opened.enter_context(contextlib.ExitStack())

    def __enter__(self) -> "Telling":
        log = self._config.log
        if processes.is_first():
            self._log = self._opened.enter_context(
                metrics.Log(
                    self._workdir,
                    resume_at=self._first,
                    tensorboard=log.tensorboard,
                    wandb=log.wandb,
                    run=configs.flat(self._config),
                )
            )
            if self._first:
                self._log.event(self._first, "resumed")
        return self

    def begin(self) -> None:
        """What comes now is training: the program is compiled, and the first batch is there."""
        last, profiled = len(self._steps) - 1, self._config.log.profile_at
        if profiled and not self._first <= profiled <= last:
            say(f"no profile: config.log.profile_at = {profiled}, steps {self._first} to {last}")
        bar = progress(len(self._steps), "training", "steps", done=self._first)
        self._bar = self._opened.enter_context(bar)
        self.clock.restart()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def step(self, number: int, result: Metrics, read: Read) -> None:
        """A step that is on its way. The one before has its numbers by now."""
        before, self._waiting = self._waiting, _Waiting(number, result, read)
        self._tell(before)

    def catch_up(self) -> None:
        """Waits for the last step's numbers: what is saved next comes after them."""
        before, self._waiting = self._waiting, None
        self._tell(before)

    def _tell(self, done: _Waiting | None) -> None:
        if done is None:
            return
        result = jax.device_get(done.result)
        times = self.clock.lap()
        self._count_skipped(done, bool(result.skipped))
        self._dropped.add(segment for row in done.read.segments for segment in row)
        if processes.count() == 1:
            self._dropped.check(self._dataset)
        self._bar.advance(1, f"loss {float(result.loss):.4f}")
        if self._log:
            self._log.step(done.number, self._values(done.number, result, times))

    def _values(self, number: int, result: Metrics, times: Mapping[str, float]) -> dict[str, float]:
        example_N = self._steps.step(number)
        length_N = self._dataset.tokens_N[example_N]
        real, images = int(length_N.sum()), int(self._dataset.pictures_N[example_N].sum())
        seconds = times["seconds_step"]
        values = {name: float(getattr(result, name)) for name in ("loss", "lr", "norm")}
        if len(self._dataset.names) > 1:
            values |= {
                f"loss/{name}": float(result.loss_S[i] / result.weight_S[i])
                for i, name in enumerate(self._dataset.names)
                if result.weight_S[i] > 0
            }
        row_tokens = self._steps.rows_per_step * self._config.batch.tokens
        values |= {
            "conversations": len(example_N),
            "tokens": real,
            "images": images,
            "skipped_steps": self.skipped,
            "dropped": len(self._dropped),
            **times,
            "tokens_per_s": row_tokens / seconds,
            "real_tokens_per_s": real / seconds,
            "images_per_s": images / seconds,
        }
        if self._peak is not None:
            pairs = flops.pairs_of(length_N.tolist())
            done = self._costs.step(tokens=real, pairs=pairs, images=images)
            values["mfu"] = done / seconds / self._peak
        return values | device_memory()

    def _count_skipped(self, done: _Waiting, skipped: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self.skipped += skipped
        if not skipped:
            return
        ids = self._ids(done.number)
        if self._log:
            self._log.event(done.number, "not_finite", examples=ids)
        if self._in_a_row >= _MOST_SKIPPED:
            raise ValueError(
                f"got {self._in_a_row} steps in a row whose loss or gradient is not finite, up to "
                f"step {done.number}, expected at most {_MOST_SKIPPED - 1}: nothing was learned of "
                f"them; their conversations are in {self._workdir / metrics.EVENTS}. Often "
                "config.optim.lr is too high, or a weight is not finite"
            )

    def _ids(self, number: int) -> list[str]:
        """The conversations of a step, of all hosts: source and id."""
        dataset, found = self._dataset, []
        for index in self._steps.step(number):
            name = dataset.names[dataset.source_N[index]]
            found.append(f"{name} {dataset.sources[name][int(dataset.entry_N[index])].id}")
        return found

    # What follows a step is told by the number of steps done.

    def saved(self, number: int) -> None:
        """All hosts come here alike, so all stop alike for what they dropped."""
        self._dropped.check(self._dataset, processes.sum_over_processes(len(self._dropped)))
        if self._log:
            self._log.event(number - 1, "saved")
        self._report()

    def stopped(self, number: int) -> None:
        if self._log:
            self._log.event(max(0, number - 1), "stopped")
        self._report()

    def held_out(self, number: int, losses: Mapping[str, float], answers: Sequence[str]) -> None:
        if self._log:
            self._log.event(number - 1, "held_out", **losses)
            if answers:
                ids = [asked.id for asked in self._asked]
                self._log.event(number - 1, "answers", answers=list(answers), ids=ids)
        self._report()
        self.clock.restart()

    def first_batch(self, read: Read) -> None:
        """The first rows, token by token, as a page."""
        if not processes.is_first():
            return
        shown = [
            readable(self._dataset, read, place, read.step * self._steps.rows_per_step + place)
            for place, segments in enumerate(read.segments)
            if segments
        ][:_SHOWN_ROWS]
        page = inspection.rows_page(f"The first rows of {self._config.name}", shown)
        files.write_text(self._workdir / "first_batch.html", page)

    def _report(self) -> None:
        """The page, as of now."""
        if not self._log:
            return
        self._log.flush()
        history = metrics.read(self._workdir)
        trained = sum(part.parameters for part in self._parts if part.trains)
        page = run_report.page(
            title=self._config.name,
            command=self._command,
            facts={
                "workdir": str(self._workdir),
                "devices": self._machine,
                "trains": f"{trained:,} parameters",
                **dict(report.steps(self._dataset, self._steps)),
            },
            total=len(self._steps),
            steps=history.steps,
            events=history.events,
            parts=[
                run_report.Part(
                    part.name,
                    part.parameters,
                    part.trains,
                    part.dtype,
                    part.weight_bytes + part.moment_bytes,
                )
                for part in self._parts
            ],
            questions=[
                run_report.Question(
                    data_uri(asked.pixels[0]) if asked.pixels else "",
                    asked.question.text,
                    asked.question.answer,
                )
                for asked in self._asked
            ],
            config=configs.flat(self._config),
        )
        files.write_text(self._workdir / "report.html", page)

    def profile(self, number: int) -> None:
        """Starts or ends the trace that the config asks for."""
        log = self._config.log
        if log.profile_at and number == log.profile_at:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._profile.callback(jax.profiler.stop_trace)
        if log.profile_at and number == log.profile_at + log.profile_steps:
            self.catch_up()
            self._profile.close()


def memory_of(step: Any) -> str:
    """What a compiled program takes of each device, where the compiler tells."""
    stats = step.memory_analysis()
    if not stats:
        return ""
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    return f", {total / 1e9:.2f} GB a device"


def device_memory() -> dict[str, int]:
    """Of this process' fullest device, in bytes: memory_bytes now, memory_peak_bytes so far,
    memory_limit_bytes. Empty where devices do not tell, as CPUs."""
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not told:
        return {}
    fullest = max(told, key=lambda stats: stats["bytes_in_use"])
    ours = ("memory_bytes", "memory_peak_bytes", "memory_limit_bytes")
    theirs = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    return {a: int(fullest[b]) for a, b in zip(ours, theirs, strict=True) if b in fullest}
