"""Text that is not trusted comes out as text, and can be seen."""

import random
import sys
from html.parser import HTMLParser

import pytest

from llava_jax.pages.markup import Html, element, escape, join, number, one_line, share, visible
from tests.pages.reading import HOSTILE


class Text(HTMLParser):
    """All text of a piece of markup; a tag in it is an error."""

    def __init__(self, markup: str):
        super().__init__()
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_data(self, data: str):
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        raise AssertionError(tag)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain <b> & 'quoted'", "plain <b> & 'quoted'"),
        ("two\nlines\tand a tab", "two↵\nlines⇥and a tab"),
        ("\x00\x1b\r\x7f", "␀␛␍␡"),
        ("a\u202eb\u2066c", "a⟨U+202E⟩b⟨U+2066⟩c"),
        ("\ud800\udfff", "⟨U+D800⟩⟨U+DFFF⟩"),
        ("\u00a0\u200b\u2028\u3164\U000e0041", "⟨U+00A0⟩⟨U+200B⟩⟨U+2028⟩⟨U+3164⟩⟨U+E0041⟩"),
        ("blank\u3164\u2800", "blank⟨U+3164⟩⟨U+2800⟩"),
        ("下雨 שלום é 🚕 ▁·↵", "下雨 שלום é 🚕 ▁·↵"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_any_character_comes_back_from_markup_and_can_be_encoded():
    rng = random.Random(0)
    characters = [chr(rng.randrange(sys.maxunicode + 1)) for _ in range(20_000)]
    characters += map(chr, range(0x300))
    text = "".join(characters)
    shown = visible(text)
    shown.encode()
    assert shown.replace("\n", "").isprintable()
    assert Text(escape(text)).text == "\n".join(map(visible, text.split("\n")))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    once = escape(text)
    assert Text(once).text == visible(text)
    assert escape(once) is once, "what is escaped is not escaped again"
    made = element("p", text, title=text, class_="a")
    assert made == f'<p title="{once}" class="a">{once}</p>'


def test_only_finished_markup_goes_in_as_it_is():
    inner = element("b", "<")
    assert element("p", inner, str(inner)) == "<p><b>&lt;</b>&lt;b&gt;&amp;lt;&lt;/b&gt;</p>"
    assert join("<", Html("<br>"), between="&") == "&lt;&amp;<br>"
    assert element("p", title=inner) == '<p title="&lt;b&gt;&amp;lt;&lt;/b&gt;"></p>'
    assert element("meta", http_equiv="a", width=3, x=0.5) == (
        '<meta http-equiv="a" width="3" x="0.5">'
    )


def test_long_text_is_cut_and_says_so():
    assert one_line("short\ntext") == "short↵text"
    assert one_line("A" * 100_000) == "A" * 300 + "… (99,700 more characters)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (0.012345, "0.0123"),
        (-3.0, "-3"),
        (1e300, "1e+300"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_share():
    assert share(1, 3) == "33.3 %"
    assert share(0, 0) == "–"
