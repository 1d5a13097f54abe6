"""A row of a batch as people read it: what is learned, what is context, images, padding.

A batch holds a token's weight one place before it, where it is predicted from. Here it stands at
the token that is learned.

Dims: T tokens, K image slots of the row, H height, W width, 3 RGB.
"""

import codecs
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from llava_jax.batch import PADDING, ROW_END, TEXT, Batch
from llava_jax.pages.markup import one_line, share, visible

Kind = Literal["learned", "context", "image", "padding"]
NO_IMAGE = -1

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is no character, between two codecs


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a row. slots: where its pixels are; several where it was cut into tiles.

    caption: a name for people: its file, or that it was broken and stands for nothing.
    """

    caption: str
    slots: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A conversation of a row. notes: what befell it: '2 turns cut', 'picture broken: …'."""

    source: str
    example: str
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A row, with what people need to read it. `of_batch` makes one.

    piece_T: as the tokenizer spells it, '▁the' or '<0x0A>'; bytes where it works with bytes.
    weight_T: the weight with which this token is learned; 0 = only read.
    special_T: whether it is a special token, rather than text that spells one.
    image_T: which of `pictures` a token is part of, else NO_IMAGE.
    segments: of segment 1, 2, … in this order.
    """

    number: int
    token_T: np.ndarray
    piece_T: Sequence[str | bytes]
    weight_T: np.ndarray
    special_T: np.ndarray
    segment_T: np.ndarray
    position_T: np.ndarray
    image_T: np.ndarray
    pixel_KHW3: np.ndarray
    pictures: Sequence[Picture]
    segments: Sequence[Segment]

    @property
    def tokens(self) -> int:
        return len(self.token_T)

    @property
    def filled(self) -> int:
        return int(np.count_nonzero(self.segment_T != PADDING))

    @property
    def learned(self) -> int:
        return int(np.count_nonzero(self.weight_T > 0))


def of_batch(
    batch: Batch,
    row: int,
    *,
    number: int,
    piece_T: Sequence[str | bytes],
    tokens_per_image: int,
    pictures: Sequence[Picture],
    segments: Sequence[Segment],
    special_ids: Iterable[int] = (),
) -> Row:
    """A row of a valid batch. number: what people call it, as in the packing plan.

    piece_T: of every token; what stands at images and padding is not looked at.
    special_ids: of tokens to mark as special: </s>, <im_start>, …
    """
    index_T, segment_T = batch.image_index_RT[row], batch.segment_RT[row]
    assert len(piece_T) == len(index_T), (len(piece_T), len(index_T))
    assert len(segments) == segment_T.max(initial=0), (len(segments), segment_T.max(initial=0))
    image_of_slot = {slot: k for k, picture in enumerate(pictures) for slot in picture.slots}
    image_T = np.full(len(index_T), NO_IMAGE, np.int32)
    for t in np.flatnonzero(index_T != TEXT):
        # A row's end has no slot of its own: it belongs to the features before it.
        at_end = index_T[t] == ROW_END
        image_T[t] = image_T[t - 1] if at_end else image_of_slot[index_T[t] // tokens_per_image]
    return Row(
        number=number,
        token_T=batch.token_RT[row],
        piece_T=piece_T,
        weight_T=np.append(np.float32(0), batch.loss_weight_RT[row, :-1]),
        special_T=np.isin(batch.token_RT[row], list(special_ids)),
        segment_T=segment_T,
        position_T=batch.position_RT[row],
        image_T=image_T,
        pixel_KHW3=batch.pixel_RKHW3[row],
        pictures=pictures,
        segments=segments,
    )


class Run(NamedTuple):
    """Tokens start … stop − 1, all of one kind. image: which picture, where the kind is image."""

    kind: Kind
    start: int
    stop: int
    image: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def by_segment(row: Row) -> Iterator[tuple[int, list[Run]]]:
    """The row's segments in order, padding (segment 0) included, each as runs of one kind."""
    is_image_T = row.image_T != NO_IMAGE
    kind_T = np.where(is_image_T, 2, (row.weight_T > 0).astype(int))
    kind_T = np.where(row.segment_T == PADDING, 3, kind_T)
    names: tuple[Kind, ...] = ("context", "learned", "image", "padding")
    what_3T = np.stack([row.segment_T, kind_T, row.image_T])
    starts = np.flatnonzero(np.append(True, (what_3T[:, 1:] != what_3T[:, :-1]).any(0)))
    stops = np.append(starts[1:], row.tokens)
    runs: list[Run] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        runs.append(Run(names[kind_T[start]], start, stop, int(row.image_T[start])))
        if stop == row.tokens or row.segment_T[stop] != row.segment_T[start]:
            yield int(row.segment_T[start]), runs
            runs = []


def texts(row: Row) -> list[str]:
    """What to show for each token: a space that begins it stays one, inside it is a '·'.

    Bytes that are a part of a character are shown as ‹E4›, the last of them as the character.
    """
    shown: list[str] = []
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for t, piece in enumerate(map(_meant, row.piece_T)):
        if isinstance(piece, str) or (t > 0 and row.segment_T[t] != row.segment_T[t - 1]):
            decoder.reset()
        shown.append(_spaced(piece if isinstance(piece, str) else _decoded(decoder, piece)))
    return shown


def spelling(piece: str | bytes) -> str:
    """The raw piece on one line."""
    return one_line(piece) if isinstance(piece, str) else f"‹{piece.hex(' ').upper()}›"


def _meant(piece: str | bytes) -> str | bytes:
    spelled = _BYTE_PIECE.fullmatch(piece) if isinstance(piece, str) else None
    return bytes.fromhex(spelled[1]) if spelled else piece


def _decoded(decoder: codecs.IncrementalDecoder, new: bytes) -> str:
    """Text of new bytes behind what the decoder was given before."""
    shown_before = len(decoder.getstate()[0])
    text = decoder.decode(new)
    # Earlier bytes that turn out to begin no character come out now; their tokens showed them.
    while shown_before and _ESCAPED.match(text):
        text, shown_before = text[1:], shown_before - 1
    unfinished = decoder.getstate()[0]
    mine = unfinished[max(0, len(unfinished) - len(new)) :]
    text += mine.decode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda byte: f"‹{ord(byte[0]) - 0xDC00:02X}›", text)


def _spaced(text: str) -> str:
    space = " " if text[:1] in {" ", "▁"} else ""
    rest = visible(text[len(space) :])
    rest = rest.replace(" ", "·").replace("▁", "·")
    # An accent would else be put on the token before.
    return space + ("◌" if rest and unicodedata.combining(rest[0]) else "") + rest


def facts(row: Row) -> list[tuple[str, str]]:
    """What to know of a row at a glance, by name."""
    images = np.unique(row.image_T[row.image_T != NO_IMAGE]).size
    return [
        ("learned", f"{row.learned:,} of {row.filled:,} tokens, {share(row.learned, row.filled)}"),
        ("fill", f"{row.filled:,} of {row.tokens:,} places, {share(row.filled, row.tokens)}"),
        ("conversations", f"{len(row.segments):,}"),
        ("images", f"{images:,}"),
    ]
