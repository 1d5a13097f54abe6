"""A row in the terminal: what is learned can be told with and without colour, and nothing acts."""

import re
import unicodedata

import numpy as np
import pytest

from llava_jax.batch import fake_batch
from llava_jax.pages import rows
from llava_jax.pages.markup import visible
from llava_jax.pages.rows import Picture, Segment
from llava_jax.pages.terminal import show
from tests.pages.reading import HOSTILE, text_row

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def body(shown: str) -> str:
    """What stands below the first segment's heading."""
    lines = shown.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("── segment 1"))
    return "\n".join(lines[first + 1 :])


def test_without_colour_learned_text_stands_in_brackets():
    row = text_row(
        [["<s>", "▁Hi", "▁A", "▁cat", "s", "</s>", "▁USER"], ["a", "b"]],
        [[0, 0, 1, 1, 1, 1, 0], [0, 1]],
        padding=5,
        names=("instruct", "000123", "2 turns cut"),
    )
    shown = show(row, colour=False, width=80)
    assert shown == "\n".join(
        [
            "row 7 · learned 5 of 9 tokens, 55.6 % · fill 9 of 14 places, 64.3 % ·",
            " conversations 2 · images 0",
            "⟦learned⟧ context (only read) [image] [padding] ↵ new line, · space, ‹E4› byte",
            " of a character",
            "",
            "── segment 1 · instruct · 000123 · 7 tokens · learned 4, 57.1 % ────────────────",
            "! 2 turns cut",
            "<s>·Hi⟦·A·cats</s>⟧·USER",
            "",
            "── segment 2 · instruct · 000123 · 2 tokens · learned 1, 50.0 % ────────────────",
            "! 2 turns cut",
            "a⟦b⟧",
            "[padding · 5]",
            "",
        ]
    )


def test_with_colour_the_same_text_is_underlined():
    row = text_row([["a", "▁b", "<0x0A>", "c"]], [[0, 1, 1, 0]])
    coloured = show(row, colour=True, width=80)
    assert "a\x1b[1;4;36m·b↵\x1b[0m\nc\n" in coloured
    plain = show(row, colour=False, width=80)
    assert "\x1b" not in plain
    assert body(ANSI.sub("", coloured)) == body(plain.replace("⟦", "").replace("⟧", ""))


def test_a_special_token_is_told_from_text_that_spells_it():
    row = text_row(
        [["<s>", "▁a", "</", "s", ">", "</s>", "b"]],
        [[0, 0, 1, 1, 1, 1, 0]],
        special_ids=[1000, 1005],
    )
    plain = show(row, colour=False, width=80)
    assert body(plain) == "⟪<s>⟫·a⟦</s>⟪</s>⟫⟧b\n"
    assert "⟪special token⟫" in plain
    coloured = show(row, colour=True, width=80).split("\n")[-2]
    learned, turned, off = "\x1b[1;4;36m", "\x1b[1;4;7;36m", "\x1b[0m"
    assert coloured == f"\x1b[7m<s>{off}·a{learned}</s>{off}{turned}</s>{off}b"
    assert "special" not in show(text_row([["</s>"]], [[0]]), colour=False, width=80)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [0, 20, 33, 80, 500])
def test_hostile_text_neither_acts_nor_leaves_its_lines(width, colour):
    row = text_row(
        [[*HOSTILE, "A" * 1000, "下" * 100, "a\u0301" * 100]],
        [[True] * 7 + [False] * 6],
        names=(HOSTILE[4], HOSTILE[5], *HOSTILE),
    )
    shown = show(row, colour=colour, width=width)
    shown.encode()
    text = ANSI.sub("", shown)
    assert text.replace("\n", "").isprintable()
    for line in text.split("\n"):
        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
        marks = sum(unicodedata.category(c) == "Mn" for c in line)
        assert len(line) + wide - marks <= max(width, 20)
    pieces = "".join(visible(str(piece)).replace(" ", "·") for piece in row.piece_T)
    flat = re.sub("[⟦⟧\n]", "", body(text))
    assert flat.endswith(re.sub("\n", "", pieces))


def test_a_bracket_closes_before_the_line_ends():
    shown = show(text_row([["a", "<0x0A>", "b"]], [[0, 1, 0]]), colour=False, width=80)
    assert body(shown) == "a⟦↵⟧\nb\n"


@pytest.mark.parametrize(("letter", "on_a_line"), [("a", 20), ("a\u0301", 20), ("下", 10)])
def test_lines_are_filled(letter, on_a_line):
    shown = show(text_row([[letter * 60]], [[0]]), colour=False, width=20)
    lines = shown.split("\n")
    assert lines.count(letter * on_a_line) == 60 // on_a_line


def image_row() -> rows.Row:
    batch = fake_batch(rows=1, tokens=48, images=2, tokens_per_image=4, image_size=8, vocab_size=50)
    batch.pixel_RKHW3[0, 0] = 255
    batch.pixel_RKHW3[0, 1] = (255, 0, 0)
    return rows.of_batch(
        batch,
        0,
        number=0,
        piece_T=["x"] * 48,
        tokens_per_image=4,
        pictures=[Picture("a.jpg", [0]), Picture("b.jpg", [1])],
        segments=[Segment("s", "1"), Segment("s", "2")],
    )


def test_images_are_boxes_and_with_colour_pictures():
    row = image_row()
    plain = show(row, colour=False, width=80)
    assert "[image 0 · 4 tokens · a.jpg]" in plain
    assert "[image 1 · 4 tokens · b.jpg]" in plain
    coloured = show(row, colour=True, width=80)
    white, red = "\x1b[38;5;231;48;5;231m▀", "\x1b[38;5;196;48;5;196m▀"
    line = white * 24 + "\x1b[0m  " + red * 24 + "\x1b[0m\n"
    assert coloured.count(line) == 12, "24 × 24 pixels, two in each place"
    narrow = show(row, colour=True, width=20).split("\n")
    assert narrow.count(white * 20 + "\x1b[0m") == narrow.count(red * 20 + "\x1b[0m") == 10


def test_images_do_not_hide_what_is_learned():
    row = image_row()
    learned = np.count_nonzero(row.weight_T > 0)
    marked = re.findall("⟦([^⟧]*)⟧", body(show(row, colour=False, width=80)))
    assert sum(run.count("x") for run in marked) == learned > 0
