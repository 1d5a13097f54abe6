"""A row says of each token what the batch says of it, where people look for it."""

import numpy as np
import pytest

from llava_jax.batch import ROW_END, TEXT, fake_batch, validate
from llava_jax.pages import rows
from llava_jax.pages.rows import Picture, Run, Segment
from tests.pages.reading import empty_batch, text_row

P = 4


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_is_learned_is_what_the_batch_asks_for(number):
    batch = fake_batch(
        rows=3, tokens=96, images=3, tokens_per_image=P, image_size=8, vocab_size=50, segments=2
    )
    validate(batch, tokens_per_image=P, image_size=8, vocab_size=50)
    row = rows.of_batch(
        batch,
        number,
        number=41,
        piece_T=[str(id) for id in batch.token_RT[number]],
        tokens_per_image=P,
        pictures=[Picture(str(k), [k]) for k in range(3)],
        segments=[Segment("a", "1"), Segment("b", "2")],
    )
    learned = {t for run in flat(row) if run.kind == "learned" for t in range(run.start, run.stop)}
    asked_for = np.flatnonzero(batch.loss_weight_RT[number] > 0)
    assert learned == {t + 1 for t in asked_for}
    for t in asked_for:
        assert row.token_T[t + 1] == batch.target_RT[number, t]
    assert row.learned == len(asked_for) > 0

    covered = [t for run in flat(row) for t in range(run.start, run.stop)]
    assert covered == list(range(96))
    for segment, runs in rows.by_segment(row):
        of_segment = [t for run in runs for t in range(run.start, run.stop)]
        np.testing.assert_array_equal(
            np.flatnonzero(batch.segment_RT[number] == segment), of_segment
        )
    images = [run for run in flat(row) if run.kind == "image"]
    assert sorted(run.image for run in images) == [0, 1, 2]
    for run in images:
        index = batch.image_index_RT[number, run.start : run.stop]
        assert index.tolist() == list(range(run.image * P, (run.image + 1) * P))
    assert flat(row)[-1].kind == "padding"
    assert row.filled == np.count_nonzero(batch.segment_RT[number])


def flat(row: rows.Row) -> list[Run]:
    return [run for _, runs in rows.by_segment(row) for run in runs]


def test_tiles_and_row_ends_are_one_image():
    batch = empty_batch(14, slots=3)
    batch.segment_RT[0, :13] = 1
    batch.image_index_RT[0, 1:12] = [0, 1, ROW_END, 4, 6, ROW_END, 5, 7, ROW_END, 8, 9]
    row = rows.of_batch(
        batch,
        0,
        number=0,
        piece_T=["x"] * 14,
        tokens_per_image=P,
        pictures=[Picture("tiles", [0, 1]), Picture("single", [2])],
        segments=[Segment("a", "1")],
    )
    assert flat(row) == [
        Run("context", 0, 1, rows.NO_IMAGE),
        Run("image", 1, 10, 0),
        Run("image", 10, 12, 1),
        Run("context", 12, 13, rows.NO_IMAGE),
        Run("padding", 13, 14, rows.NO_IMAGE),
    ]
    assert (batch.image_index_RT[0] == TEXT).sum() == 3
    assert dict(rows.facts(row))["images"] == "2"


def test_the_figures_of_a_row():
    row = text_row([["a", "b", "c"], ["d"]], [[0, 1, 1], [0]], padding=4)
    assert rows.facts(row) == [
        ("learned", "2 of 4 tokens, 50.0 %"),
        ("fill", "4 of 8 places, 50.0 %"),
        ("conversations", "2"),
        ("images", "0"),
    ]


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["▁the", " cat", "s"], [" the", " cat", "s"]),
        (["▁", "▁▁▁a", "a▁b c"], [" ", " ··a", "a·b·c"]),
        (["<0x0A>", "\n", "<0x09>", "<0x00>"], ["↵\n", "↵\n", "⇥", "␀"]),
        (["<0x0a>", "<0xAG>", "<0x0A> "], ["<0x0a>", "<0xAG>", "<0x0A>·"]),
        (["<0xE4>", "<0xBD>", "<0xA0>", "a"], ["‹E4›", "‹BD›", "你", "a"]),
        ([b"\xe4\xbd", b"\xa0\xe5", b"\xa5\xbd!"], ["‹E4›‹BD›", "你‹E5›", "好!"]),
        ([b" you", b"\xf0\x9f", b"\x9a\x95"], [" you", "‹F0›‹9F›", "🚕"]),
        (["<0xE4>", "a", "<0xBD>"], ["‹E4›", "a", "‹BD›"]),
        (["<0xE4>", "<0xFF>", "<0xE4>", "<0x41>"], ["‹E4›", "‹FF›", "‹E4›", "A"]),
        (["<0xED>", "<0xA0>", "<0x80>"], ["‹ED›", "‹A0›", "‹80›"]),
        ([b"", "", "a"], ["", "", "a"]),
        (["\u0301a", "▁\u0301"], ["◌\u0301a", " ◌\u0301"]),
        (["\udc80", "\u202e▁", "\x1b"], ["⟨U+DC80⟩", "⟨U+202E⟩·", "␛"]),
    ],
)
def test_pieces_as_people_read_them(pieces, shown):
    assert rows.texts(text_row([pieces], [[0] * len(pieces)])) == shown


def test_bytes_do_not_join_over_the_border_of_a_segment():
    row = text_row([["<0xE4>", "<0xBD>"], ["<0xA0>"]], [[0, 0], [0]])
    assert rows.texts(row) == ["‹E4›", "‹BD›", "‹A0›"]


def test_any_bytes_one_token_each_are_read_as_their_characters():
    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.integers(0x21, 0xD800, 500))).encode() + bytes(range(0x80, 0x100))
    shown = rows.texts(text_row([[bytes([byte]) for byte in text]], [[0] * len(text)]))
    assert len(shown) == len(text)
    for byte, piece in zip(text, shown, strict=True):
        assert piece == f"‹{byte:02X}›" or byte < 0x80 or 0x80 <= byte < 0xC0
    whole = rows.texts(text_row([[text]], [[0]]))[0]
    joined = "".join(piece for piece in shown if not piece.startswith("‹"))
    plain = "".join(c for c in text[:-128].decode())
    assert [c for c in whole if c in plain] == [c for c in joined if c in plain]


def test_raw_pieces():
    assert rows.spelling("▁the\n") == "▁the↵"
    assert rows.spelling(b"\xe4\xbd") == "‹E4 BD›"
