"""What every page is made of: one shell with one stylesheet, tables, pictures. No network.

>>> html = document("Scores", [Section("pope", "POPE", table(["kind", "F1"], [["random", 87.3]]))])
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_jax.pages.markup import Html, element, join, number
from llava_jax.pages.style import STYLE

# Shows what hovering shows to those who tap, and lets the arrow keys move on. Without it the
# page lacks nothing else.
_SCRIPT = """
(function () {
  var shown = document.getElementById("shown"), last = null;
  function show(target) {
    if (last) last.classList.remove("here");
    last = target;
    if (target) target.classList.add("here");
    shown.textContent = target ? target.title.replace(/\\n/g, " · ") : "";
  }
  document.addEventListener("click", function (event) {
    show(event.target.closest(".tokens [title]"));
  });
  document.addEventListener("keydown", function (event) {
    var step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!last || !step) return;
    var all = Array.from(last.closest(".tokens").querySelectorAll("[title]"));
    var next = all[all.indexOf(last) + step];
    if (next) { show(next); next.scrollIntoView({ block: "nearest" }); event.preventDefault(); }
  });
})();
"""

_NUMBER = re.compile(r"[−+-]?\d[\d.,]*(e[+-]\d+)?( ?%)?|–|nan|[−+-]?inf")


class Section(NamedTuple):
    """A part of a page. name: its anchor, of letters, digits and hyphens."""

    name: str
    title: str
    body: Html


def document(title: str, sections: Sequence[Section], *, lead: str = "") -> str:
    """The whole page. lead: a sentence below the title. Encodes as UTF-8 whatever went in."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    # Told to the browser, so that not even a mistake of ours could load or run anything.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'; script-src 'sha256-{digest}'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    links = [element("a", section.title, href=f"#{section.name}") for section in sections]
    body = element(
        "body",
        element(
            "header",
            element("h1", title),
            element("p", lead, class_="lead") if lead else "",
            element("nav", join(*links, between=" "), aria_label="Sections"),
        ),
        element("main", *map(_section, sections)),
        element("output", id="shown", aria_live="polite"),
        element("script", Html(_SCRIPT)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _section(section: Section) -> Html:
    assert re.fullmatch(r"[A-Za-z0-9-]+", section.name), section.name
    return element("section", element("h2", section.title), section.body, id=section.name)


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> Html:
    """A table. Columns of nothing but numbers stand on the right.

    Where it is too wide it scrolls, with a shadow where more is; on a phone each row is a card.
    """
    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    assert all(len(row) == len(head) for row in cells), [len(row) for row in cells]
    numeric = []
    for i in range(len(head)):
        filled = [row[i] for row in cells if row[i]]
        numeric.append(bool(filled) and all(map(_NUMBER.fullmatch, filled)))

    classes = [{"class_": "number"} if yes else {} for yes in numeric]
    columns = list(zip(head, classes, strict=True))
    top = element("tr", *(element("th", name, **class_) for name, class_ in columns))
    body = [
        element(
            "tr",
            *(
                element("td", cell, data_column=name, **class_)
                for cell, (name, class_) in zip(row, columns, strict=True)
            ),
        )
        for row in cells
    ]
    return element(
        "div",
        element("table", element("thead", top), element("tbody", *body)),
        class_="wide",
        tabindex=0,
        role="region",
        aria_label="table: " + ", ".join(head),
    )


def facts(pairs: Sequence[tuple[str, str | float]]) -> Html:
    """Names with their values."""
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element("dd", value if isinstance(value, str) else number(value)),
            )
            for name, value in pairs
        ),
        class_="facts",
    )


def picture(pixel_HW3: np.ndarray, *, alt: str) -> Html:
    """The very pixels, as a PNG inside the page."""
    assert pixel_HW3.dtype == np.uint8, pixel_HW3.dtype
    assert pixel_HW3.shape[2:] == (3,), pixel_HW3.shape
    height, width = pixel_HW3.shape[:2]
    return element("img", src=data_uri(pixel_HW3), alt=alt, width=width, height=height)


def data_uri(pixel_HW3: np.ndarray) -> str:
    """A PNG as an address of its own."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixel_HW3)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnail(pixel_HW3: np.ndarray, *, side: int, alt: str) -> Html:
    """The picture made small, its longer side `side` pixels."""
    height, width = pixel_HW3.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(np.ascontiguousarray(pixel_HW3)).resize(size, Image.Resampling.BOX)
    return picture(np.asarray(small), alt=alt)
