"""The words of the world: how an object is called. All texts are lower case, but for signs."""

from collections.abc import Sequence

from llava_jax.picture_world.scenes import Thing

NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve".split()
)  # NUMBERS[3] is "three"


def name(thing: Thing) -> str:
    """red ring; sign"""
    return thing.shape if thing.is_sign else f"{thing.colour} {thing.shape}"


def a(thing: Thing) -> str:
    return f"a {name(thing)}"


def the(thing: Thing) -> str:
    return f"the {name(thing)}"


def full(thing: Thing) -> str:
    """a big red ring; a sign that says GO"""
    if thing.is_sign:
        return f"a sign that says {thing.text}"
    return f"a {thing.size} {name(thing)}"


def counted(number: int, noun: str) -> str:
    """one ring; two crosses"""
    if number != 1:
        noun += "es" if noun.endswith("ss") else "s"
    return f"{NUMBERS[number]} {noun}"


def listing(parts: Sequence[str]) -> str:
    """x; x and y; x, y and z"""
    *front, last = parts
    return f"{', '.join(front)} and {last}" if front else last
