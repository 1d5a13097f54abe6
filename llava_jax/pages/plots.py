"""Plots as inline SVG, from whatever numbers there are: empty, constant, huge, not finite.

Under each plot stand its figures in words, for those who do not see it; hovering tells of one bar
or one place of the lines.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from llava_jax.pages.markup import Html, element, join, number

_WIDTH, _HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 28, 44
_LARGEST = 1e100  # beyond it, differences of differences overflow; treated as infinite
_POINTS = 1000  # of a line: more could not be told apart
_HOVERS = 60
_WIDEST_BAR = 80
_STYLES = 6  # of lines, in the stylesheet


def histogram(
    values: np.ndarray | Sequence[float], *, title: str, x: str, y: str, log: bool = False
) -> Html:
    """How often which values occur. log: the counts' axis is logarithmic.

    Whole numbers get bars of whole numbers, one a bar where there are few.
    """
    values_N = np.asarray(values, np.float64).ravel()
    good_N = values_N[np.abs(values_N) < _LARGEST]
    if not good_N.size:
        return _figure(title, _nothing(), _words(good_N, values_N.size))
    whole = bool((good_N == np.floor(good_N)).all())
    edges = _edges(float(good_N.min()), float(good_N.max()), whole)
    counts = np.histogram(good_N, edges)[0]
    lowest = 0.5 if log else 0.0
    vertical = _Axis(lowest, float(counts.max()), _HEIGHT - _BOTTOM, _TOP, log=log, whole=True)
    horizontal = _Axis(float(edges[0]), float(edges[-1]), _LEFT, _WIDTH - _RIGHT, whole=whole)
    bars = []
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        if not count:
            continue
        left, right, top = horizontal.at(low), horizontal.at(high), vertical.at(count)
        gap = max(right - left - _WIDEST_BAR, 1 if right - left > 3 else 0)
        bars.append(
            element(
                "rect",
                element("title", f"{_interval(low, high, whole)}: {number(count)} {y}"),
                x=round(left + gap / 2, 2),
                y=round(top, 2),
                width=round(right - left - gap, 2),
                # A single one among thousands is still to be seen.
                height=round(max(vertical.at(lowest) - top, 1.0), 2),
            )
        )
    centred = 0.5 if whole and edges[1] - edges[0] == 1 else 0.0
    drawing = join(_axes(horizontal, vertical, x, y, centred), element("g", *bars, class_="bars"))
    return _figure(title, drawing, _words(good_N, values_N.size))


def lines(
    series: Mapping[str, tuple[np.ndarray | Sequence[float], np.ndarray | Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    log: bool = False,
    from_zero: bool = False,
    top: float = math.inf,
    faint: Collection[str] = (),
    dots: Collection[str] = (),
    marks: tuple[str, Sequence[float]] = ("", ()),
) -> Html:
    """Lines by name, each (xs, ys). log: the vertical axis is logarithmic.

    What cannot be drawn (not finite, or not above 0 on a logarithmic axis) leaves a gap, and is
    counted. At most 6 lines. faint: names of those that stand behind the next one, in its colour.
    dots: of those that are points alone. marks: what places on the horizontal axis are called, and
    the places. from_zero: the vertical axis begins at 0, where it is not logarithmic. top: where
    it ends, if values do not end before; what is above is drawn at its end.
    """
    points = {name: _points(*xy, log) for name, xy in series.items()}
    drawable = [xy_2N[:, np.isfinite(xy_2N).all(0)] for xy_2N in points.values()]
    all_2N = np.concatenate([np.empty((2, 0)), *drawable], axis=1)
    if not all_2N.size:
        return _figure(title, _nothing(), "no values")
    (x_low, y_low), (x_high, y_high) = all_2N.min(1).tolist(), all_2N.max(1).tolist()
    whole = bool((all_2N[0] == np.floor(all_2N[0])).all())
    horizontal = _Axis(*_apart(x_low, x_high), _LEFT, _WIDTH - _RIGHT, whole=whole)
    if from_zero and not log:
        y_low, y_high = min(y_low, 0.0), max(y_high, 0.0)
    y_high = max(min(y_high, top), y_low)
    bounds = (y_low, y_high) if log and y_low < y_high else _apart(y_low, y_high)
    if log and y_low == y_high:
        bounds = (y_low / 2, y_low * 2)
    vertical = _Axis(*bounds, _HEIGHT - _BOTTOM, _TOP, log=log)
    paths, keys, words, number_of_style = [], [], [], 0
    for name, xy_2N in points.items():
        style = f"series series-{number_of_style}"
        style += " faint" * (name in faint) + " dots" * (name in dots)
        number_of_style += name not in faint
        path = _path(xy_2N if name in dots else _thinned(xy_2N), horizontal, vertical, name in dots)
        paths.append(element("path", d=path, class_=style))
        keys.append(_key(name, "M17 5L17 5" if name in dots else "M1 5H33", style))
        words.append(f"{name}: {_of_a_line(xy_2N)}")
    assert number_of_style <= _STYLES, list(series)
    called, places = marks
    marked = [at for at in places if horizontal.low <= at <= horizontal.high]
    if marked:
        keys.append(_key(called, "M17 0V10", "mark"))
        words.append(f"{called}: {', '.join(map(number, marked))}")
    stems = [_mark(called, at, x, horizontal) for at in marked]
    hovers = _hovers(points, horizontal, x)
    drawing = join(_axes(horizontal, vertical, x, y, 0.0), *stems, *paths, *hovers)
    return _figure(title, drawing, "; ".join(words), element("div", *keys))


def _key(name: str, sample: str, style: str) -> Html:
    drawn = element("path", d=sample, class_=style)
    return element(
        "span", element("svg", drawn, viewBox="0 0 34 10", aria_hidden="true"), name, class_="key"
    )


def _mark(called: str, at: float, x: str, horizontal: "_Axis") -> Html:
    return element(
        "path",
        element("title", f"{called}: {x} {number(at)}"),
        d=f"M{horizontal.at(at):.1f} {_TOP}V{_HEIGHT - _BOTTOM}",
        class_="mark",
    )


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Values to places. Values outside are drawn at the border. whole: so are its ticks."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    whole: bool = False

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            step = max(_nice((self.high - self.low) / 5), 1.0 if self.whole else 0.0)
            first, last = math.ceil(self.low / step), math.floor(self.high / step + 1e-9)
            return [i * step for i in range(first, last + 1)]
        low, high = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        if high - low >= 2:
            return [10.0**power for power in range(low, high + 1, max(1, (high - low + 1) // 5))]
        steps = [n * 10.0**power for power in range(low - 1, high + 1) for n in (1, 2, 5)]
        inside = [step for step in steps if self.low <= step <= self.high]
        return inside if len(inside) > 1 else [self.low, self.high]


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * 0.999999)


def _tick(value: float) -> str:
    return f"{value / 1e6:,.6g}M" if 1e6 <= abs(value) < 1e12 else number(value)


def _apart(low: float, high: float) -> tuple[float, float]:
    """Two different bounds, also around a single value, far enough apart for floats."""
    least = max(abs(low), abs(high)) * 1e-6
    if high - low > max(least, 1e-100):
        return low, high
    margin = max(abs(low) * 0.1, 0.5) if abs(low) > 1e-9 else 0.5
    return low - margin, high + margin


def _edges(low: float, high: float, whole: bool) -> np.ndarray:
    if whole and high - low < 30 and abs(low) < 1e9:
        return np.arange(low, high + 2)
    low, high = _apart(low, high)
    step = _nice((high - low) / 40)
    if whole:
        step = max(step, 1.0)
    # The last interval is closed, but one of whole numbers ends before the next.
    first = math.floor(low / step)
    last = math.floor(high / step) + 1 if whole else max(first + 1, math.ceil(high / step))
    return np.arange(first, last + 1) * step


def _interval(low: float, high: float, whole: bool) -> str:
    if not whole:
        return f"{number(low)} to {number(high)}"
    return number(low) if high - low == 1 else f"{number(low)} to {number(high - 1)}"


def _points(xs, ys, log: bool) -> np.ndarray:
    """xy_2N, with nan wherever a point can't be drawn."""
    xy_2N = np.stack([np.asarray(xs, np.float64).ravel(), np.asarray(ys, np.float64).ravel()])
    bad_N = ~(np.abs(xy_2N) < _LARGEST).all(0)
    if log:
        bad_N |= ~(xy_2N[1] > 1 / _LARGEST)
    return np.where(bad_N, np.nan, xy_2N)


def _thinned(xy_2N: np.ndarray) -> np.ndarray:
    """Of many points the lowest and the highest of each stretch, so that no peak is lost."""
    count = xy_2N.shape[1]
    if count <= _POINTS:
        return xy_2N
    keep: set[int] = {0, count - 1}
    for stretch in np.array_split(np.arange(count), _POINTS // 2):
        y_n = xy_2N[1, stretch]
        if np.isnan(y_n).all():
            keep.add(int(stretch[0]))
            continue
        keep |= {int(stretch[np.nanargmin(y_n)]), int(stretch[np.nanargmax(y_n)])}
    return xy_2N[:, sorted(keep)]


def _path(xy_2N: np.ndarray, horizontal: _Axis, vertical: _Axis, dots: bool) -> str:
    parts, pen_down = [], False
    for x, y in xy_2N.T.tolist():
        if math.isnan(x):
            pen_down = False
            continue
        place = f"{horizontal.at(x):.1f} {vertical.at(y):.1f}"
        # A line of length 0 with round ends: a point alone between gaps is seen, too.
        parts.append(f"L{place}" if pen_down else f"M{place}L{place}")
        pen_down = not dots
    return "".join(parts)


def _hovers(points: Mapping[str, np.ndarray], horizontal: _Axis, x: str) -> list[Html]:
    """Invisible columns that tell the lines' values next to their middle."""
    width = (horizontal.stop - horizontal.start) / _HOVERS
    half = (horizontal.high - horizontal.low) / _HOVERS / 2
    columns = []
    for i in range(_HOVERS):
        middle = horizontal.low + (2 * i + 1) * half
        told = []
        for name, xy_2N in points.items():
            distance_N = np.abs(xy_2N[0] - middle)
            if np.isnan(distance_N).all() or np.nanmin(distance_N) > half * 1.001:
                continue
            near_x, near_y = xy_2N[:, np.nanargmin(distance_N)]
            told.append(f"{name} {number(near_y)} at {x} {number(near_x)}")
        if told:
            columns.append(
                element(
                    "rect",
                    element("title", "; ".join(told)),
                    x=round(horizontal.start + i * width, 2),
                    y=_TOP,
                    width=round(width, 2),
                    height=_HEIGHT - _BOTTOM - _TOP,
                    class_="hover",
                )
            )
    return columns


def _axes(horizontal: _Axis, vertical: _Axis, x: str, y: str, centred: float) -> Html:
    """Grid, ticks and names. centred: where in its bar the number of a bar stands."""
    bottom, parts = _HEIGHT - _BOTTOM, []
    for value in vertical.ticks():
        place = round(vertical.at(value), 2)
        parts.append(
            element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=place, y2=place, class_="grid")
        )
        parts.append(element("text", _tick(value), x=_LEFT - 6, y=place + 4, text_anchor="end"))
    for value in horizontal.ticks():
        if centred and value + 1 > horizontal.high:
            continue
        place = round(horizontal.at(value + centred), 2)
        parts.append(element("line", x1=place, x2=place, y1=bottom, y2=bottom + 4, class_="grid"))
        parts.append(element("text", _tick(value), x=place, y=bottom + 17, text_anchor="middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(element("text", x, x=middle, y=_HEIGHT - 6, text_anchor="middle"))
    parts.append(element("text", y, x=2, y=14))
    return join(*parts)


def _nothing() -> Html:
    return element("text", "no values", x=_WIDTH / 2, y=_HEIGHT / 2, text_anchor="middle")


def _words(good_N: np.ndarray, count: int) -> str:
    left_out = count - good_N.size
    missing = f"{left_out:,} not finite, left out" if left_out else ""
    if not good_N.size:
        return "no values" + (f"; {missing}" if missing else "")
    low, median, most, high = np.quantile(good_N, [0, 0.5, 0.99, 1]).tolist()
    told = [
        f"n {good_N.size:,}",
        f"mean {number(float(good_N.mean()))}",
        f"min {number(low)}",
        f"median {number(median)}",
        f"99 % ≤ {number(most)}",
        f"max {number(high)}",
    ]
    return " · ".join([*told, *([missing] if missing else [])])


def _of_a_line(xy_2N: np.ndarray) -> str:
    y_N = xy_2N[1, ~np.isnan(xy_2N[1])]
    gaps = f", {xy_2N.shape[1] - y_N.size:,} points not drawable" * (y_N.size < xy_2N.shape[1])
    if not y_N.size:
        return f"no values{gaps}"
    low, high, last = number(float(y_N.min())), number(float(y_N.max())), number(float(y_N[-1]))
    return f"{low} to {high}, last {last}{gaps}"


def _figure(title: str, drawing: Html, words: str, keys: str = "") -> Html:
    return element(
        "figure",
        element("b", title),
        element(
            "svg",
            drawing,
            viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
            role="img",
            aria_label=f"{title}: {words}",
        ),
        element("figcaption", keys, words),
        class_="plot",
    )
