"""Text that is not trusted, made visible and harmless; and the only functions that write tags.

`element` escapes every plain string it is given. Only `Html`, which nothing but this file makes
from parts, goes in as it is: text that somebody forgot to escape is shown, never obeyed.
"""

import html
import re

# Letters and symbols that nobody sees.
_BLANK = re.compile("[\u115f\u1160\u2800\u3164\uffa0]")
_SHOWN_AS = {"\n": "↵\n", "\t": "⇥", "\x7f": "␡"}


class Html(str):
    """Markup that is finished: its text is escaped already."""

    __slots__ = ()


def visible(text: str) -> str:
    """The text with everything invisible spelled out: ↵ (and a line break), ⇥, ␀, ⟨U+202E⟩.

    What comes out can always be encoded, and steers neither a terminal nor the direction of text.
    """
    if text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    # Not printable: control and format characters (among them the bidi controls), surrogates,
    # what is private or not assigned, and all spaces but the one.
    if character.isprintable() and not _BLANK.match(character):
        return character
    if character in _SHOWN_AS:
        return _SHOWN_AS[character]
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def one_line(text: str, most: int = 300) -> str:
    """`visible` on one line; of longer texts the beginning, and how much is missing."""
    shown = visible(text[:most]).replace("\n", "")
    return shown + (f"… ({len(text) - most:,} more characters)" if len(text) > most else "")


def element(tag: str, *children: str, **attributes: str | float) -> Html:
    """<tag attributes>children</tag>. `class_` is class; other underscores become hyphens.

    Strings are escaped; Html goes in as it is.
    """
    opening = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
    )
    if tag in {"img", "meta", "link"}:
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{join(*children)}</{tag}>")


def join(*parts: str, between: str = "") -> Html:
    """Parts one after the other, plain strings escaped."""
    return Html(escape(between).join(escape(part) for part in parts))


def escape(text: str) -> Html:
    """Harmless as content and as an attribute. Line breaks stay, all else is made visible."""
    if isinstance(text, Html):
        return text
    return Html(html.escape("\n".join(map(visible, text.split("\n")))))


def _attribute(value: str | float) -> str:
    if isinstance(value, str):
        return escape(str(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """1,234 or 0.0123 or 1.2e+09: as many digits as a reader wants."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def share(part: float, whole: float) -> str:
    """'25.3 %'. Of nothing, a dash."""
    return f"{100 * part / whole:.1f} %" if whole else "–"
