"""Scenes as pictures, at any size, and the pixels that each object covers.

Every object is drawn as a mask, several times too large, and averaged down: smooth edges, no fonts,
the same bytes each time. At 48 pixels a big object is 19 wide and a small one 12. Each shape has
its own inside (full, a hole, crossing strokes, rungs, teeth), so that one patch of 8 pixels tells
which it is.
"""

import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from llava_jax.picture_world.scenes import DIAMETER, SIGN, Scene, Thing

_FINER = 4  # masks are drawn so many times larger
_COLOURS = {
    "red": (222, 40, 40),
    "green": (36, 160, 60),
    "blue": (45, 85, 232),
    "yellow": (240, 200, 20),
    "pink": (228, 80, 205),
    "cyan": (30, 196, 208),
}
_BACKGROUNDS = {"dark": (38, 38, 44), "light": (232, 229, 222)}
_GRAIN = 5
_SHADES = (1.2, 0.7)  # brightness at the top and at the bottom of a shaded object
_CARD, _EDGE, _INK = (250, 250, 250), (120, 120, 120), (25, 25, 25)

Points = list[tuple[float, float]]


def _disc(radius: float) -> Points:
    turns = [2 * math.pi * corner / 64 for corner in range(64)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


_STROKE: Points = [(-1, -1), (-0.72, -1), (1, 0.72), (1, 1), (0.72, 1), (-1, -0.72)]
# Polygons in a square from -1 to 1 around the object's centre; a hole is cut out of those before.
_POLYGONS: dict[str, list[Points]] = {
    "circle": [_disc(1)],
    "ring": [_disc(1)],
    "cross": [_STROKE, [(-x, y) for x, y in _STROKE]],
    "ladder": [
        _box(-1, -1, -0.64, 1),
        _box(0.64, -1, 1, 1),
        *(_box(-1, y - 0.18, 1, y + 0.18) for y in (-0.42, 0.42)),
    ],
    "comb": [
        _box(-1, -1, 1, -0.55),
        *(_box(x - 0.18, -1, x + 0.18, 1) for x in (-0.82, 0.0, 0.82)),
    ],
    SIGN: [_box(-1, -1, 1, 1)],
}
_HOLES: dict[str, Points] = {"ring": _disc(0.5)}
_CARD_INSIDE = _box(-0.9, -0.9, 0.9, 0.9)

# Letters of signs, three columns and five rows.
_GLYPHS = {
    "G": "### #.. #.# #.# ###",
    "H": "#.# #.# ### #.# #.#",
    "I": "### .#. .#. .#. ###",
    "L": "#.. #.. #.. #.. ###",
    "O": "### #.# #.# #.# ###",
    "P": "### #.# ### #.. #..",
    "T": "### .#. .#. .#. .#.",
    "U": "#.# #.# #.# #.# ###",
    "X": "#.# #.# .#. #.# #.#",
}


class Box(NamedTuple):
    """Pixels: the left and upper edge, and how many; area: those covered, edges in part."""

    x: int
    y: int
    width: int
    height: int
    area: float


class _Layer(NamedTuple):
    """How much of each pixel is covered, 0 to 255, in a window of the picture."""

    left: int
    top: int
    mask: Image.Image
    colour: tuple[int, int, int]


def draw(scene: Scene, size: int) -> Image.Image:
    """The scene as `size` x `size` pixels, RGB."""
    grain_HW1 = np.random.default_rng(scene.noise).integers(-_GRAIN, _GRAIN + 1, (size, size, 1))
    canvas_HW3 = np.array(_BACKGROUNDS[scene.background], np.float64) + grain_HW1
    for thing in scene.things:
        for layer in _layers(thing, size):
            alpha_HW1 = np.asarray(layer.mask)[..., None] / 255
            height, width, _ = alpha_HW1.shape
            colour_HW3 = np.array(layer.colour, np.float64)
            if scene.style == "shaded" and not thing.is_sign:
                shade_H11 = np.linspace(*_SHADES, height)[:, None, None]
                colour_HW3 = np.minimum(colour_HW3 * shade_H11, 255)
            part_HW3 = canvas_HW3[layer.top : layer.top + height, layer.left : layer.left + width]
            part_HW3 += alpha_HW1 * (colour_HW3 - part_HW3)
    return Image.fromarray(np.rint(canvas_HW3).clip(0, 255).astype(np.uint8))


def boxes(scene: Scene, size: int) -> list[Box]:
    """Of each of scene.things, the box around exactly the pixels drawn for it."""
    return [_box_of(next(_layers(thing, size))) for thing in scene.things]


def _box_of(layer: _Layer) -> Box:
    bounds = layer.mask.getbbox()
    assert bounds, "an object covers no pixel"
    left, top, right, bottom = bounds
    area = round(float(np.asarray(layer.mask).sum()) / 255, 1)
    return Box(layer.left + left, layer.top + top, right - left, bottom - top, area)


def encode(picture: Image.Image, suffix: str) -> bytes:
    """The bytes of a file of this suffix. JPEG with full colour, and hardly a loss."""
    out = io.BytesIO()
    if suffix == ".jpg":
        picture.save(out, "JPEG", quality=95, subsampling=0)
    else:
        picture.save(out, "PNG")
    return out.getvalue()


def _layers(thing: Thing, size: int) -> Iterator[_Layer]:
    """From the bottom up; the first is the widest."""
    outline = _POLYGONS[thing.shape]
    if not thing.is_sign:
        yield _layer(thing, size, _COLOURS[thing.colour], outline, _HOLES.get(thing.shape))
        return
    yield _layer(thing, size, _EDGE, outline)
    yield _layer(thing, size, _CARD, [_CARD_INSIDE])
    yield _layer(thing, size, _INK, _writing(thing.text))


def _layer(
    thing: Thing,
    size: int,
    colour: tuple[int, int, int],
    polygons: list[Points],
    hole: Points | None = None,
) -> _Layer:
    x, y = (size * place for place in thing.centre)
    radius = size * DIAMETER[thing.size] / 2
    left, top = math.floor(x - radius), math.floor(y - radius)
    width, height = math.ceil(x + radius) - left, math.ceil(y + radius) - top
    mask = Image.new("L", (_FINER * width, _FINER * height))
    pen = ImageDraw.Draw(mask)

    def placed(points: Points) -> Points:
        # A pixel's name is its middle.
        return [
            (_FINER * (x - left + radius * u) - 0.5, _FINER * (y - top + radius * v) - 0.5)
            for u, v in points
        ]

    for points in polygons:
        pen.polygon(placed(points), fill=255)
    if hole:
        pen.polygon(placed(hole), fill=0)
    return _Layer(left, top, mask.reduce(_FINER), colour)


def _writing(text: str) -> list[Points]:
    """The boxes of the letters' dots, as large as the card lets them be."""
    columns = 4 * len(text) - 1
    dot = min(1.5 / columns, 1.5 / 5)
    left, top = -dot * columns / 2, -dot * 5 / 2
    found = []
    for number, letter in enumerate(text):
        for row, dots in enumerate(_GLYPHS[letter].split()):
            for column, kind in enumerate(dots):
                if kind == "#":
                    x, y = left + dot * (4 * number + column), top + dot * row
                    found.append(_box(x, y, x + dot, y + dot))
    return found
