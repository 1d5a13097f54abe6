"""The page of what is trained on: read back, it says what went in."""

import dataclasses
import re

import numpy as np

from llava_jax.pages import inspection, rows
from llava_jax.pages.inspection import Distributions, Refusal, Table
from llava_jax.pages.markup import visible
from llava_jax.pages.rows import Picture, Segment
from tests.pages.reading import HOSTILE, Reading, empty_batch, text_row

NOTHING = Distributions(*[np.zeros(0)] * 6)


def page(*shown: rows.Row, **other) -> str:
    parts = {
        "title": "t",
        "facts": {},
        "composition": Table(["source"], []),
        "refusals": [],
        "distributions": NOTHING,
        **other,
    }
    return inspection.page(rows=list(shown), **parts)


def tokens(reading: Reading) -> list[tuple[str, bool, str]]:
    """Of each token of the rows: its text, whether it is marked as learned, its hover."""
    return [
        (e.text, e.within("span", "learned-text"), e.attributes["title"])
        for e in reading.elements
        if e.tag in ("i", "b") and e.within("article", "segment") and "title" in e.attributes
    ]


def test_tokens_come_out_as_they_went_in():
    row = text_row(
        [["<s>", "▁What", "?", "<0x0A>", "▁A", "▁cat", "</s>"], ["▁Hi", "▁", "yes"]],
        [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1]],
        padding=812,
        names=("llava_instruct", "000123", "2 turns cut"),
    )
    reading = Reading(page(row))
    assert tokens(reading) == [
        ("<s>", False, "<s>\nid 1000\nposition 0\nsegment 1"),
        (" What", False, "▁What\nid 1001\nposition 1\nsegment 1"),
        ("?", False, "?\nid 1002\nposition 2\nsegment 1"),
        ("↵\n", False, "<0x0A>\nid 1003\nposition 3\nsegment 1"),
        (" A", True, "▁A\nid 1004\nposition 4\nsegment 1\nlearned"),
        (" cat", True, "▁cat\nid 1005\nposition 5\nsegment 1\nlearned"),
        ("</s>", True, "</s>\nid 1006\nposition 6\nsegment 1\nlearned"),
        (" Hi", False, "▁Hi\nid 1007\nposition 0\nsegment 2"),
        (" ", False, "▁\nid 1008\nposition 1\nsegment 2"),
        ("yes", True, "yes\nid 1009\nposition 2\nsegment 2\nlearned"),
    ]
    first, second = (e.text for e in reading.of("article", "segment"))
    for text in ("segment 1", "llava_instruct", "000123", "7 tokens", "learned 3, 42.9 %"):
        assert text in first
    assert "2 turns cut" in first
    assert second.startswith("segment 2")
    assert "padding · 812" in [e.text for e in reading.of("span", "box")]
    listed = [e.text for e in reading.elements if e.tag == "pre"]
    assert listed[1].split("\n") == [
        "context: position, id, piece",
        "0\t1007\t▁Hi",
        "1\t1008\t▁",
        "learned: position, id, piece",
        "2\t1009\tyes",
    ]


def test_each_segment_has_its_own_name():
    row = text_row([["a", "b"], ["c", "d"]], [[0, 1], [0, 0]])
    row = dataclasses.replace(row, segments=[Segment("one", "1"), Segment("two", "2", ["cut"])])
    first, second = (
        e.text
        for e in Reading(page(row)).elements
        if e.within("article", "segment") and e.tag == "header"
    )
    assert first == "segment 1one12 tokenslearned 1, 50.0 %"
    assert second == "segment 2two22 tokenslearned 0, 0.0 %cut"


def test_a_weight_other_than_1_is_told():
    row = text_row([["a", "b"]], [[0, 0.5]])
    assert tokens(Reading(page(row)))[1][2] == "b\nid 1001\nposition 1\nsegment 1\nlearned × 0.5"


def test_a_special_token_is_told_from_text_that_spells_it():
    pieces = ["</s>", "</", "s", ">", "</s>"]
    row = text_row([pieces], [[0, 0, 0, 0, 1]], special_ids=[1000, 1004])
    reading = Reading(page(row))
    marked = [e.text for e in reading.of("b", "special") if e.within("article")]
    assert marked == ["</s>", "</s>"]
    hovers = [hover.split("\n")[1] for _, _, hover in tokens(reading)]
    assert hovers == ["id 1000, special", "id 1001", "id 1002", "id 1003", "id 1004, special"]
    assert "special token" in reading.of("div", "legend")[0].text
    unmarked = Reading(page(text_row([pieces], [[0] * 5])))
    assert "special token" not in unmarked.of("div", "legend")[0].text


def test_hostile_text_everywhere():
    row = text_row([HOSTILE], [[True] * len(HOSTILE)], names=(*HOSTILE[:2], *HOSTILE))
    made = page(
        row,
        title=HOSTILE[0],
        facts=dict(zip(HOSTILE, reversed(HOSTILE), strict=True)),
        composition=Table(HOSTILE, [HOSTILE]),
        refusals=[Refusal(text, 1, HOSTILE) for text in HOSTILE],
    )
    reading = Reading(made)
    shown = [text for text, _, _ in tokens(reading)]
    assert shown == [visible(text).replace(" ", "·") for text in HOSTILE]
    assert len(reading.of("script")) == 1
    names = [e.text for e in reading.of("dt")][: len(HOSTILE)]
    assert names == [visible(text).replace("↵\n", "\n") for text in HOSTILE]


def test_endless_words_neither_break_nor_bloat_the_page():
    word = "A" * 100_000
    row = text_row([[word, "b"]], [[0, 1]], names=(word, word, word))
    made = page(row, refusals=[Refusal("long", 1, [word])])
    assert tokens(Reading(made))[0][0] == word, "a token is shown whole"
    assert len(made) < 200_000


def with_images() -> rows.Row:
    P = 576
    batch = empty_batch(2 * P + 8, slots=3)
    batch.segment_RT[0, : 2 * P + 4] = 1
    batch.position_RT[0, : 2 * P + 4] = range(2 * P + 4)
    batch.image_index_RT[0, 1 : P + 1] = range(P)
    batch.image_index_RT[0, P + 2 : 2 * P + 2] = range(P, 2 * P)
    batch.loss_weight_RT[0, 2 * P + 2] = 1
    batch.pixel_RKHW3[0] = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    return rows.of_batch(
        batch,
        0,
        number=3,
        piece_T=["x"] * (2 * P + 8),
        tokens_per_image=P,
        pictures=[Picture("<a>.jpg", [0]), Picture("b.jpg: broken, replaced", [1])],
        segments=[Segment("s", "1")],
    )


def test_an_image_is_one_box_and_a_picture():
    row = with_images()
    assert (row.image_T == rows.NO_IMAGE).sum() == 8
    reading = Reading(page(row))
    assert len(tokens(reading)) == 4, "of 1,160"
    boxes = [e for e in reading.of("span", "box") if e.within("article")]
    assert [box.text for box in boxes] == ["image 0 · 576 tokens", "image 1 · 576 tokens"]
    assert "positions 1 to 576" in boxes[0].attributes["title"]
    figures = [e.text for e in reading.of("div", "pictures")[0:1]]
    assert "image 0 · segment 1 · <a>.jpg" in figures[0]
    assert "broken, replaced" in figures[0]
    assert len(re.findall("<img ", page(row))) == 4, "each once to look at, once in its place"


def test_the_strip_is_the_row_to_scale():
    row = with_images()
    strip = Reading(page(row)).of("div", "strip")[0]
    grows = [
        (e.attributes["class"], int(e.attributes["style"].removeprefix("flex-grow:")))
        for e in Reading(page(row)).elements
        if strip.attributes in [o.attributes for o in e.inside] and "class" in e.attributes
    ]
    assert grows == [
        ("context", 1),
        ("image", 576),
        ("context", 1),
        ("image", 576),
        ("context", 1),
        ("learned", 1),
        ("padding", 4),
    ]


def test_the_top_of_the_page():
    rng = np.random.default_rng(0)
    distributions = Distributions(
        length_N=rng.integers(10, 2048, 500),
        learned_share_N=rng.random(500),
        turns_N=rng.integers(1, 9, 500),
        images_N=rng.integers(0, 3, 500),
        conversations_M=rng.integers(1, 5, 99),
        fill_M=rng.random(99),
    )
    made = page(
        facts={"seed": 0, "template": "v1"},
        composition=Table(["source", "taken"], [["llava_instruct", 665298]]),
        refusals=[Refusal("empty answer", 3, ["id 1", "id 2"])],
        distributions=distributions,
    )
    reading = Reading(made)
    assert [e.text for e in reading.of("dd")] == ["0", "v1"]
    assert [e.text for e in reading.elements if e.tag == "td"] == [
        "llava_instruct",
        "665,298",
        "empty answer",
        "3",
        "id 1id 2",
    ]
    assert [e.text for e in reading.elements if e.tag == "li"] == ["id 1", "id 2"]
    captions = [e.text for e in reading.of("figcaption")]
    counts = [re.findall(r"^n (\d+) ", caption) for caption in captions]
    assert counts == [["500"]] * 4 + [["99"]] * 2
    assert "500 conversations in 99 rows" in reading.of("p", "lead")[0].text


def test_eight_full_rows_of_nothing_but_text_stay_a_page_of_sensible_size():
    row = text_row([["▁piece"] * 4096], [[1] * 4096])
    # Measured 2,919,104 bytes; 2,655,984 where nothing is learned.
    assert len(page(*[row] * 8).encode()) < 3e6
