"""What the small vision tower learns from: pictures, captions, and phrases about their regions.

Each of a picture's patches belongs to a quarter, and phrases say what is there, one kind of phrase
at a time: "a ring", "something red", "something big", "the top-left", "a red ring", "a sign that
says GO"; and of the whole picture "three objects", "a flat drawing on a dark background". A kind's
phrases are learned apart from each other, and one that occurs twice stands in the list once: no
patch is told that a phrase that is true of it belongs to another.

Dims: I images, K kinds of phrases, P patches, N texts, T tokens of a text.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llava_jax.picture_world import annotations, drawing
from llava_jax.picture_world.scenes import Scene, Thing, generator, scene
from llava_jax.picture_world.towers.notes import SIDE, cell_of
from llava_jax.picture_world.words import a, counted
from llava_jax.tokenizer import Tokenizer

KINDS = ("shape", "colour", "size", "place", "name", "sign", "count", "drawing")
NO_PHRASE = -1
NO_KIND = -1  # of a caption, and of padding
PHRASES = 64  # of all kinds together there are no more
PHRASE_TOKENS, CAPTION_TOKENS = 14, 40


class Pictured(NamedTuple):
    """A step: pictures, and texts of which some are true of them.

    token_RT   int32  phrases first, then a caption of each captioned picture; 0 behind their end
    last_R     int32  each text's last token
    kind_R     int32  of a phrase: its kind; of a caption and of empty rows NO_KIND
    pixel_IHW3 uint8
    phrase_IKP int32  which text of kind K is true of patch P, or NO_PHRASE
    caption_I  int32  which text is the picture's caption, or NO_PHRASE
    """

    token_RT: np.ndarray
    last_R: np.ndarray
    kind_R: np.ndarray
    pixel_IHW3: np.ndarray
    phrase_IKP: np.ndarray
    caption_I: np.ndarray


def phrases(one: Scene) -> dict[str, list[str | None]]:
    """Of every kind, each patch's phrase in reading order."""
    things = {thing.cell: thing for thing in one.things}
    count = counted(len(one.things), "object")
    drawn = f"a {one.style} drawing on a {one.background} background"
    told: dict[str, list[str | None]] = {kind: [] for kind in KINDS}
    for patch in range(SIDE * SIDE):
        cell = cell_of(patch)
        about = {**_of(things.get(cell)), "place": f"the {cell}", "count": count, "drawing": drawn}
        for kind in KINDS:
            told[kind].append(about[kind])
    return told


def _of(thing: Thing | None) -> dict[str, str | None]:
    if thing is None:
        return {**dict.fromkeys(("shape", "colour", "size", "name"), "nothing"), "sign": None}
    if thing.is_sign:
        says = f"a sign that says {thing.text}"
        return {**dict.fromkeys(("shape", "colour", "size", "name"), a(thing)), "sign": says}
    return {
        "shape": f"a {thing.shape}",
        "colour": f"something {thing.colour}",
        "size": f"something {thing.size}",
        "name": a(thing),
        "sign": None,
    }


def batches(
    tokenizer: Tokenizer, *, seed: int, images: int, captioned: int, size: int, first: int = 0
) -> Iterator[Pictured]:
    """Steps of fresh scenes of the train split, each drawn once; `captioned` of them captioned."""
    number = first
    while True:
        scenes = [scene(seed, "train", number + i) for i in range(images)]
        rng = generator(seed, "train", number, "phrases")
        yield batch(tokenizer, scenes, rng, captioned=captioned, size=size)
        number += images


def batch(
    tokenizer: Tokenizer, scenes: list[Scene], rng: random.Random, *, captioned: int, size: int
) -> Pictured:
    rows = PHRASES + captioned
    token_RT = np.zeros((rows, CAPTION_TOKENS), np.int32)
    last_R = np.zeros(rows, np.int32)
    kind_R = np.full(rows, NO_KIND, np.int32)

    def write(row: int, text: str) -> None:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)[: CAPTION_TOKENS - 2], tokenizer.eos_id]
        token_RT[row, : len(ids)] = ids
        last_R[row] = len(ids) - 1

    known: dict[tuple[int, str], int] = {}
    phrase_IKP = np.full((len(scenes), len(KINDS), SIDE * SIDE), NO_PHRASE, np.int32)
    for image, one in enumerate(scenes):
        for kind, told in enumerate(phrases(one).values()):
            for patch, text in enumerate(told):
                if text is None:
                    continue
                if (kind, text) not in known:
                    if len(known) == PHRASES:
                        continue
                    write(len(known), text)
                    kind_R[len(known)] = kind
                    known[kind, text] = len(known)
                phrase_IKP[image, kind, patch] = known[kind, text]
    caption_I = np.full(len(scenes), NO_PHRASE, np.int32)
    seen: dict[str, int] = {}
    for image in range(captioned):
        text = rng.choice(annotations.captions(scenes[image], rng))
        if text not in seen:
            seen[text] = PHRASES + len(seen)
            write(seen[text], text)
        caption_I[image] = seen[text]
    pixel_IHW3 = np.stack([np.asarray(drawing.draw(one, size)) for one in scenes])
    return Pictured(token_RT, last_R, kind_R, pixel_IHW3, phrase_IKP, caption_I)
