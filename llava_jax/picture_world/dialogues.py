"""Conversations in LLaVA's JSON: captions, three kinds about one picture, and several pictures.

An entry is {"id", "image", "conversations"}; for several pictures "image" is a list, and "<image>"
stands in the first question once for each. All is derived from the scenes.
"""

import random
from collections.abc import Sequence
from typing import Any

from llava_jax.conversation import IMAGE_TAG
from llava_jax.picture_world import questions
from llava_jax.picture_world.annotations import description
from llava_jax.picture_world.questions import TWO_WAY, Question
from llava_jax.picture_world.scenes import Comparison, Scene, Thing
from llava_jax.picture_world.words import NUMBERS, a, counted, listing, name, the

_CAPTION_REQUESTS = (
    "what does the picture show?",
    "what is in the picture?",
    "say in short what you see.",
    "give the picture a caption.",
    "what was drawn here?",
    "put the picture into a few words.",
    "name what is in the picture.",
    "tell me what this is a picture of.",
)
_DESCRIPTION_REQUESTS = (
    "describe the picture in detail.",
    "tell me everything about the picture.",
    "what is in the picture, and where is it?",
    "describe the picture so that one could draw it.",
)
_SUMMARY_REQUESTS = (
    "sum up the pictures.",
    "what do these pictures show?",
    "say in short what is in each picture.",
)
_CLOSED_TURNS = 3
_COUNT_SHARE = 0.3

Round = tuple[str, str]


def caption(entry_id: str, image: str, text: str, rng: random.Random) -> dict[str, Any]:
    """For stage 1: the picture in front of the request, or behind it."""
    request = rng.choice(_CAPTION_REQUESTS)
    entry = _entry(entry_id, [image], [(request, text)])
    if rng.random() < 0.5:
        entry["conversations"][0]["value"] = f"{request}\n{IMAGE_TAG}"
    return entry


def conversation(entry_id: str, image: str, scene: Scene, rng: random.Random) -> dict[str, Any]:
    """Several turns: requests to describe an object, and closed questions."""
    # Counting is drawn first: scenes of one object allow fewer other questions, and "one" would
    # become the usual answer.
    others = [category for category in questions.CATEGORIES if category != "count"]
    # Two-way questions teach least: they come up half as often.
    others.sort(key=lambda category: rng.random() * (2 if category in TWO_WAY else 1))
    wanted = ["count", *others] if rng.random() < _COUNT_SHARE else others
    drawn = (questions.ask(category, scene, rng) for category in wanted)
    asked = [question for question in drawn if question][:_CLOSED_TURNS]
    # What one turn tells, another would copy instead of seeing it.
    things = rng.sample(scene.things, len(scene.things))
    things.sort(key=lambda thing: sum(_tells(thing, question) for question in asked))
    # With half of the objects and one more, two turns in five are descriptions: those teach best
    # to tell objects apart.
    dense = things[: (len(things) + 2) // 2]
    rounds = [questions.describe(thing, rng) for thing in dense]
    rounds += [(question.text, question.answer) for question in asked]
    rng.shuffle(rounds)
    return _entry(entry_id, [image], rounds)


def _tells(thing: Thing, question: Question) -> bool:
    """Whether a description of the object answers the question, or half of it."""
    words = question.text.replace("?", " ").replace(",", " ")
    return (
        question.answer in (thing.shape, thing.colour, thing.text)
        or f"{thing.cell} " in words
        or f"{name(thing)} " in words
    )


def detail(entry_id: str, image: str, scene: Scene, rng: random.Random) -> dict[str, Any]:
    return _entry(entry_id, [image], [(rng.choice(_DESCRIPTION_REQUESTS), description(scene))])


def reasoning(entry_id: str, image: str, scene: Scene, rng: random.Random) -> dict[str, Any]:
    """A question whose answer follows by steps: they come first, then "so …"."""
    kinds = [_taken_away, _in_the_mirror, _next_to, _more_big, _alike]
    rng.shuffle(kinds)
    found = next(found for kind in kinds if (found := kind(scene, rng)))
    return _entry(entry_id, [image], [found])


def comparison(entry_id: str, images: Sequence[str], pair: Comparison) -> dict[str, Any]:
    """What differs, in a sentence; then the closed questions."""
    rounds = [("what is different in the second picture?", difference(pair))]
    rounds += [(question.text, question.answer) for question in compare(pair)]
    return _entry(entry_id, images, rounds)


def compare(pair: Comparison) -> list[Question]:
    """Closed questions about two pictures."""
    found = [
        Question("change", "what changed: a colour, a shape or the count?", _ARTICLE[pair.kind])
    ]
    if pair.kind == "count":
        more = "the second" if pair.after else "the first"
        found.append(Question("more", "which picture has more objects?", more))
    return found


_ARTICLE = {"colour": "a colour", "shape": "a shape", "count": "the count"}


def difference(pair: Comparison) -> str:
    before, after = pair.before, pair.after
    if before is None:
        assert after
        return f"there is one more object: {a(after)} at the {after.cell}."
    if after is None:
        return f"{the(before)} at the {before.cell} is gone."
    change = after.colour if pair.kind == "colour" else f"a {after.shape}"
    return f"{the(before)} at the {before.cell} is now {change}."


def summary(
    entry_id: str, images: Sequence[str], scenes: Sequence[Scene], rng: random.Random
) -> dict[str, Any]:
    """Several pictures, each in a sentence, and what they hold together."""
    sentences = [
        f"the {order} picture shows {listing([a(thing) for thing in scene.things])}."
        for order, scene in zip(("first", "second", "third"), scenes, strict=False)
    ]
    total = sum(len(scene.things) for scene in scenes)
    sentences.append(f"together they have {counted(total, 'object')}.")
    return _entry(entry_id, images, [(rng.choice(_SUMMARY_REQUESTS), " ".join(sentences))])


def _entry(entry_id: str, images: Sequence[str], rounds: Sequence[Round]) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(rounds):
        if number == 0:
            question = "\n".join([*[IMAGE_TAG] * len(images), question])
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    image = images[0] if len(images) == 1 else list(images)
    return {"id": entry_id, "image": image, "conversations": turns}


def _taken_away(scene: Scene, rng: random.Random) -> Round | None:
    number = len(scene.things)
    if number == 1:
        return None
    rest = NUMBERS[number - 1]
    return (
        f"how many objects are left without {the(rng.choice(scene.things))}?",
        f"there are {NUMBERS[number]} objects. {NUMBERS[number]} minus one is {rest}. "
        f"so it is {rest}.",
    )


def _in_the_mirror(scene: Scene, rng: random.Random) -> Round:
    thing = rng.choice(scene.things)
    side, other = ("left", "right") if thing.column == 0 else ("right", "left")
    return (
        f"where is {the(thing)} in a mirror?",
        f"{the(thing)} is at the {thing.cell}. a mirror makes {side} {other}. "
        f"so it is at the {thing.cell.replace(side, other)}.",
    )


def _next_to(scene: Scene, rng: random.Random) -> Round | None:
    """From one object to the one beside, below or above it."""
    found = []
    for thing in scene.things:
        for other in scene.things:
            if thing.row == other.row and thing.column != other.column:
                found.append((thing, other, "beside"))
            if thing.column == other.column and thing.row != other.row:
                found.append((thing, other, "below" if thing.row < other.row else "above"))
    if not found:
        return None
    thing, other, way = rng.choice(found)
    return (
        f"what is {way} {the(thing)}?",
        f"{the(thing)} is at the {thing.cell}. {way} it is the {other.cell}. so it is {a(other)}.",
    )


def _more_big(scene: Scene, rng: random.Random) -> Round | None:
    big = [thing.size for thing in scene.shapes].count("big")
    small = len(scene.shapes) - big
    if len(scene.shapes) < 2:
        return None
    if big == small:
        result = "so there are as many of both."
    else:
        result = f"so there are more {'big' if big > small else 'small'} shapes."
    return (
        "are there more big shapes or more small shapes?",
        f"big shapes: {NUMBERS[big]}. small shapes: {NUMBERS[small]}. {result}",
    )


def _alike(scene: Scene, rng: random.Random) -> Round | None:
    """Two objects of one colour, if there are just two."""
    by_colour: dict[str, list[Thing]] = {}
    for thing in scene.shapes:
        by_colour.setdefault(thing.colour, []).append(thing)
    pairs = [things for things in by_colour.values() if len(things) == 2]
    if len(pairs) != 1:
        return None
    [(one, other)] = pairs
    return (
        "which two objects are alike in colour?",
        f"the {one.shape} is {one.colour}. the {other.shape} is {one.colour}. "
        f"so it is the {one.shape} and the {other.shape}.",
    )
