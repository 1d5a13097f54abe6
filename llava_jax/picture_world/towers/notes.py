"""A scene in notes: what a language model that sees nothing reads in a picture's place.

A patch says everything at once: where it is, and what is there. So a note is a few words that are
read at once, their embeddings added up: "top-left big red ring", "top-right sign GO", "bottom-left
nothing". There is one note for each patch, in the patches' order, about what is in its quarter of
the picture; one of each quarter says what the drawing is like, "dark background flat drawing".

A language model of real size has read so much that it understands such heaps of words when a
projector makes them of patches. A small one has to be shown some.
"""

import random

from llava_jax.picture_world.scenes import CELLS, SIGN, Scene, Thing

SIDE = 6  # patches of a line, and lines
WORDS = 4  # of a note, at most
_MOST_BLANK = 0.6  # share of words left out

Note = tuple[str, ...]


def cell_of(square: int) -> str:
    """The quarter of the picture in which a patch is."""
    row, column = divmod(square, SIDE)
    return CELLS[2 * (row // (SIDE // 2)) + column // (SIDE // 2)]


def notes(scene: Scene, rng: random.Random, *, blanks: bool = False) -> list[Note]:
    """One for each patch. With blanks, words are left out, though of each quarter one note is
    whole."""
    things = {thing.cell: thing for thing in scene.things}
    found = [_note(cell_of(square), things.get(cell_of(square))) for square in range(SIDE**2)]
    kept = set()
    for cell in CELLS:
        mine = [square for square in range(SIDE**2) if cell_of(square) == cell]
        kept.add(rng.choice(mine))
        found[rng.choice([square for square in mine if square not in kept])] = (
            scene.background,
            "background",
            scene.style,
            "drawing",
        )
    if not blanks:
        return found
    share = rng.uniform(0, _MOST_BLANK)
    return [
        note if square in kept else tuple(word for word in note if rng.random() >= share)
        for square, note in enumerate(found)
    ]


def _note(cell: str, thing: Thing | None) -> Note:
    if thing is None:
        return cell, "nothing"
    if thing.is_sign:
        return cell, SIGN, thing.text
    return cell, thing.size, thing.colour, thing.shape
