"""The page of the demonstration: read back, it says what was measured."""

from typing import Any

import numpy as np
import pytest

from llava_jax.pages import demo
from llava_jax.pages.demo import Exam, Sample, Stage, Step
from llava_jax.pages.run_report import Part
from tests.pages.reading import HOSTILE, Reading

GROUPS = {"one in many": ("colour", "shape"), "one of two": ("size",)}
SCORES = {
    "the model": {
        "one in many": (170, 200, 0.025),
        "one of two": (60, 100, 0.05),
        "colour": (90, 100, 0.03),
        "shape": (80, 100, 0.04),
        "size": (60, 100, 0.05),
    },
    "mean picture": {
        "one in many": (50, 200, 0.03),
        "one of two": (51, 100, 0.05),
        "colour": (30, 100, 0.05),
        "shape": (20, 100, 0.04),
        "size": (51, 100, 0.05),
    },
    "usual answer": {
        "one in many": (60, 200, 0.03),
        "one of two": (49, 100, 0.05),
        "colour": (20, 100, 0.04),
        "shape": (40, 100, 0.05),
        "size": (49, 100, 0.05),
    },
}


def stage(name: str, *, resumed: bool = False) -> Stage:
    events: list[dict[str, Any]] = [
        {"step": 9, "kind": "held_out", "loss": 2.5},
        {"step": 19, "kind": "held_out", "loss": 1.5},
        {"step": 19, "kind": "saved"},
    ]
    events += [{"step": 12, "kind": "resumed"}] * resumed
    return Stage(
        name,
        "what it is for",
        [{"step": i, "loss": 3.0 - i / 10} for i in range(20)],
        events,
        [
            Part("vision", 1000, False, "float32", 4000),
            Part("projector", 200, True, "float32", 800),
            Part("language/embed", 3000, name == "stage 2", "float32", 12000),
        ],
    )


def sample(**changes: Any) -> Sample:
    facts = {
        "pixel_HW3": np.full((48, 40, 3), 90, np.uint8),
        "category": "colour",
        "question": "what colour is the ring?",
        "expected": "red",
        "answer": "red",
        "right": True,
        "blind": ("mean picture", "blue"),
        **changes,
    }
    return Sample(**facts)


def page(**other: Any) -> Reading:
    parts = {
        "steps": [Step("stage 1", "captions", "python a", 61.4), Step("answers", "asks", "", 5.0)],
        "stages": [stage("stage 1"), stage("stage 2", resumed=True)],
        "exams": [Exam("Unseen scenes", "asked once", SCORES)],
        "groups": GROUPS,
        "samples": [sample(), sample(answer="blue", right=False)],
        "rule": "the first of each",
        "facts": {"pictures": 2000},
        "go_on": "python b",
        **other,
    }
    return Reading(demo.page(**parts))


def section(reading: Reading, name: str):
    (found,) = [e for e in reading.elements if e.attributes.get("id") == name]
    return [e for e in reading.elements if found in e.inside]


def rows(reading: Reading, name: str) -> list[list[str]]:
    inside = section(reading, name)
    return [
        [e.text for e in inside if e.tag == "td" and row in e.inside]
        for row in inside
        if row.tag == "tr" and not row.within("thead")
    ]


def test_what_came_out():
    inside = section(page(), "result")
    texts = [e.text for e in inside if e.tag in ("dt", "dd")]
    assert texts == [
        "Unseen scenes: one in many",
        "85.0 %± 2.5 %; the best blind row 30.0 %",
        "Unseen scenes: one of two",
        "60.0 %± 5.0 %; the best blind row 51.0 %",
        "time",
        "1 min 06 sall steps together",
    ]


def test_scores_of_every_row():
    reading = page()
    assert rows(reading, "exam-1") == [
        ["all", "200", "85.0 %", "25.0 %", "30.0 %", "2.5 %"],
        ["colour", "100", "90.0 %", "30.0 %", "20.0 %", "3.0 %"],
        ["shape", "100", "80.0 %", "20.0 %", "40.0 %", "4.0 %"],
        ["all", "100", "60.0 %", "51.0 %", "49.0 %", "5.0 %"],
        ["size", "100", "60.0 %", "51.0 %", "49.0 %", "5.0 %"],
    ]
    heads = [e.text for e in section(reading, "exam-1") if e.tag == "th"][:6]
    assert heads == ["category", "questions", *SCORES, "error of the first"]


def test_a_category_that_was_not_asked_is_left_out():
    scores = {
        row: {name: told for name, told in score.items() if name not in ("size", "one of two")}
        for row, score in SCORES.items()
    }
    reading = page(exams=[Exam("e", "", scores)])
    assert [row[0] for row in rows(reading, "exam-1")] == ["all", "colour", "shape"]
    assert "one of two" not in reading.of("main")[0].text


def test_times():
    inside = section(page(), "done")
    bars = [float(e.attributes["width"]) for e in inside if e.tag == "rect"]
    assert bars[0] / bars[1] == pytest.approx(61.4 / 5, rel=1e-3)
    assert bars[0] == 230  # the longest has all the room
    told = [e.text for e in inside if e.tag == "text"]
    assert told == ["stage 1", "1 min 01 s", "answers", "5 s"]
    assert [e.text for e in inside if e.tag == "pre"] == ["python a"]


def test_curves():
    inside = section(page(), "learning")
    captions = [e.text for e in inside if e.tag == "figcaption"]
    assert all("learned from: 1.1 to 3, last 1.1" in text for text in captions)
    assert all("captions held out: 1.5 to 2.5, last 1.5" in text for text in captions)
    assert ["resumed: 12" in text for text in captions] == [False, True]


def test_right_and_wrong_are_words():
    reading = page()
    right, wrong = (e.text for e in reading.of("article", "sample"))
    assert right == "what colour is the ring?the model: red ✓ rightmean picture: blue"
    assert wrong == (
        "what colour is the ring?the model: blue ✗ wrongexpected: redmean picture: blue"
    )
    assert "the first of each" in "".join(e.text for e in section(reading, "pictures"))
    assert [e.attributes["alt"] for e in reading.elements if e.tag == "img"] == [
        "what the question of colour is about"
    ] * 2
    # Enlarged by a whole number, so that pixels stay pixels.
    assert {e.attributes["width"] for e in reading.elements if e.tag == "img"} == {"120"}


def test_what_trained():
    assert rows(page(), "parts") == [
        ["vision", "1,000", "frozen", "frozen"],
        ["projector", "200", "trains", "trains"],
        ["language/embed", "3,000", "frozen", "trains"],
        ["trained in all", "", "200", "3,200"],
    ]


def test_hostile_text_everywhere():
    for text in HOSTILE:
        reading = page(
            steps=[Step(text, text, text, 1.0)],
            exams=[Exam(text, text, {text: SCORES["the model"]})],
            samples=[
                sample(question=text, expected=text, answer=text, right=False, blind=(text, text))
            ],
            rule=text,
            facts={text: text},
            go_on=text,
        )
        assert len([e for e in reading.elements if e.tag == "script"]) == 1
        assert len([e for e in reading.elements if e.tag == "img"]) == 1


def test_a_demonstration_of_nothing():
    exams = [Exam("e", "", {"the model": {}})]
    assert "Go on" in page(steps=[], stages=[], exams=exams, samples=[]).of("main")[0].text
