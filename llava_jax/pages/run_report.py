"""The page of a training run: how far, how well, how fast, what it says, what happened.

>>> history = metrics.read(workdir)
>>> html = page(title="…", steps=history.steps, events=history.events, total=5197, …)

What it looks for in the steps: loss, loss/SOURCE, lr, norm, seconds_step, seconds_input,
tokens_per_s (padding counted), real_tokens_per_s, images_per_s, mfu, memory_bytes, skipped_steps
and dropped (totals). Among events: held_out with its `loss`, answers with its `answers` in the
order of the questions, resumed. Any other is in the list of what happened.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llava_jax.pages import plots
from llava_jax.pages.markup import Html, element, number, one_line
from llava_jax.pages.page import Section, document, table
from llava_jax.pages.page import facts as listed

Steps = Sequence[Mapping[str, float]]
Events = Sequence[Mapping[str, Any]]

_LATELY = 50  # steps
_LINES = 6  # of a plot
_EVENTS = 200
_ITEMS = 20
_WIDE = 20  # a range this many times its lowest value is drawn logarithmically


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model. bytes: on each device."""

    name: str
    parameters: int
    trains: bool
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Question:
    """Asked again and again while the model learns. picture: a data: URI, or nothing."""

    picture: str
    question: str
    expected: str


def page(
    *,
    title: str,
    command: str,
    facts: Mapping[str, str | float],
    total: int,
    steps: Steps,
    events: Events,
    parts: Sequence[Part],
    questions: Sequence[Question],
    config: Mapping[str, Any],
) -> str:
    """The page. command: what goes on with the run. total: the steps it will have. config: of the
    run, sections within sections."""
    done = f"{number(_done(steps))} of {number(total)} steps"
    sections = [
        Section(
            "now", "Now", element("div", _tiles(steps, events, total), listed([*facts.items()]))
        ),
        Section("curves", "Curves", _curves(steps, events)),
        Section("answers", "Answers", _answers(questions, events)),
        Section("parts", "What trains", _parts(parts)),
        Section("events", "What happened", _events(events)),
        Section("config", "Config", _config(command, config)),
    ]
    return document(title, sections, lead=f"A training run, {done} done.")


def _done(steps: Steps) -> int:
    return int(steps[-1]["step"]) + 1 if steps else 0


# Tiles.


def _tiles(steps: Steps, events: Events, total: int) -> Html:
    done, lately = _done(steps), steps[-_LATELY:]
    of = f"of {len(lately)} steps"
    seconds = float(np.nansum(_column(steps, "seconds_step")[1]))
    tiles = [
        ("steps", number(done), f"of {number(total)}"),
        ("time in steps", _duration(seconds), _left(lately, total - done)),
        ("loss", _middle(lately, "loss", np.mean), f"mean {of}"),
    ]
    held_out = [event for event in events if event["kind"] == "held_out"]
    if held_out:
        last = held_out[-1]
        tiles.append(
            ("held-out loss", number(float(last["loss"])), f"at step {number(last['step'])}")
        )
    for name, label, scale, unit in (
        ("real_tokens_per_s", "tokens/s", 1, ""),
        ("images_per_s", "images/s", 1, ""),
        ("mfu", "MFU", 100, " %"),
    ):
        if any(name in step for step in lately):
            tiles.append((label, _middle(lately, name, np.median, scale) + unit, f"median {of}"))
    memory = _column(steps, "memory_bytes")[1]
    if memory.size:
        tiles.append(("device memory", _bytes(float(memory.max())), "the most of any step"))
    for name, label in (("skipped_steps", "skipped steps"), ("dropped", "dropped examples")):
        totals = _column(steps, name)[1]
        tiles.append((label, number(totals[-1] if totals.size else 0.0), "so far"))
    return element(
        "dl",
        *(
            element(
                "div", element("dt", label), element("dd", value, element("small", below or "–"))
            )
            for label, value, below in tiles
        ),
        class_="tiles",
    )


def _middle(steps: Steps, name: str, of: Callable[[np.ndarray], Any], scale: float = 1) -> str:
    values = _column(steps, name)[1]
    values = values[np.isfinite(values)]
    return number(float(f"{scale * of(values):.4g}")) if values.size else "–"


def _left(lately: Steps, steps: int) -> str:
    seconds = _column(lately, "seconds_step")[1]
    if steps == 0:
        return "none to go"
    if not seconds.size:
        return ""
    return f"about {_duration(float(np.median(seconds)) * steps)} to go"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{number(float(f'{count / size:.3g}'))} {unit}"
    return f"{number(count)} B"


# Curves.


def _curves(steps: Steps, events: Events) -> Html:
    return element("div", *_plots(steps, events), class_="plots")


def _plots(steps: Steps, events: Events) -> Iterator[Html]:
    resumed = [float(event["step"]) for event in events if event["kind"] == "resumed"]
    around = max(1, len(steps) // 100)

    def plot(title: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]], y: str, **how: Any):
        title += " (logarithmic)" if how.get("log") else ""
        return plots.lines(series, title=title, x="step", y=y, marks=("resumed", resumed), **how)

    held_out = [event for event in events if event["kind"] == "held_out"]
    points = {
        "held out": (
            np.array([event["step"] for event in held_out], np.float64),
            np.array([float(event["loss"]) for event in held_out], np.float64),
        )
    }
    loss = {**_smoothed(steps, "loss", around), **(points if held_out else {})}
    yield plot("Loss", loss, "loss", log=_is_wide(loss), faint=["each step"], dots=["held out"])
    names = sorted({name for step in steps for name in step if name.startswith("loss/")})
    for first in range(0, len(names), _LINES):
        chosen = names[first : first + _LINES]
        smooth = {name: [*_smoothed(steps, name, around).values()][-1] for name in chosen}
        shown = {name.removeprefix("loss/"): xy for name, xy in smooth.items()}
        of = f", {first + 1} to {first + len(chosen)}" if len(names) > _LINES else ""
        yield plot(f"Loss by source{of}", shown, "loss", log=_is_wide(shown))
    yield plot("Learning rate", {"lr": _column(steps, "lr")}, "lr", from_zero=True)
    norm = _smoothed(steps, "norm", around)
    yield plot("Gradient norm", norm, "norm", log=_is_wide(norm), faint=["each step"])
    rates = {
        "real": _column(steps, "real_tokens_per_s"),
        "with padding": _column(steps, "tokens_per_s"),
    }
    yield plot("Tokens", rates, "tokens/s", from_zero=True)
    seconds = _column(steps, "seconds_step")
    times = {"whole step": seconds, "waiting for input": _column(steps, "seconds_input")}
    # A step that compiles takes a hundred times as long as any other.
    top = 4 * float(np.median(seconds[1])) if seconds[1].size else 0.0
    title = "Time of a step"
    if seconds[1].size and seconds[1].max() > top:
        title += f" (up to {number(float(f'{top:.2g}'))})"
    yield plot(title, times, "seconds", from_zero=True, top=top)
    if any("mfu" in step for step in steps):
        xs, ys = _column(steps, "mfu")
        yield plot("MFU", {"MFU": (xs, 100 * ys)}, "%", from_zero=True)


def _column(steps: Steps, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A value over the steps that have it."""
    found = [(step["step"], step[name]) for step in steps if name in step]
    both = np.array(found, np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _smoothed(steps: Steps, name: str, around: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each step, and the mean of the steps around it; of a short run, each step alone."""
    xs, ys = _column(steps, name)
    if around < 2:
        return {"steps": (xs, ys)}
    good = np.isfinite(ys)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, ys, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    middle = np.arange(len(ys))
    low, high = np.maximum(middle - around, 0), np.minimum(middle + around + 1, len(ys))
    with np.errstate(invalid="ignore"):
        means = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return {"each step": (xs, ys), f"mean of {2 * around + 1}": (xs, means)}


def _is_wide(series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bool:
    values = np.concatenate([np.empty(0), *(ys for _, ys in series.values())])
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() > _WIDE * values.min())


# What it says.


def _answers(questions: Sequence[Question], events: Events) -> Html:
    rounds = [event for event in events if event["kind"] == "answers"]
    if not questions:
        return element("p", "No questions were asked while it learned.")
    return element(
        "div",
        *(
            _sample(question, [(event["step"], event["answers"][i]) for event in rounds])
            for i, question in enumerate(questions)
        ),
        class_="samples",
    )


def _sample(question: Question, answers: Sequence[tuple[int, str]]) -> Html:
    assert question.picture.startswith("data:image/") or not question.picture
    shown = element("img", src=question.picture, alt="") if question.picture else ""
    told: list[tuple[list[int], str]] = []
    for step, answer in answers:
        if told and told[-1][1] == answer:
            told[-1][0].append(step)
        else:
            told.append(([step], answer))
    said = [
        [
            number(at[0]) if len(at) == 1 else f"{number(at[0])} to {number(at[-1])}",
            one_line(answer) + (" ✓" if _plain(answer) == _plain(question.expected) else ""),
        ]
        for at, answer in told
    ]
    return element(
        "article",
        element(
            "header",
            shown,
            element(
                "div",
                element("p", element("b", one_line(question.question))),
                element("p", f"expected: {one_line(question.expected)}", class_="soft"),
            ),
        ),
        table(["step", "answer"], said) if said else element("p", "Not asked yet.", class_="soft"),
        class_="sample",
    )


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").casefold()


# What trains, what happened, and how to go on.


def _parts(parts: Sequence[Part]) -> Html:
    rows = [
        [
            part.name,
            part.parameters,
            "trains" if part.trains else "frozen",
            part.dtype,
            _bytes(part.bytes),
        ]
        for part in parts
    ]
    return table(["part", "parameters", "training", "dtype", "on each device"], rows)


def _events(events: Events) -> Html:
    shown: list[Mapping[str, Any]] = []
    for event in events:
        if event["kind"] in ("answers", "held_out"):
            continue
        if shown and shown[-1]["kind"] == event["kind"] == "saved":
            shown.pop()  # of saves in a row, the last
        shown.append(event)
    if not shown:
        return element("p", "Nothing but steps.")
    left_out = len(shown) - _EVENTS
    rows = [
        [
            number(event["step"]),
            _clock(event["time"]),
            event["kind"].replace("_", " "),
            _told(event),
        ]
        for event in shown[-_EVENTS:]
    ]
    note = f"The last {_EVENTS}; events.jsonl has {number(left_out)} more."
    return element(
        "div",
        element("p", note, class_="soft") if left_out > 0 else "",
        table(["step", "when", "what", "more"], rows),
    )


def _clock(time: str) -> str:
    return time.replace("T", " ").replace("+00:00", " UTC")


def _told(event: Mapping[str, Any]) -> str:
    facts = [(name, fact) for name, fact in event.items() if name not in ("step", "time", "kind")]
    return "; ".join(f"{name.replace('_', ' ')}: {_value(fact)}" for name, fact in facts)


def _value(fact: Any) -> str:
    if isinstance(fact, list):
        more = f" and {len(fact) - _ITEMS:,} more" if len(fact) > _ITEMS else ""
        return ", ".join(map(_value, fact[:_ITEMS])) + more
    if isinstance(fact, float | int) and not isinstance(fact, bool):
        return number(fact)
    return one_line(str(fact))


def _config(command: str, config: Mapping[str, Any]) -> Html:
    rows = [[name, one_line(str(value))] for name, value in _flat(config, "")]
    return element(
        "div",
        element("p", "This goes on with the run, from its last checkpoint:"),
        element("pre", command, class_="command"),
        table(["field", "value"], rows),
    )


def _flat(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
