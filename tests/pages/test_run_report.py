"""The page of a run: read back, it says what the run told, and hides nothing of a long one."""

import math

import numpy as np
import pytest

from llava_jax.pages import run_report
from llava_jax.pages.run_report import Part, Question
from tests.pages.reading import HOSTILE, Element, Reading

PICTURE = "data:image/png;base64,AAAA"


def page(**other) -> Reading:
    parts = {
        "title": "t",
        "command": "python launch/train.py",
        "facts": {},
        "total": 100,
        "steps": [],
        "events": [],
        "parts": [],
        "questions": [],
        "config": {},
        **other,
    }
    return Reading(run_report.page(**parts))


def steps(count: int, **more) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "step": i,
            "loss": 2.0 + 0.1 * rng.standard_normal(),
            "loss/a": 1.5,
            "lr": 1e-5,
            "norm": 1.0,
            "seconds_step": 0.5,
            "seconds_input": 0.01,
            "tokens_per_s": 1000.0,
            "real_tokens_per_s": 900.0,
            "images_per_s": 12.0,
            "skipped_steps": 0,
            "dropped": 0,
            **more,
        }
        for i in range(count)
    ]


def event(step: int, kind: str, **facts) -> dict:
    return {"step": step, "kind": kind, "time": "2026-11-21T18:27:04+00:00", **facts}


def tiles(reading: Reading) -> dict[str, str]:
    (dl,) = reading.of("dl", "tiles")
    inside = [e for e in reading.elements if dl in e.inside]
    names = [e.text for e in inside if e.tag == "dt"]
    return dict(zip(names, [e.text for e in inside if e.tag == "dd"], strict=True))


def plot(reading: Reading, title: str) -> list[Element]:
    (figure,) = [
        e
        for e in reading.of("figure", "plot")
        if any(b.tag == "b" and b.text == title and e in b.inside for b in reading.elements)
    ]
    return [e for e in reading.elements if figure in e.inside]


def drawn(elements: list[Element], class_: str) -> list[str]:
    """Of lines, not of their keys."""
    return [
        e.attributes["d"]
        for e in elements
        if e.attributes.get("class") == class_ and not e.within("span", "key")
    ]


def rows(reading: Reading, section: str) -> list[list[str]]:
    (element,) = [e for e in reading.elements if e.attributes.get("id") == section]
    inside = [e for e in reading.elements if element in e.inside]
    return [
        [e.text for e in inside if e.tag == "td" and row in e.inside]
        for row in inside
        if row.tag == "tr" and not row.within("thead")
    ]


def test_tiles():
    told = steps(60, mfu=0.5, memory_bytes=5e9)
    for i, step in enumerate(told):
        step["loss"] = 9.0 if i < 10 else 2.0 + i % 2
        step["skipped_steps"], step["dropped"] = i // 20, i // 30
    told[59] |= {"loss": math.nan, "seconds_step": 100.0, "memory_bytes": 4e9}
    told[58] |= {"real_tokens_per_s": 1.0, "memory_bytes": 6e9}
    events = [event(9, "held_out", loss=8.5), event(49, "held_out", loss=2.125)]
    assert tiles(page(steps=told, events=events, total=160)) == {
        "steps": "60of 160",
        "time in steps": "2 min 10 sabout 0 min 50 s to go",  # 59 / 2 + 100
        "loss": "2.49mean of 50 steps",  # 25 times 2 and 24 times 3
        "held-out loss": "2.12at step 49",
        "tokens/s": "900median of 50 steps",
        "images/s": "12median of 50 steps",
        "MFU": "50 %median of 50 steps",
        "device memory": "6 GBthe most of any step",
        "skipped steps": "2so far",
        "dropped examples": "1so far",
    }
    assert "MFU" not in tiles(page(steps=steps(3)))
    assert tiles(page(steps=steps(3), total=3))["time in steps"] == "0 min 02 snone to go"


def test_a_run_that_has_not_begun():
    reading = page()
    assert tiles(reading)["steps"] == "0of 100"
    assert "Nothing but steps." in reading.of("main")[0].text
    assert len(reading.of("figure", "plot")) == 5


def test_a_spike_of_a_long_run_is_seen():
    told = steps(20_000)
    told[12_345]["loss"] = 25.0
    told[777]["loss"] = math.nan
    elements = plot(page(steps=told), "Loss")
    (raw,) = drawn(elements, "series series-0 faint")
    (mean,) = drawn(elements, "series series-0")
    points = np.array([p.split() for p in raw.replace("M", "L").split("L")[1:]], float)
    assert len(points) <= 1010
    top = points[points[:, 1].argmin()]
    assert (points[:, 1] < top[1] + 100).sum() == 1
    # Between the places of steps 0 and 19,999.
    left, right = points[:, 0].min(), points[:, 0].max()
    assert (top[0] - left) / (right - left) == pytest.approx(12_345 / 19_999, abs=2e-3)
    assert len(mean) < 20_000
    (words,) = [e.text for e in elements if e.tag == "figcaption"]
    assert "to 25, " in words
    assert "1 points not drawable" in words


def test_the_mean_is_of_the_steps_around():
    told = steps(1000)
    for i, step in enumerate(told):
        step["loss"] = math.nan if i == 500 else float(i)
    shown = run_report._smoothed(told, "loss", 10)
    assert list(shown) == ["each step", "mean of 21"]
    xs, means = shown["mean of 21"]
    np.testing.assert_array_equal(xs, range(1000))
    expected = [np.nanmean(shown["each step"][1][max(0, i - 10) : i + 11]) for i in range(1000)]
    np.testing.assert_allclose(means, expected, rtol=1e-12)


def test_a_short_run_is_drawn_step_by_step():
    elements = plot(page(steps=steps(3)), "Loss")
    assert len(drawn(elements, "series series-0")) == 1
    assert not drawn(elements, "series series-0 faint")


def test_held_out_points_and_resumed_places():
    events = [event(2, "held_out", loss=3.0), event(5, "resumed"), event(7, "held_out", loss="nan")]
    reading = page(steps=steps(10), events=events)
    elements = plot(reading, "Loss")
    (dots,) = drawn(elements, "series series-1 dots")
    assert dots.count("M") == 1  # the other is no number
    (mark,) = drawn(elements, "mark")
    # Step 5 of 0 to 9, between 62 and 422.
    assert float(mark[1:].split()[0]) == pytest.approx(62 + 360 * 5 / 9, abs=0.1)
    keys = [e.text for e in elements if e.tag == "span"]
    assert keys == ["steps", "held out", "resumed"]
    assert drawn(plot(reading, "Learning rate"), "mark")


def test_each_source_has_its_line():
    told = steps(5)
    for step in told:
        step |= {f"loss/s{i}": float(i) for i in range(8)}
    told[2].pop("loss/a")
    reading = page(steps=told)
    first, second = (plot(reading, f"Loss by source, {of}") for of in ("1 to 6", "7 to 9"))
    names = [[e.text for e in elements if e.tag == "span"] for elements in (first, second)]
    assert names == [["a", "s0", "s1", "s2", "s3", "s4"], ["s5", "s6", "s7"]]


def test_a_step_that_compiles_leaves_the_others_their_height():
    told = steps(100)
    told[0]["seconds_step"] = 60.0
    (line,) = drawn(plot(page(steps=told), "Time of a step (up to 2)"), "series series-0")
    heights = [float(point.split()[1]) for point in line[1:].replace("M", "L").split("L")]
    # The axis is 168 high and ends at 2: half a second is a quarter of it.
    assert max(heights) == pytest.approx(196 - 168 / 4, abs=0.1)
    assert min(heights) == 28


def test_what_trains():
    parts = [
        Part("projector", 1234567, True, "float32", 1_234_567),
        Part("vision", 12, False, "bfloat16", 13_500_000_000),
    ]
    assert rows(page(parts=parts), "parts") == [
        ["projector", "1,234,567", "trains", "float32", "1.23 MB"],
        ["vision", "12", "frozen", "bfloat16", "13.5 GB"],
    ]


def test_answers_over_time():
    questions = [Question(PICTURE, "What?", "A cat"), Question("", "1 + 1?", "2")]
    events = [
        event(at, "answers", answers=answers)
        for at, answers in ((9, ["a", "2"]), (19, ["a", "2"]), (29, ["a cat.", "3"]))
    ]
    reading = page(questions=questions, events=events)
    assert rows(reading, "answers") == [
        ["9 to 19", "a"],
        ["29", "a cat. ✓"],
        ["9 to 19", "2 ✓"],
        ["29", "3"],
    ]
    images = [e.attributes["src"] for e in reading.elements if e.tag == "img"]
    assert images == [PICTURE]
    assert "expected: A cat" in reading.of("article", "sample")[0].text
    assert not rows(reading, "events")
    with pytest.raises(AssertionError):
        page(questions=[Question("https://example.com/a.png", "", "")])


def test_what_happened():
    told = [
        event(9, "saved", seconds=1.5),
        event(19, "held_out", loss=1.0),
        event(19, "saved", seconds=2.5),
        event(21, "not_finite", examples=[f"coco/{i}" for i in range(25)]),
        event(29, "saved", seconds=3.5),
    ]
    when = "2026-11-21 18:27:04 UTC"
    examples = ", ".join(f"coco/{i}" for i in range(20)) + " and 5 more"
    assert rows(page(events=told), "events") == [
        ["19", when, "saved", "seconds: 2.5"],
        ["21", when, "not finite", f"examples: {examples}"],
        ["29", when, "saved", "seconds: 3.5"],
    ]
    many = page(events=[event(i, "dropped", example=str(i)) for i in range(250)])
    assert len(rows(many, "events")) == 200
    assert rows(many, "events")[-1][3] == "example: 249"
    assert "50 more" in many.of("main")[0].text


def test_the_config_and_how_to_go_on():
    config = {"seed": 1, "data": {"sources": {"a": {"path": "x.json"}}, "images": ("p", "q")}}
    reading = page(config=config, command="python launch/train.py --workdir 'a b'")
    assert rows(reading, "config") == [
        ["seed", "1"],
        ["data.sources.a.path", "x.json"],
        ["data.images", "('p', 'q')"],
    ]
    assert [e.text for e in reading.elements if e.tag == "pre"] == [
        "python launch/train.py --workdir 'a b'"
    ]


def test_hostile_text_everywhere():
    for text in HOSTILE:
        reading = page(
            title=text,
            command=text,
            facts={text: text},
            steps=steps(3, **{f"loss/{text}": 1.0}),
            events=[
                event(1, "answers", answers=[text]),
                event(1, text, **{text: text, "list": [text]}),
                {**event(1, "saved"), "time": text},
            ],
            parts=[Part(text, 1, True, text, 1)],
            questions=[Question(PICTURE, text, text)],
            config={text: {text: text}},
        )
        assert len([e for e in reading.elements if e.tag == "script"]) == 1
        assert len([e for e in reading.elements if e.tag == "img"]) == 1
