"""The page of the demonstration: what was done, what was learned, and what a blind one would say.

>>> html = page(steps=[Step("stage 1", "…", "python …", 61.0)], stages=[…], exams={…}, …)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_jax.pages import plots
from llava_jax.pages.markup import Html, element, join, number, one_line, share
from llava_jax.pages.page import Section, document, picture, table
from llava_jax.pages.page import facts as listed
from llava_jax.pages.run_report import Part

Score = Mapping[str, tuple[int, int, float]]  # by name: right answers, of how many, standard error

_ENLARGED = 144  # pixels, at least, for the longer side of a picture
_WIDTH, _BAR, _LEFT, _RIGHT = 440, 30, 120, 90  # of the plot of times


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of the demonstration. command: what does the same by hand."""

    name: str
    what: str
    command: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training run: what metrics.jsonl and events.jsonl tell of it, and what it is made of."""

    name: str
    what: str
    steps: Sequence[Mapping[str, float]]
    events: Sequence[Mapping[str, Any]]
    parts: Sequence[Part]


@dataclasses.dataclass(frozen=True)
class Exam:
    """Scores by row, the model's first; the others are blind."""

    title: str
    what: str
    scores: Mapping[str, Score]


@dataclasses.dataclass(frozen=True)
class Sample:
    """blind: what is said by the row of that name."""

    pixel_HW3: np.ndarray
    category: str
    question: str
    expected: str
    answer: str
    right: bool
    blind: tuple[str, str]


def page(
    *,
    steps: Sequence[Step],
    stages: Sequence[Stage],
    exams: Sequence[Exam],
    groups: Mapping[str, Sequence[str]],
    samples: Sequence[Sample],
    rule: str,
    facts: Mapping[str, str | float],
    go_on: str,
) -> str:
    """The page. groups: of categories, the one that counts first; scores have both by name.
    rule: how the samples were chosen. go_on: commands."""
    sections = [
        Section("result", "What came out", _result(exams, groups, steps)),
        Section("done", "What was done", _done(steps)),
        Section("learning", "How it learned", _learning(stages)),
        *(Section(f"exam-{i}", exam.title, _exam(exam, groups)) for i, exam in enumerate(exams, 1)),
        Section("pictures", "Pictures and answers", _gallery(samples, rule)),
        Section("parts", "What trained, what was frozen", _parts(stages)),
        Section("sizes", "Sizes", listed([*facts.items()])),
        Section("on", "Go on", element("pre", go_on, class_="command")),
    ]
    lead = (
        "A LLaVA in small, from nothing: a projector learns to say what a frozen vision tower "
        "sees, then it and the language model learn to answer. What is shown and asked here was "
        "not learned from."
    )
    return document("LLaVA on the picture world", sections, lead=lead)


# What came out.


def _result(
    exams: Sequence[Exam], groups: Mapping[str, Sequence[str]], steps: Sequence[Step]
) -> Html:
    tiles = []
    for exam in exams:
        own, *others = exam.scores.values()
        for group in groups:
            if group not in own:
                continue
            below = f"± {_percent(own[group][2])}"
            if others:
                blind = max(score[group][0] / score[group][1] for score in others)
                below += f"; the best blind row {_percent(blind)}"
            tiles.append((f"{exam.title}: {group}", share(*own[group][:2]), below))
    tiles.append(("time", duration(sum(step.seconds for step in steps)), "all steps together"))
    return element(
        "dl",
        *(
            element("div", element("dt", label), element("dd", value, element("small", below)))
            for label, value, below in tiles
        ),
        class_="tiles",
    )


def _percent(part: float) -> str:
    return share(part, 1)


def duration(seconds: float) -> str:
    """'42 s', '6 min 05 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# What was done.


def _done(steps: Sequence[Step]) -> Html:
    rows = [[step.name, step.what, duration(step.seconds)] for step in steps]
    commands = "\n".join(step.command for step in steps if step.command)
    return element(
        "div",
        element("div", _times(steps), class_="plots"),
        table(["step", "what it does", "time"], rows),
        element("p", "The same by hand:"),
        element("pre", commands, class_="command"),
    )


def _times(steps: Sequence[Step]) -> Html:
    """A bar for each step, its name before it and its time behind."""
    longest = max([step.seconds for step in steps], default=0.0) or 1.0
    bars, texts = [], []
    for i, step in enumerate(steps):
        y, width = i * _BAR, (_WIDTH - _LEFT - _RIGHT) * step.seconds / longest
        bars.append(element("rect", x=_LEFT, y=y + 5, width=round(width, 2) or 1, height=_BAR - 10))
        texts.append(element("text", step.name, x=_LEFT - 8, y=y + 20, text_anchor="end"))
        told = duration(step.seconds)
        texts.append(element("text", told, x=round(_LEFT + width + 6, 2), y=y + 20))
    words = ", ".join(f"{step.name} {duration(step.seconds)}" for step in steps)
    return element(
        "figure",
        element("b", "Time of each step"),
        element(
            "svg",
            element("g", *bars, class_="bars"),
            *texts,
            viewBox=f"0 0 {_WIDTH} {len(steps) * _BAR}",
            role="img",
            aria_label=f"Time of each step: {words}",
        ),
        class_="plot",
    )


# How it learned.


def _learning(stages: Sequence[Stage]) -> Html:
    told = [element("p", element("b", f"{stage.name}. "), stage.what) for stage in stages]
    return element("div", *told, element("div", *map(_losses, stages), class_="plots"))


def _losses(stage: Stage) -> Html:
    held_out = [event for event in stage.events if event["kind"] == "held_out"]
    lines = {"learned from": _points([(step["step"], step["loss"]) for step in stage.steps])}
    if held_out:
        lines["captions held out"] = _points([(e["step"], e["loss"]) for e in held_out])
    resumed = [float(event["step"]) for event in stage.events if event["kind"] == "resumed"]
    return plots.lines(
        lines,
        title=f"{stage.name}: loss",
        x="step",
        y="loss",
        from_zero=True,
        dots=["captions held out"],
        marks=("resumed", resumed),
    )


def _points(points: Sequence[tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    both = np.array([(float(x), float(y)) for x, y in points], np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


# Scores.


def _exam(exam: Exam, groups: Mapping[str, Sequence[str]]) -> Html:
    parts = [element("p", exam.what)]
    first = next(iter(exam.scores.values()))
    head = ["category", "questions", *exam.scores, "error of the first"]
    for group, categories in groups.items():
        names = [name for name in (group, *categories) if name in first]
        if not names:
            continue
        rows = [
            [
                "all" if name == group else name,
                number(first[name][1]),
                *(share(*score[name][:2]) for score in exam.scores.values()),
                _percent(first[name][2]),
            ]
            for name in names
        ]
        parts += [element("h3", f"Right answers, {group}"), table(head, rows)]
    return element("div", *parts)


# Pictures.


def _gallery(samples: Sequence[Sample], rule: str) -> Html:
    parts = [element("p", rule)]
    for right, title in ((True, "Right"), (False, "Wrong")):
        cards = [_card(sample) for sample in samples if sample.right is right]
        if cards:
            parts += [element("h3", title), element("div", *cards, class_="samples")]
    return element("div", *parts)


def _card(sample: Sample) -> Html:
    times = max(1, -(-_ENLARGED // max(sample.pixel_HW3.shape[:2])))
    enlarged_HW3 = sample.pixel_HW3.repeat(times, 0).repeat(times, 1)
    name, blind = sample.blind
    return element(
        "article",
        element(
            "header",
            picture(enlarged_HW3, alt=f"what the question of {sample.category} is about"),
            element(
                "div",
                element("p", element("b", one_line(sample.question))),
                element(
                    "p",
                    "the model: ",
                    element("b", one_line(sample.answer) or "(nothing)"),
                    " ✓ right" if sample.right else " ✗ wrong",
                ),
                "" if sample.right else element("p", f"expected: {one_line(sample.expected)}"),
                element("p", f"{name}: {one_line(blind)}", class_="soft"),
            ),
        ),
        class_="sample",
    )


# What is in it.


def _parts(stages: Sequence[Stage]) -> Html:
    parameters: dict[str, int] = {}
    for stage in stages:
        for name in dict.fromkeys(part.name for part in stage.parts):
            parameters[name] = sum(part.parameters for part in stage.parts if part.name == name)
    rows = [
        [name, number(count), *(_training(stage, name) for stage in stages)]
        for name, count in parameters.items()
    ]
    trained = [
        number(sum(part.parameters for part in stage.parts if part.trains)) for stage in stages
    ]
    rows.append(["trained in all", "", *trained])
    return table(["part", "parameters", *(stage.name for stage in stages)], rows)


def _training(stage: Stage, name: str) -> str:
    kinds = {part.trains for part in stage.parts if part.name == name}
    return join(*("trains" if kind else "frozen" for kind in sorted(kinds)), between=", ")
