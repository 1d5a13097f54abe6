"""Questions about a scene that have one exact answer, by category.

| category | example | answers |
|---|---|---|
| colour | what colour is the ring? | the colours |
| shape | what shape is the red object? | the shapes |
| at | what is at the top-left? | a red ring, a sign, nothing |
| where | where is the red ring? | the four places |
| count | how many objects are there? | one to four |
| read | what does the sign say? | the texts of signs |
| size | is the red ring small or big? | small, big |
| bigger | which is bigger, the red ring or the blue cross? | one of the two |
| left, higher | which is further left, …? which is higher, …? | one of the two |
| exist | is there a red ring? | yes, no |

The last five have two possible answers: a blind guess is right half the time (TWO_WAY). So has
"more", which dialogues.py asks of two pictures. In scenes with unseen colour-shape pairs, questions
are about objects of such a pair.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llava_jax.picture_world.scenes import COLOURS, SHAPES, UNSEEN_PAIRS, Scene, Thing
from llava_jax.picture_world.words import NUMBERS, a, full, the

TWO_WAY = frozenset({"size", "bigger", "left", "higher", "exist", "more"})


class Question(NamedTuple):
    category: str
    text: str
    answer: str

    @property
    def two_way(self) -> bool:
        return self.category in TWO_WAY


def ask(category: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of the category; None where the scene gives no reason to ask one."""
    found = _ASK[category](scene, rng)
    return Question(category, *found) if found else None


def closed(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of every category that the scene allows."""
    asked = (ask(category, scene, rng) for category in CATEGORIES)
    return [question for question in asked if question]


def describe(thing: Thing, rng: random.Random) -> tuple[str, str]:
    """A request to describe one object, by its place or by its name: a short answer in full."""
    if rng.random() < 0.6:
        return f"describe the object at the {thing.cell}.", full(thing)
    return f"describe {the(thing)}.", f"{full(thing)} at the {thing.cell}"


def _targets(scene: Scene) -> list[Thing]:
    """The shapes that questions are about."""
    unseen = [thing for thing in scene.shapes if thing.pair in UNSEEN_PAIRS]
    return unseen or list(scene.shapes)


Asked = tuple[str, str] | None


def _colour(scene: Scene, rng: random.Random) -> Asked:
    thing = _pick(_alone(scene, lambda thing: thing.shape), rng)
    return thing and (f"what colour is the {thing.shape}?", thing.colour)


def _shape(scene: Scene, rng: random.Random) -> Asked:
    thing = _pick(_alone(scene, lambda thing: thing.colour), rng)
    return thing and (f"what shape is the {thing.colour} object?", thing.shape)


def _alone(scene: Scene, of: Callable[[Thing], str]) -> list[Thing]:
    """Targets that share this attribute with no other object."""
    every = [of(thing) for thing in scene.shapes]
    return [thing for thing in _targets(scene) if every.count(of(thing)) == 1]


def _pick(things: Sequence[Thing], rng: random.Random) -> Thing | None:
    return rng.choice(things) if things else None


def _at(scene: Scene, rng: random.Random) -> Asked:
    # Empty places are common; an eighth of the answers is enough for them, and for signs.
    draw = rng.random()
    signs = [thing for thing in scene.things if thing.is_sign]
    if draw < 1 / 8 and scene.empty_cells:
        return f"what is at the {rng.choice(scene.empty_cells)}?", "nothing"
    thing = signs[0] if draw > 7 / 8 and signs else rng.choice(_targets(scene))
    return f"what is at the {thing.cell}?", a(thing)


def _where(scene: Scene, rng: random.Random) -> Asked:
    thing = rng.choice(_targets(scene))
    return f"where is {the(thing)}?", thing.cell


def _count(scene: Scene, rng: random.Random) -> Asked:
    return "how many objects are there?", NUMBERS[len(scene.things)]


def _read(scene: Scene, rng: random.Random) -> Asked:
    signs = [thing for thing in scene.things if thing.is_sign]
    return ("what does the sign say?", signs[0].text) if signs else None


def _size(scene: Scene, rng: random.Random) -> Asked:
    thing = rng.choice(_targets(scene))
    return f"is {the(thing)} small or big?", thing.size


def _bigger(scene: Scene, rng: random.Random) -> Asked:
    pairs = _unlike(scene, lambda thing: thing.size == "small")
    return _which("which is bigger", pairs, rng)


def _left(scene: Scene, rng: random.Random) -> Asked:
    return _which("which is further left", _unlike(scene, lambda thing: thing.column == 1), rng)


def _higher(scene: Scene, rng: random.Random) -> Asked:
    return _which("which is higher", _unlike(scene, lambda thing: thing.row == 1), rng)


def _unlike(scene: Scene, loses: Callable[[Thing], bool]) -> list[tuple[Thing, Thing]]:
    """(winner, loser), one of them a target."""
    targets = _targets(scene)
    return [
        (one, other)
        for one in scene.shapes
        for other in scene.shapes
        if not loses(one) and loses(other) and (one in targets or other in targets)
    ]


def _which(question: str, pairs: list[tuple[Thing, Thing]], rng: random.Random) -> Asked:
    if not pairs:
        return None
    pair = rng.choice(pairs)
    first, second = rng.sample(pair, 2)
    return f"{question}, {the(first)} or {the(second)}?", the(pair[0])


def _exist(scene: Scene, rng: random.Random) -> Asked:
    if rng.random() < 0.5:
        return f"is there {a(rng.choice(_targets(scene)))}?", "yes"
    present = {thing.pair for thing in scene.shapes}
    asks_unseen = bool(present & UNSEEN_PAIRS)
    absent = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if (colour, shape) not in present and ((colour, shape) in UNSEEN_PAIRS) == asks_unseen
    ]
    # Half of the time hard: its colour is there and its shape is there, but not in one object.
    colours, shapes = {pair[0] for pair in present}, {pair[1] for pair in present}
    hard = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    colour, shape = rng.choice(hard if hard and rng.random() < 0.5 else absent)
    return f"is there a {colour} {shape}?", "no"


_ASK: dict[str, Callable[[Scene, random.Random], Asked]] = {
    "colour": _colour,
    "shape": _shape,
    "at": _at,
    "where": _where,
    "count": _count,
    "read": _read,
    "size": _size,
    "bigger": _bigger,
    "left": _left,
    "higher": _higher,
    "exist": _exist,
}
CATEGORIES = tuple(_ASK)
