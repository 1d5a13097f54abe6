"""A row in the terminal: what is learned, what is context, images, padding, by segment.

Colours are ANSI's; without them learned text stands in ⟦ ⟧, and special tokens in ⟪ ⟫. Nothing from
the data reaches the terminal as a control character.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_jax.batch import PADDING
from llava_jax.pages import rows
from llava_jax.pages.markup import one_line, share
from llava_jax.pages.rows import Row, Run

_RESET = "\x1b[0m"
_CODES = {
    "learned": "\x1b[1;4;36m",  # bold, underlined, cyan
    "learned special": "\x1b[1;4;7;36m",  # and its colours changed for each other
    "context": "",
    "context special": "\x1b[7m",
    "image": "\x1b[33m",
    "padding": "\x1b[2m",
    "rule": "\x1b[1m",
    "note": "\x1b[1;31m",
}
_PICTURE_CELLS = 24
_NARROWEST = 20


class _Part(NamedTuple):
    style: str
    text: str


# Parts that stay together on a line where that can be.
_Word = list[_Part]


def show(row: Row, *, colour: bool, width: int) -> str:
    """The row as lines of at most `width` cells (20 at least). colour: ANSI, and the pictures."""
    width = max(width, _NARROWEST)
    told = " · ".join(f"{name} {value}" for name, value in rows.facts(row))
    shown = rows.texts(row)
    lines = [
        *_lines(_words("rule", f"row {row.number:,} · {told}"), colour, width),
        *_lines(_legend(row, colour), colour, width),
        *(_drawn(row, width) if colour else ()),
    ]
    for number, runs in rows.by_segment(row):
        if number != PADDING:
            lines += ["", *_heading(row, number, runs, colour, width)]
        body = [word for run in runs for word in _run(row, run, shown, colour)]
        lines += _lines(body, colour, width)
    return "\n".join(lines) + "\n"


def _legend(row: Row, colour: bool) -> list[_Word]:
    special = "special token" if colour else "⟪special token⟫"
    return [
        *_words("learned", "learned" if colour else "⟦learned⟧"),
        *_words("context", " context (only read)"),
        *(
            [[_Part("context", " ")], *_words("context special", special)]
            if row.special_T.any()
            else ()
        ),
        *_words("image", " [image]"),
        *_words("padding", " [padding]"),
        *_words("context", " ↵ new line, · space, ‹E4› byte of a character"),
    ]


def _heading(row: Row, number: int, runs: Sequence[Run], colour: bool, width: int) -> Iterator[str]:
    segment = row.segments[number - 1]
    start, stop = runs[0].start, runs[-1].stop
    learned = int(np.count_nonzero(row.weight_T[start:stop] > 0))
    named = f"── segment {number} · {one_line(segment.source)} · {one_line(segment.example)}"
    told = f" · {stop - start:,} tokens · learned {learned:,}, {share(learned, stop - start)} "
    rest = "─" * max(2, width - _cells(named + told))
    yield from _lines(_words("rule", named + told + rest), colour, width)
    for note in segment.notes:
        yield from _lines(_words("note", f"! {one_line(note)}"), colour, width)


def _run(row: Row, run: Run, shown: Sequence[str], colour: bool) -> Iterator[_Word]:
    """The run's words: a token that begins with a space begins one."""
    if run.kind == "padding":
        yield [_Part("padding", f"[padding · {run.tokens:,}]")]
    elif run.kind == "image":
        caption = one_line(row.pictures[run.image].caption)
        yield [_Part("image", f"[image {run.image} · {run.tokens:,} tokens")]
        yield from _words("image", f" · {caption}]")
    else:
        special = row.special_T[run.start : run.stop].tolist()
        texts = list(shown[run.start : run.stop])
        if not colour:
            texts = [f"⟪{text}⟫" if yes else text for text, yes in zip(texts, special, strict=True)]
        if run.kind == "learned" and not colour:
            texts[0] = "⟦" + texts[0]
            # A line ends behind the bracket, not before it.
            texts[-1] = (texts[-1] + "⟧").replace("\n⟧", "⟧\n")
        word: _Word = []
        for text, yes in zip(texts, special, strict=True):
            if text.startswith((" ", "⟦ ")) and word:
                yield word
                word = []
            style = f"{run.kind} special" if yes else run.kind
            word.append(_Part(style, text.replace(" ", "·", 1) if " " in text[:2] else text))
        yield word


def _words(style: str, text: str) -> list[_Word]:
    first, *others = text.split(" ")
    return [[_Part(style, first)], *([_Part(style, f" {word}")] for word in others)]


def _lines(words: Sequence[_Word], colour: bool, width: int) -> list[str]:
    """Words on lines; a word longer than a line, and one with a line break inside, is parted."""
    lines: list[_Word] = [[]]
    used = 0
    for word in words:
        size = sum(_cells(text) for _, text in word)
        if used and used + size > width and size <= width:
            lines.append([])
            used = 0
        for style, text in word:
            for character in text:
                size = _cells(character)
                if character == "\n" or used + size > width:
                    lines.append([])
                    used = 0
                if character != "\n":
                    lines[-1].append(_Part(style, character))
                    used += size
    if not lines[-1]:
        lines.pop()
    return [_painted(line, colour) for line in lines]


def _painted(line: _Word, colour: bool) -> str:
    runs = [
        (style, "".join(part.text for part in parts))
        for style, parts in groupby(line, key=itemgetter(0))
    ]
    if not colour:
        return "".join(text for _, text in runs)
    return "".join(
        f"{_CODES[style]}{text}{_RESET}" if _CODES[style] else text for style, text in runs
    )


def _cells(text: str) -> int:
    """How many places the text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.category(c) in {"Mn", "Me"}
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _drawn(row: Row, width: int) -> Iterator[str]:
    """The pictures side by side in half blocks, in the 256 colours that every terminal knows."""
    cells = min(_PICTURE_CELLS, width)
    side_by_side = max(1, (width + 2) // (cells + 2))
    for first in range(0, len(row.pictures), side_by_side):
        together = row.pictures[first : first + side_by_side]
        names = [f"image {first + i}".ljust(cells) for i in range(len(together))]
        yield "  ".join(names).rstrip()
        blocks = [_half_blocks(row.pixel_KHW3[image.slots[0]], cells) for image in together]
        for lines in zip_longest(*blocks, fillvalue=" " * cells):
            yield "  ".join(lines)


def _half_blocks(pixel_HW3: np.ndarray, cells: int) -> list[str]:
    size = (cells, cells // 2 * 2)
    small = Image.fromarray(np.ascontiguousarray(pixel_HW3)).resize(size, Image.Resampling.BOX)
    levels_HW3 = (np.asarray(small).astype(int) + 25) // 51
    code_HW = 16 + levels_HW3 @ np.array([36, 6, 1])
    return [
        "".join(f"\x1b[38;5;{top};48;5;{low}m▀" for top, low in zip(*pair, strict=True)) + _RESET
        for pair in zip(code_HW[::2].tolist(), code_HW[1::2].tolist(), strict=True)
    ]
