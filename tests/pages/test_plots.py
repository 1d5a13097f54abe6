"""Plots say what the numbers say, whatever the numbers are."""

import itertools
import math
import re

import numpy as np
import pytest

from llava_jax.pages.plots import histogram, lines
from tests.pages.reading import Reading

STRANGE = {
    "empty": [],
    "one": [3],
    "constant": [0.1] * 4,
    "not finite": [math.nan, math.inf, -math.inf],
    "some not finite": [1, math.nan, 3],
    "huge": [1e300, -1e300, 1],
    "wide": [1, 1e50],
    "tiny": [0, 5e-324],
    "close": [1e16, 1e16 + 2],
    "far whole": [2**62, 2**62 + 4096],
    "zero": [-0.0, 0.0],
    "truth": [True, False],
}


def bars(plot) -> list[tuple[str, int, float]]:
    """Each bar's interval, count and height, from its title and its drawing."""
    found = []
    for rect in (e for e in Reading(plot).elements if e.tag == "rect"):
        ((interval, count),) = re.findall(r"^(.*): ([\d,]+) things$", rect.text)
        found.append((interval, int(count.replace(",", "")), float(rect.attributes["height"])))
    return found


def test_few_whole_numbers_have_a_bar_each():
    values = [1] * 50 + [2] * 25 + [5] * 100
    assert [bar[:2] for bar in bars(histogram(values, title="t", x="x", y="things"))] == [
        ("1", 50),
        ("2", 25),
        ("5", 100),
    ]


def test_bars_are_as_high_as_their_counts():
    values = np.random.default_rng(0).lognormal(6, 0.7, 5000).astype(int)
    found = bars(histogram(values, title="t", x="x", y="things"))
    assert sum(count for _, count, _ in found) == 5000
    for interval, count, _ in found:
        low, _, high = interval.replace(",", "").partition(" to ")
        assert np.count_nonzero((values >= int(low)) & (values <= int(high or low))) == count
    tallest = max(found, key=lambda bar: bar[1])
    for _, count, height in found:
        expected = max(1, tallest[2] * count / tallest[1])  # 1: a single one is still seen
        assert height == pytest.approx(expected, abs=0.02)


def test_a_logarithmic_axis_makes_equal_factors_equal_steps():
    values = [1] * 10 + [2] * 100 + [3] * 1000
    heights = [bar[2] for bar in bars(histogram(values, title="t", x="x", y="things", log=True))]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.02)


def test_no_bar_is_behind_the_largest_share():
    found = bars(histogram([60.3, 99.9, 100, 100], title="t", x="x", y="things"))
    assert [bar[:2] for bar in found] == [("60 to 61", 1), ("99 to 100", 3)]


def test_what_is_not_finite_is_counted():
    words = Reading(histogram([1, 2, math.nan, math.inf], title="t", x="x", y="y")).of("figcaption")
    assert "n 2 · " in words[0].text
    assert "2 not finite, left out" in words[0].text


@pytest.mark.parametrize(("kind", "log"), list(itertools.product(STRANGE, (False, True))))
def test_strange_numbers(kind, log):
    values = STRANGE[kind]
    Reading(histogram(values, title="<t>", x="<x>", y="<y>", log=log))
    for other in STRANGE.values():
        n = min(len(values), len(other))
        series = {"<a>": (values[:n], other[:n]), "empty": ([], [])}
        for e in Reading(lines(series, title="t", x="x", y="y", log=log)).elements:
            for name in ("d", "x", "y", "x1", "y1"):
                assert "nan" not in e.attributes.get(name, "")
                assert "inf" not in e.attributes.get(name, "")


def drawn(plot) -> list[np.ndarray]:
    """Strokes of the first line, as drawn: x and y of their points."""
    path = next(e for e in Reading(plot).elements if e.tag == "path").attributes["d"]
    return [
        np.array([point.split() for point in stroke.split("L")[1:]], float)
        for stroke in path.split("M")[1:]
    ]


def test_a_line_breaks_where_a_value_is_missing():
    xs, ys = [0, 1, 2, 3, 4], [0.0, 1.0, math.nan, 3.0, 4.0]
    plot = lines({"a": (xs, ys)}, title="t", x="x", y="y")
    first, second = drawn(plot)
    assert len(first) == len(second) == 2
    points = np.concatenate([first, second])
    # Equal steps of the value are equal steps on paper, and upwards is up.
    slope = np.diff(points, axis=0) / np.array([[1], [2], [1]])
    np.testing.assert_allclose(slope, np.broadcast_to(slope[:1], (3, 2)), atol=0.11)
    assert slope[0, 0] > 0 > slope[0, 1]
    assert "1 points not drawable" in plot


def test_of_many_points_no_peak_is_lost():
    ys = np.ones(100_000)
    ys[51_234], ys[77_777] = 9, -9
    plot = lines({"a": (np.arange(100_000), ys)}, title="t", x="x", y="y")
    (stroke,) = drawn(plot)
    flat = np.median(stroke[:, 1])
    assert (stroke[:, 1] < flat - 50).sum() == 1
    assert (stroke[:, 1] > flat + 50).sum() == 1
    assert len(plot) < 30_000


def test_lines_tell_their_values_and_differ_without_colour():
    steps = np.arange(10)
    plot = lines({"a": (steps, steps * 2), "b": (steps, -steps)}, title="t", x="step", y="y")
    reading = Reading(plot)
    titles = [e.text for e in reading.elements if e.tag == "title"]
    assert "a 18 at step 9; b -9 at step 9" in titles
    classes = [e.attributes["class"] for e in reading.elements if e.tag == "path"]
    assert classes == ["series series-0", "series series-1"] * 2  # drawn, then in the key


def test_faint_lines_dots_and_marks():
    steps = np.arange(10)
    plot = lines(
        {"raw": (steps, steps * 2), "mean": (steps, steps), "held": (steps[::3], steps[::3])},
        title="t",
        x="step",
        y="y",
        faint=["raw"],
        dots=["held"],
        marks=("<resumed>", [4.5, 99]),
    )
    reading = Reading(plot)
    mark, raw, mean, held, *keys = [e for e in reading.elements if e.tag == "path"]
    drawn_as = [e.attributes["class"] for e in (raw, mean, held, mark)]
    assert drawn_as == ["series series-0 faint", "series series-0", "series series-1 dots", "mark"]
    assert [e.attributes["class"] for e in keys] == drawn_as
    assert held.attributes["d"].count("M") == 4
    assert mean.attributes["d"].count("M") == 1
    assert mark.attributes["d"] == "M242.0 28V196"  # the middle of 62 to 422
    assert [e.text for e in reading.of("span")] == ["raw", "mean", "held", "<resumed>"]
    (words,) = reading.of("figcaption")
    assert "<resumed>: 4.5" in words.text
    assert "99" not in words.text


def ticks(plot, anchor: str) -> list[str]:
    elements = Reading(plot).elements
    return [e.text for e in elements if e.attributes.get("text-anchor") == anchor]


def test_an_axis_begins_at_0_and_ends_where_it_is_told():
    xs, ys = [0, 1, 2], [10.0, 12.0, 900.0]
    plot = lines({"a": (xs, ys)}, title="t", x="x", y="y", from_zero=True, top=20.0)
    assert ticks(plot, "end") == ["0", "5", "10", "15", "20"]
    (stroke,) = drawn(plot)
    np.testing.assert_allclose(stroke[:, 1], [196 - 84, 196 - 100.8, 28], atol=0.1)
    assert "10 to 900" in plot
    # Whole numbers have whole ticks.
    assert ticks(plot, "middle") == ["0", "1", "2", "x"]


def test_a_narrow_logarithmic_axis_has_ticks_too():
    plot = lines({"a": ([0, 1], [0.3, 25.0])}, title="t", x="x", y="y", log=True)
    assert ticks(plot, "end") == ["0.5", "1", "2", "5", "10", "20"]
    plot = lines({"a": ([0, 1], [1e-5, 25.0])}, title="t", x="x", y="y", log=True)
    assert ticks(plot, "end") == ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10"]
