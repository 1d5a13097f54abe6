"""Scenes: what is in a picture, known exactly. Every scene is drawn from one integer seed.

A scene has one to four objects, each in a cell of its own: shapes in colours and two sizes, and now
and then a sign with a letter or a short word on it. No two objects of a scene agree in colour and
shape, so "the red ring" is always one object.

What a picture contains decides, by a hash, whether it belongs to train, dev or test: no arrangement
of one split occurs in another, whatever the seeds. A few colour-shape pairs occur in none of the
three: every scene of the fourth split, unseen_pairs, has one.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import Literal

SPLITS = ("train", "dev", "test", "unseen_pairs")
SHAPES = ("circle", "ring", "cross", "ladder", "comb")
COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan")
SIZES = ("small", "big")
CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")
BACKGROUNDS = ("dark", "light")
STYLES = ("flat", "shaded")  # shaded: lighter at the top of an object, darker at its bottom
SIGN = "sign"
SIGN_TEXTS = ("L", "T", "X", "GO", "HI", "UP")
UNSEEN_PAIRS = frozenset(zip(COLOURS, SHAPES, strict=False))  # one for each shape
DIAMETER = {"small": 0.24, "big": 0.40}  # as a share of the picture's side; a cell has 0.5
_SHIFT = {"small": 0.08, "big": 0.04}  # how far off its cell's centre an object may be
_SIGN_SHARE = 0.33  # of the scenes with two objects or more
_BUCKETS = {"train": range(8), "dev": range(8, 9), "test": range(9, 10)}


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object. A sign has a text and is big; every other has a colour and no text."""

    shape: str
    colour: str
    size: str
    cell: str
    shift: tuple[float, float]  # off the cell's centre, to the right and down
    text: str = ""

    @property
    def is_sign(self) -> bool:
        return self.shape == SIGN

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def row(self) -> int:
        return CELLS.index(self.cell) // 2

    @property
    def column(self) -> int:
        return CELLS.index(self.cell) % 2

    @property
    def centre(self) -> tuple[float, float]:
        """x, y; the picture's side is 1."""
        return 0.25 + 0.5 * self.column + self.shift[0], 0.25 + 0.5 * self.row + self.shift[1]


@dataclasses.dataclass(frozen=True)
class Scene:
    """things: in reading order. noise: the seed of the background's grain."""

    things: tuple[Thing, ...]
    background: str
    style: str
    noise: int

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """The objects that have a colour and a size: all but signs."""
        return tuple(thing for thing in self.things if not thing.is_sign)

    @property
    def empty_cells(self) -> tuple[str, ...]:
        return tuple(cell for cell in CELLS if cell not in {thing.cell for thing in self.things})


Kind = Literal["colour", "shape", "count"]
_Change = Literal["colour", "shape", "came", "went"]
_CHANGES: tuple[_Change, ...] = ("colour", "colour", "shape", "shape", "came", "went")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two scenes that differ in one object: `before` in the first, `after` in the second.

    kind: "colour" or "shape": that of one object changed. "count": an object came (no `before`) or
    went (no `after`).
    """

    kind: Kind
    first: Scene
    second: Scene
    before: Thing | None
    after: Thing | None


def scene(seed: int, split: str, index: int) -> Scene:
    """Scene `index` of a split: always the same."""
    return sample(generator(seed, split, index, "scene"), split)


def comparison(seed: int, split: str, index: int) -> Comparison:
    """Pair of scenes `index` of a split: always the same."""
    rng = generator(seed, split, index, "comparison")
    # Each six pairs hold these six, in an order of their own: drawn pair by pair, objects came
    # more often than they went, and one answer was usual.
    six, place = divmod(index, len(_CHANGES))
    change = generator(seed, split, six, "changes").sample(_CHANGES, len(_CHANGES))[place]
    while True:
        first = sample(rng, split)
        # Both must be of the split: most changes lead into another.
        for _ in range(10):
            found = _changed(first, change, rng, split)
            if found and belongs(found.second, split):
                return found


def generator(seed: int, split: str, index: int, purpose: str) -> random.Random:
    """Random numbers of their own for each purpose: changing one leaves the others as they are."""
    return random.Random(f"picture world {seed} {split} {index} {purpose}")


def sample(
    rng: random.Random, split: str, wanted: Callable[[Scene], bool] = lambda scene: True
) -> Scene:
    """A scene of the split, for which `wanted` holds."""
    _check(split)
    while True:
        # The count is drawn once: as often two as four, however many are refused.
        count = rng.randint(1, 4)
        for _ in range(200):
            drawn = _draw(rng, split, count)
            if belongs(drawn, split) and wanted(drawn):
                return drawn


def belongs(scene: Scene, split: str) -> bool:
    unseen = any(thing.pair in UNSEEN_PAIRS for thing in scene.things)
    if split == "unseen_pairs" or unseen:
        return unseen and split == "unseen_pairs"
    content = [(t.cell, t.colour, t.shape, t.size, t.text) for t in scene.things]
    digest = hashlib.sha256(repr(content).encode()).digest()
    return digest[0] % 10 in _BUCKETS[split]


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}, expected one of {', '.join(SPLITS)}")


def _draw(rng: random.Random, split: str, count: int) -> Scene:
    with_sign = count > 1 and rng.random() < _SIGN_SHARE
    cells = rng.sample(CELLS, count)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count - with_sign:
        pair = rng.choice(_pairs(split, first=not pairs))
        if pair not in pairs:
            pairs.append(pair)
    things = [
        _place(rng, Thing(shape, colour, rng.choice(SIZES), cell, (0, 0)))
        for (colour, shape), cell in zip(pairs, cells, strict=False)
    ]
    if with_sign:
        text = rng.choice(SIGN_TEXTS)
        things.append(_place(rng, Thing(SIGN, "", "big", cells[-1], (0, 0), text)))
    return Scene(
        _in_order(things), rng.choice(BACKGROUNDS), rng.choice(STYLES), rng.getrandbits(32)
    )


def _pairs(split: str, *, first: bool = False) -> list[tuple[str, str]]:
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if split == "unseen_pairs":
        return [pair for pair in every if pair in UNSEEN_PAIRS] if first else every
    return [pair for pair in every if pair not in UNSEEN_PAIRS]


def _place(rng: random.Random, thing: Thing) -> Thing:
    far = _SHIFT[thing.size]
    return dataclasses.replace(thing, shift=(rng.uniform(-far, far), rng.uniform(-far, far)))


def _in_order(things: list[Thing]) -> tuple[Thing, ...]:
    return tuple(sorted(things, key=lambda thing: CELLS.index(thing.cell)))


def _changed(scene: Scene, change: _Change, rng: random.Random, split: str) -> Comparison | None:
    things = list(scene.things)
    taken = {thing.pair for thing in scene.shapes}
    allowed = [pair for pair in _pairs(split) if pair not in taken]
    before = after = None
    if change == "came":
        if not scene.empty_cells:
            return None
        colour, shape = rng.choice(allowed)
        cell = rng.choice(scene.empty_cells)
        after = _place(rng, Thing(shape, colour, rng.choice(SIZES), cell, (0, 0)))
    elif change == "went":
        if len(scene.shapes) == 1:
            return None
        before = rng.choice(scene.shapes)
    else:
        before = rng.choice(scene.shapes)
        kept = 1 if change == "colour" else 0
        others = [pair for pair in allowed if pair[kept] == before.pair[kept]]
        if not others:
            return None
        colour, shape = rng.choice(others)
        after = dataclasses.replace(before, colour=colour, shape=shape)
    if before:
        things.remove(before)
    if after:
        things.append(after)
    # The grain differs, as it would between two photographs of one place.
    second = dataclasses.replace(scene, things=_in_order(things), noise=rng.getrandbits(32))
    kind = "count" if change in ("came", "went") else change
    return Comparison(kind, scene, second, before, after)
