"""A scene in notes: what a language model that sees nothing reads in a picture's place.

Nine notes of four words each, as many words as the vision tower has patches: "top-left big red
ring", "top-right sign says GO", "bottom-left there is nothing" of each quarter, twice, and "dark
background flat drawing" once, in any order. So a text of 36 words holds what a picture holds, and
says it more than once, as patches do.
"""

import random

from llava_jax.picture_world.scenes import CELLS, SIGN, Scene, Thing

SIDE = 6  # patches of a line, and lines
BLANK = "blank"  # a word that cannot be read
_COPIES = 2
_MOST_BLANK = 0.3


def cell_of(square: int) -> str:
    """The quarter of the picture in which a patch is."""
    row, column = divmod(square, SIDE)
    return CELLS[2 * (row // (SIDE // 2)) + column // (SIDE // 2)]


def notes(scene: Scene, rng: random.Random, *, blanks: bool = False) -> list[str]:
    """The words. With blanks, a few are left out, though of each quarter one note is whole."""
    things = {thing.cell: thing for thing in scene.things}
    whole = [_note(cell, things.get(cell)) for cell in CELLS]
    others = [list(note) for note in whole * (_COPIES - 1)]
    others.append([scene.background, "background", scene.style, "drawing"])
    if blanks:
        share = rng.uniform(0, _MOST_BLANK)
        others = [[BLANK if rng.random() < share else word for word in note] for note in others]
    every = [*whole, *others]
    rng.shuffle(every)
    return [word for note in every for word in note]


def _note(cell: str, thing: Thing | None) -> list[str]:
    if thing is None:
        return [cell, "there", "is", "nothing"]
    if thing.is_sign:
        return [cell, SIGN, "says", thing.text]
    return [cell, thing.size, thing.colour, thing.shape]
