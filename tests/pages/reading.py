"""Reads a page back with the standard library's parser, and makes rows to put on one."""

from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np

from llava_jax.batch import TEXT, Batch
from llava_jax.pages import rows

TAGS = set(
    "html head meta link title style body header nav main section article h1 h2 h3 p a div span dl "
    "dt dd b i small ul li table thead tbody tr th td figure figcaption img details summary pre "
    "output svg g rect line path text script".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name rel href class id title style src alt width height "
    "tabindex role data-column aria-label aria-live aria-hidden viewbox x y x1 x2 y1 y2 d "
    "text-anchor".split()
)
VOID = {"meta", "link", "img"}

HOSTILE = [
    "</span></div><script>alert(1)</script>",
    "\" onmouseover=\"alert(1)' x='",
    "<!-- <![CDATA[ &lt;b&gt; &#0; &notanentity",
    "\u202eright to left\u2066\u200f\u061c",
    "\x00\x01\x1b[31mred\x1b]0;title\x07\r\x7f\x85",
    "\ud800 lone \udfff surrogates \udc80",
    "\ufeff\u200b\u2028\u2029\u00a0\u3164\ufffe\U000e0041",
    "]]></style></title></script></textarea>",
    "javascript:alert(1)",
    "e\u0301\u0301\u0301\u0301 \u00ad 🚕👩‍👧 下雨 שלום عربي",
]


class Element:
    def __init__(self, tag: str, attributes: dict[str, str], inside: tuple["Element", ...]):
        self.tag, self.attributes, self.inside, self.text = tag, attributes, inside, ""

    def within(self, tag: str = "", class_: str = "") -> bool:
        """Whether it is, or stands within, such an element."""
        return any(
            tag in ("", other.tag)
            and (not class_ or class_ in other.attributes.get("class", "").split())
            for other in (self, *self.inside)
        )


class Reading(HTMLParser):
    """The elements of a page in order, each with the text in it. Fails where tags do not pair."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        page.encode()
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        attributes = {name: value or "" for name, value in attrs}
        assert tag in TAGS, tag
        assert set(attributes) <= ATTRIBUTES, (tag, attributes)
        assert len(attributes) == len(attrs)
        element = Element(tag, attributes, tuple(self._open))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str):
        assert self._open.pop().tag == tag

    def handle_data(self, data: str):
        for element in self._open:
            element.text += data

    def handle_comment(self, data: str):
        raise AssertionError(data)

    def handle_pi(self, data: str):
        raise AssertionError(data)

    def unknown_decl(self, data: str):
        raise AssertionError(data)

    def of(self, tag: str = "", class_: str = "") -> list[Element]:
        """The outermost elements of this kind."""
        return [
            element
            for element in self.elements
            if Element("", {}, (element,)).within(tag, class_)
            and not any(Element("", {}, (o,)).within(tag, class_) for o in element.inside)
        ]


def text_row(
    pieces: Sequence[Sequence[str | bytes]],
    learned: Sequence[Sequence[float]],
    *,
    padding: int = 0,
    names: Sequence[str] = ("source", "example"),
    special_ids: Sequence[int] = (),
) -> rows.Row:
    """A row of text alone: pieces of each segment, and with which weights they are learned.

    The first token has id 1000, the next 1001, and so on.
    """
    lengths = [len(segment) for segment in pieces]
    tokens = sum(lengths) + padding
    batch = empty_batch(tokens, slots=0)
    weight_T = np.zeros(tokens + 1, np.float32)
    start = 0
    for number, (length, mask) in enumerate(zip(lengths, learned, strict=True), 1):
        batch.segment_RT[0, start : start + length] = number
        batch.position_RT[0, start : start + length] = range(length)
        weight_T[start : start + length] = mask
        start += length
    batch.token_RT[0] = 1000 + np.arange(tokens)
    batch.loss_weight_RT[0] = weight_T[1:]
    flat = [piece for segment in pieces for piece in segment] + ["<pad>"] * padding
    return rows.of_batch(
        batch,
        0,
        number=7,
        piece_T=flat,
        tokens_per_image=1,
        pictures=[],
        segments=[rows.Segment(names[0], names[1], names[2:]) for _ in lengths],
        special_ids=special_ids,
    )


def empty_batch(tokens: int, *, slots: int) -> Batch:
    whole = [np.zeros((1, tokens), np.int32) for _ in range(5)]
    return Batch(
        *whole,
        loss_weight_RT=np.zeros((1, tokens), np.float32),
        pixel_RKHW3=np.zeros((1, slots, 8, 8, 3), np.uint8),
        image_index_RT=np.full((1, tokens), TEXT, np.int32),
    )
