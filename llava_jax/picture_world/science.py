"""Questions in the format of ScienceQA: choices, a hint, a lecture, a solution, grade and subject.

Nine kinds, three of each subject: one with a picture (a map with a hint beside it), one with a
hint only, one with neither. A problem knows its right choice by construction; the choices are
shuffled.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llava_jax.picture_world.scenes import (
    COLOURS,
    SHAPES,
    SIGN_TEXTS,
    UNSEEN_PAIRS,
    Scene,
    sample,
)
from llava_jax.picture_world.words import listing, the

SPLITS = ("train", "val", "test")
_SCENES_OF = {"train": "train", "val": "dev", "test": "test"}


class Problem(NamedTuple):
    """A row of problems.json, and the scene of its picture, if it has one."""

    row: dict[str, Any]
    scene: Scene | None


class _Draft(NamedTuple):
    question: str
    right: str
    wrong: Sequence[str]
    lecture: str
    solution: str
    hint: str = ""
    scene: Scene | None = None


class _Kind(NamedTuple):
    make: Callable[[random.Random, str], _Draft]
    subject: str
    topic: str
    category: str
    skill: str
    grade: str


def problem(kind: int, split: str, rng: random.Random) -> Problem:
    """A problem; `kind` counts through the nine, over and over."""
    about = _KINDS[kind % len(_KINDS)]
    draft = about.make(rng, _SCENES_OF[split])
    choices = [draft.right, *draft.wrong]
    rng.shuffle(choices)
    row = {
        "question": draft.question,
        "choices": choices,
        "answer": choices.index(draft.right),
        "hint": draft.hint,
        "image": "image.png" if draft.scene else None,
        "task": "closed choice",
        "grade": about.grade,
        "subject": about.subject,
        "topic": about.topic,
        "category": about.category,
        "skill": about.skill,
        "lecture": draft.lecture,
        "solution": draft.solution,
        "split": split,
    }
    return Problem(row, draft.scene)


def _biggest(rng: random.Random, split: str) -> _Draft:
    def has_one_big(scene: Scene) -> bool:
        sizes = [thing.size for thing in scene.things]
        return 1 < len(sizes) == len(scene.shapes) and sizes.count("big") == 1

    scene = sample(rng, split, has_one_big)
    [big] = [thing for thing in scene.things if thing.size == "big"]
    small = [the(thing) for thing in scene.things if thing is not big]
    return _Draft(
        "which object in the picture is the biggest?",
        the(big),
        small,
        "the size of an object is how much room it takes. a big object takes more room than a "
        "small object.",
        f"{the(big)} is big. {listing(small)} {'is' if len(small) == 1 else 'are'} small. so the "
        f"biggest is {the(big)}.",
        scene=scene,
    )


def _widest(rng: random.Random, split: str) -> _Draft:
    shapes, widths = rng.sample(SHAPES, 3), rng.sample(range(2, 10), 3)
    width, widest = max(zip(widths, shapes, strict=True))
    return _Draft(
        "which of the three is the widest?",
        f"the {widest}",
        [f"the {shape}" for shape in shapes if shape != widest],
        "lengths are measured in units, as in cm. the more cm, the wider the object.",
        f"{width} cm is the most. so the widest is the {widest}.",
        hint=" ".join(
            f"the {shape} is {width} cm wide." for shape, width in zip(shapes, widths, strict=True)
        ),
    )


_PARTS = {
    "circle": "is round and has no hole",
    "ring": "is round and has a hole",
    "cross": "is made of two lines that meet in the middle",
    "ladder": "has two long sides with steps between them",
    "comb": "has teeth",
}


def _parts(rng: random.Random, split: str) -> _Draft:
    shape = rng.choice(SHAPES)
    others = rng.sample([other for other in SHAPES if other != shape], 2)
    return _Draft(
        f"which of these {_PARTS[shape]}?",
        f"a {shape}",
        [f"a {other}" for other in others],
        "objects can be told apart by their parts: holes, lines, steps and teeth.",
        f"a {shape} {_PARTS[shape]}.",
    )


def _winds(cell: str) -> str:
    north, west = cell.split("-")
    return f"{'north' if north == 'top' else 'south'}-{'west' if west == 'left' else 'east'}"


def _map(rng: random.Random, split: str) -> _Draft:
    scene = sample(rng, split, lambda scene: 1 < len(scene.things) == len(scene.shapes))
    thing = rng.choice(scene.things)
    place = _winds(thing.cell)
    return _Draft(
        f"which object is in the {place}?",
        the(thing),
        [the(other) for other in scene.things if other is not thing],
        "a map shows places from above. most maps have north at the top, south at the bottom, west "
        "at the left and east at the right.",
        f"the {place} of the map is its {thing.cell}. {the(thing)} is there.",
        hint="the picture is a map. north is at the top.",
        scene=scene,
    )


def _prices(rng: random.Random, split: str) -> _Draft:
    pairs = rng.sample(
        [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS],
        2,
    )
    names = [f"{colour} {shape}" for colour, shape in pairs]
    one, other = rng.sample(range(2, 8), 2)
    total = one + other
    return _Draft(
        "how many coins do both cost together?",
        f"{total} coins",
        [f"{number} coins" for number in rng.sample((total - 2, total - 1, total + 1), 2)],
        "the price of an object is what one pays for it. prices are added to find what objects "
        "cost together.",
        f"the {names[0]} costs {one} coins and the {names[1]} costs {other} coins. "
        f"{one} + {other} = {total}.",
        hint=f"a {names[0]} costs {one} coins. a {names[1]} costs {other} coins.",
    )


_OPPOSITE = {"north": "south", "south": "north", "west": "east", "east": "west"}


def _opposite(rng: random.Random, split: str) -> _Draft:
    way = rng.choice(sorted(_OPPOSITE))
    return _Draft(
        f"which way is opposite to {way}?",
        _OPPOSITE[way],
        [other for other in _OPPOSITE if other not in (way, _OPPOSITE[way])],
        "there are four ways on a map: north, east, south and west. north is opposite to south, "
        "and east is opposite to west.",
        f"{way} is opposite to {_OPPOSITE[way]}.",
    )


def _sign(rng: random.Random, split: str) -> _Draft:
    scene = sample(rng, split, lambda scene: len(scene.shapes) < len(scene.things))
    [text] = [thing.text for thing in scene.things if thing.is_sign]
    return _Draft(
        "what is written on the sign?",
        text,
        rng.sample([other for other in SIGN_TEXTS if other != text], 2),
        "words and letters are read from left to right.",
        f"the sign says {text}.",
        scene=scene,
    )


def _which_colour(rng: random.Random, split: str) -> _Draft:
    shapes, colours = rng.sample(SHAPES, 3), rng.sample(COLOURS, 3)
    while any(pair in UNSEEN_PAIRS for pair in zip(colours, shapes, strict=True)):
        rng.shuffle(colours)
    asked = rng.randrange(3)
    right = colours.pop(asked)
    told = [*colours[:asked], right, *colours[asked:]]
    return _Draft(
        f"which word tells the colour of the {shapes[asked]}?",
        right,
        colours,
        "each sentence tells the colour of one object. read the sentence about the object that is "
        "asked for.",
        f"the sentence says: the {shapes[asked]} is {right}.",
        hint=" ".join(
            f"the {shape} is {colour}." for shape, colour in zip(shapes, told, strict=True)
        ),
    )


def _alphabet(rng: random.Random, split: str) -> _Draft:
    words = rng.sample([*SHAPES, *COLOURS], 3)
    first = min(words)
    return _Draft(
        "which word comes first in a dictionary?",
        first,
        [word for word in words if word != first],
        "the words in a dictionary are in the order of the alphabet. look at the first letters; "
        "where they are the same, look at the next ones.",
        f"in order the words are {listing(sorted(words))}. so the first is {first}.",
    )


_NATURAL, _SOCIAL, _LANGUAGE = "natural science", "social science", "language science"
_KINDS = (
    _Kind(_biggest, _NATURAL, "physics", "size", "compare the sizes of objects", "grade1"),
    _Kind(_map, _SOCIAL, "geography", "maps", "read a map", "grade4"),
    _Kind(_sign, _LANGUAGE, "writing", "letters", "read signs", "grade1"),
    _Kind(_widest, _NATURAL, "units", "length", "compare lengths", "grade3"),
    _Kind(_prices, _SOCIAL, "economics", "prices", "add prices", "grade7"),
    _Kind(_which_colour, _LANGUAGE, "reading", "sentences", "find a word in a text", "grade2"),
    _Kind(_parts, _NATURAL, "objects", "parts", "tell objects by their parts", "grade2"),
    _Kind(_opposite, _SOCIAL, "geography", "directions", "name the ways on a map", "grade5"),
    _Kind(_alphabet, _LANGUAGE, "words", "dictionary", "put words in order", "grade8"),
)
