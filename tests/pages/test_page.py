"""The shell: nothing from outside, nothing to run but one script, the very pixels."""

import base64
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from llava_jax.pages.markup import element
from llava_jax.pages.page import Section, document, facts, picture, table, thumbnail
from tests.pages.reading import HOSTILE, Reading


def test_hostile_text_everywhere():
    for text in HOSTILE:
        sections = [Section("a", text, facts([(text, text)])), Section("b", "B", table([text], []))]
        reading = Reading(document(text, sections, lead=text))
        scripts = [e for e in reading.elements if e.tag == "script"]
        assert len(scripts) == 1
        assert [e.text for e in reading.of("a")] == [reading.of("h2")[0].text, "B"]
        assert reading.of("h1")[0].text == reading.of("title")[0].text == reading.of("dd")[0].text


def test_the_browser_is_told_to_load_nothing_and_to_run_this_script_only():
    reading = Reading(document("t", []))
    (policy,) = [
        e.attributes["content"]
        for e in reading.elements
        if e.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    script = reading.of("script")[0].text
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["img-src"] == "data:"
    page = document("t", [Section("a", "A", picture(np.zeros((2, 2, 3), np.uint8), alt=""))])
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page


def test_a_picture_is_the_very_pixels():
    pixel_HW3 = np.random.default_rng(0).integers(0, 256, (13, 7, 3), np.uint8)
    image = Reading(picture(pixel_HW3, alt='"<x>"')).elements[0].attributes
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixel_HW3)
    assert (image["width"], image["height"], image["alt"]) == ("7", "13", '"<x>"')


def test_a_thumbnail_keeps_the_shape():
    image = Reading(thumbnail(np.zeros((40, 400, 3), np.uint8), side=20, alt="")).elements[0]
    assert (image.attributes["width"], image.attributes["height"]) == ("20", "2")


@pytest.mark.parametrize("pixels", [np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.uint8)])
def test_what_is_no_picture_is_a_bug(pixels):
    with pytest.raises(AssertionError):
        picture(pixels, alt="")


def test_a_table_sets_columns_of_numbers_right():
    reading = Reading(table(["name", "n", "%"], [["a", 1234567, "1.5 %"], ["2 b", 3, "–"]]))
    cells = [(e.text, e.attributes.get("class")) for e in reading.elements if e.tag == "td"]
    assert cells == [
        ("a", None),
        ("1,234,567", "number"),
        ("1.5 %", "number"),
        ("2 b", None),
        ("3", "number"),
        ("–", "number"),
    ]
    # A total has no figure in some columns; these are of numbers still.
    reading = Reading(table(["name", "epochs", "note"], [["a", "1", ""], ["all", "", ""]]))
    classes = [e.attributes.get("class") for e in reading.elements if e.tag == "td"]
    assert classes == [None, "number", None] * 2


def test_each_cell_names_its_column_for_where_there_is_no_head():
    reading = Reading(table(["name", '"n"'], [["a", 1], [element("i", "<b>"), 2]]))
    cells = [(e.attributes["data-column"], e.text) for e in reading.elements if e.tag == "td"]
    assert cells == [("name", "a"), ('"n"', "1"), ("name", "<b>"), ('"n"', "2")]


def test_lines_of_a_value_stay_lines():
    assert Reading(facts([("sources", "a\nb")])).of("dd")[0].text == "a\nb"
    assert Reading(element("td", "a\nb")).of("td")[0].text == "a\nb"
