"""Pieces of a conversation to ids and their loss mask in one pass; then images to features.

Pieces are tokenised one by one, and still give what the whole text would: templates put the seams
before a space or a newline, and no id of LLaMA's reaches across one.

Dims: N ids, each image one of them. T tokens, each image's features counted. K images of P
features each.
"""

import bisect
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from llava_jax import conversation
from llava_jax.batch import TEXT
from llava_jax.conversation import Piece, Template, Turn
from llava_jax.tokenizer.ids import After, Tokenizer

IMAGE = -200  # stands for an image's features until `expand`, as in the reference's id lists


def render(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    """Ids, and which of them are learned. An image is one id, IMAGE."""
    ids: list[int] = []
    mask: list[bool] = []
    if tokenizer.adds_bos:
        ids, mask = [_named(tokenizer, Piece("bos"))], [False]
    after: After = "start"
    for piece in pieces:
        if piece.kind == "text":
            new, after = tokenizer.encode_next(piece.text, after, piece.parses)
        elif piece.kind == "image":
            new, after = [IMAGE], "start" if piece.restarts else "special"
        else:
            new, after = [_named(tokenizer, piece)], "special"
        ids += new
        mask += [piece.supervised and piece.kind != "image"] * len(new)
    return ids, mask


def _named(tokenizer: Tokenizer, piece: Piece) -> int:
    if piece.kind == "eos":
        return tokenizer.eos_id
    if piece.kind == "token":
        return tokenizer.id(piece.text)
    if tokenizer.bos_id is None:
        raise ValueError(
            "got a tokenizer without a token for the beginning of a text, expected one: this "
            "template needs it; choose template v1, or name bos_token in tokenizer_config.json"
        )
    return tokenizer.bos_id


def splice(
    ids: Sequence[int], mask: Sequence[bool], images: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """token_T, mask_T, image_index_T: each IMAGE replaced by that image's row of `images`.

    images: what image_index holds for each image: indices of its features, ROW_END between.
    """
    ids_N = np.asarray(ids, np.int32)
    places = np.flatnonzero(ids_N == IMAGE)
    if len(places) != len(images):
        raise ValueError(
            f"got {len(places)} image placeholders for {len(images)} images, expected as many"
        )
    length_N = np.ones(len(ids_N), np.int64)
    length_N[places] = [len(index) for index in images]
    token_T = np.repeat(np.where(ids_N == IMAGE, 0, ids_N), length_N).astype(np.int32)
    is_image_T = np.repeat(ids_N == IMAGE, length_N)
    index_T = np.full(len(token_T), TEXT, np.int32)
    if len(images):
        index_T[is_image_T] = np.concatenate(images)
    return token_T, np.repeat(np.asarray(mask, bool), length_N), index_T


def expand(
    ids: Sequence[int], mask: Sequence[bool], tokens_per_image: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """token_T, mask_T, image_index_T, with P places for each image: k·P + p for the k-th."""
    count = sum(id == IMAGE for id in ids)
    index_KP = np.arange(count * tokens_per_image).reshape(count, tokens_per_image)
    return splice(ids, mask, list(index_KP))


TooLong = Literal["cut_turns", "cut_tokens", "drop"]


class Fitted(NamedTuple):
    """A conversation that fits, and what that took. Dropped: no ids at all."""

    ids: list[int]
    mask: list[bool]
    cut_turns: int = 0
    cut_tokens: int = 0
    dropped: bool = False


def fit(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    template: Template,
    *,
    max_tokens: int,
    tokens_per_image: int,
    too_long: TooLong,
    image_last: bool | None = None,
) -> Fitted:
    """Renders a conversation to learn from into at most `max_tokens`, images counted in full.

    'cut_turns' leaves out rounds at the end, and if the first alone is too long, cuts its tokens;
    'cut_tokens' cuts the end off, between images, never through one; 'drop' gives the conversation
    up. So does a cut that leaves nothing to learn. cut_tokens counts an image as its features.
    """
    if too_long not in ("cut_turns", "cut_tokens", "drop"):
        raise ValueError(f"got too_long {too_long!r}, expected 'cut_turns', 'cut_tokens' or 'drop'")

    def rendered(count: int) -> tuple[list[int], list[bool], np.ndarray]:
        pieces = conversation.pieces(turns[:count], template, image_last=image_last)
        ids, mask = render(tokenizer, pieces)
        return ids, mask, np.cumsum([tokens_per_image if id == IMAGE else 1 for id in ids])

    kept = len(turns)
    ids, mask, ends = rendered(kept)
    if too_long == "cut_turns" and ends[-1] > max_tokens:
        # Turns alternate: a last question goes alone, an answer with its question. A round more
        # never makes a text shorter, so that halving finds the most that fit.
        first_round = 2 + (turns[0].role == "gpt")
        if shorter := range(first_round, kept, 2):
            fitting = bisect.bisect(shorter, max_tokens, key=lambda count: rendered(count)[2][-1])
            kept = shorter[max(fitting - 1, 0)]
            ids, mask, ends = rendered(kept)
    cut_turns = len(turns) - kept
    if ends[-1] <= max_tokens:
        return Fitted(ids, mask, cut_turns)
    fits = int(np.searchsorted(ends, max_tokens, side="right"))
    if too_long == "drop" or not any(mask[:fits]):
        return Fitted([], [], dropped=True)
    cut = int(ends[-1] - ends[fits - 1])
    return Fitted(ids[:fits], mask[:fits], cut_turns, cut)
