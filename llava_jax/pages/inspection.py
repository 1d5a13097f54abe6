"""The page of what a model is trained on: rows token by token, and the whole mixture in figures.

>>> html = page(title="…", facts={"tokens a row": 4096}, composition=…, refusals=[], …)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.batch import PADDING
from llava_jax.pages import plots, rows
from llava_jax.pages.markup import Html, element, join, number, one_line, share
from llava_jax.pages.page import Section, document, picture, table, thumbnail
from llava_jax.pages.page import facts as listed
from llava_jax.pages.rows import Row, Run

_THUMBNAIL = 56


class Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[str | float]]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What was refused or repaired: what kind of trouble, how often, and the first of them."""

    kind: str
    count: int
    examples: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Distributions:
    """Of all that is trained on, not only of the rows shown. N conversations, M rows."""

    length_N: np.ndarray  # tokens, those of images included
    learned_share_N: np.ndarray  # of them, 0 to 1
    turns_N: np.ndarray
    images_N: np.ndarray
    conversations_M: np.ndarray  # in each row
    fill_M: np.ndarray  # of each row, 0 to 1


def page(
    *,
    title: str,
    facts: Mapping[str, str | float],
    composition: Table,
    refusals: Sequence[Refusal],
    distributions: Distributions,
    rows: Sequence[Row],
) -> str:
    """The page. facts: what was chosen: config, tokenizer, template, seed, fingerprint.

    rows: what to show token by token; a handful, as every token is in the page.
    """
    conversations, all_rows = len(distributions.length_N), len(distributions.fill_M)
    lead = (
        f"What the model is trained on: {number(conversations)} conversations in "
        f"{number(all_rows)} rows, of which {number(len(rows))} are shown token by token."
    )
    sections = [
        Section("facts", "Facts", listed(list(facts.items()))),
        Section("composition", "Composition", table(*composition)),
        Section("refusals", "Refused and repaired", _refusals(refusals)),
        Section("distributions", "Distributions", _distributions(distributions)),
        Section("legend", "How to read a row", _legend(rows)),
        *(Section(f"row-{row.number}", f"Row {row.number:,}", _row(row)) for row in rows),
    ]
    return document(title, sections, lead=lead)


def rows_page(title: str, rows: Sequence[Row]) -> str:
    """Rows alone, token by token."""
    sections = [
        Section("legend", "How to read a row", _legend(rows)),
        *(Section(f"row-{row.number}", f"Row {row.number:,}", _row(row)) for row in rows),
    ]
    return document(title, sections)


def _refusals(refusals: Sequence[Refusal]) -> Html:
    if not refusals:
        return element("p", "None.")
    shown = [
        [
            refusal.kind,
            refusal.count,
            element("ul", *(element("li", one_line(text)) for text in refusal.examples)),
        ]
        for refusal in refusals
    ]
    return table(["kind", "count", "the first"], shown)


def _distributions(of: Distributions) -> Html:
    conversations, in_rows = "conversations", "rows"
    return element(
        "div",
        plots.histogram(of.length_N, title="Length", x="tokens", y=conversations),
        plots.histogram(
            100 * of.learned_share_N, title="Learned", x="% of the tokens", y=conversations
        ),
        plots.histogram(
            of.turns_N, title="Turns (logarithmic)", x="turns", y=conversations, log=True
        ),
        plots.histogram(
            of.images_N, title="Images (logarithmic)", x="images", y=conversations, log=True
        ),
        plots.histogram(of.conversations_M, title="Packing", x="conversations in a row", y=in_rows),
        plots.histogram(100 * of.fill_M, title="Fill", x="% of the row", y=in_rows),
        class_="plots",
    )


def _legend(shown: Sequence[Row]) -> Html:
    def example(*words: str) -> list[Html]:
        return [element("i", f" {word}") for word in words]

    special = element("span", element("b", "special token", class_="special"), class_="tokens")
    return join(
        element(
            "div",
            element(
                "span", element("span", *example("learned"), class_="learned-text"), class_="tokens"
            ),
            element("span", *example("context:", "only", "read"), class_="tokens"),
            special if any(row.special_T.any() for row in shown) else "",
            element("span", "image", class_="box image"),
            element("span", "padding", class_="box padding"),
            element("span", "↵ new line"),
            element("span", "⇥ tab"),
            element("span", element("i", " "), " space", class_="tokens"),
            element("span", "‹E4› byte of a character"),
            element("span", "⟨U+202E⟩ what would not be seen"),
            class_="legend",
        ),
        element(
            "p",
            "A learned (supervised) token is one that the model is asked to say: its loss counts. "
            "In the batch its weight stands one place before, at the token it is predicted from; "
            "here the token itself is marked. The bar above a row is the row to scale: learned "
            "is tall, context low, images hatched, padding dashed, each segment over its number. "
            "A segment is a conversation; it sees nothing of its neighbours. Hovering over a "
            "token, or tapping on it (then the arrow keys), tells its id, position, segment and "
            "raw piece; the list below each segment tells the same.",
            class_="soft",
        ),
    )


def _row(row: Row) -> Html:
    segments = list(rows.by_segment(row))
    shown = rows.texts(row)
    return element(
        "div",
        listed(rows.facts(row)),
        _strip(row, segments),
        _pictures(row),
        *(_segment(row, number, runs, shown) for number, runs in segments),
        class_="row",
    )


def _strip(row: Row, segments: Sequence[tuple[int, Sequence[Run]]]) -> Html:
    """The row to scale."""
    parts = []
    for segment, runs in segments:
        tokens = runs[-1].stop - runs[0].start
        of = f"segment {segment}" if segment != PADDING else "padding"
        blocks = [element("span", class_=run.kind, style=f"flex-grow:{run.tokens}") for run in runs]
        parts.append(
            element(
                "span",
                element("span", *blocks),
                element("small", f"{segment}" if segment != PADDING else ""),
                style=f"flex-grow:{tokens}",
                title=f"{of}: {tokens:,} tokens",
            )
        )
    words = ", ".join(f"{name} {value}" for name, value in rows.facts(row))
    return element("div", *parts, class_="strip", role="img", aria_label=f"the row: {words}")


def _pictures(row: Row) -> Html:
    figures = []
    for k, image in enumerate(row.pictures):
        segment = row.segment_T[row.image_T == k]
        where = f"segment {segment[0]}" if segment.size else "in no segment"
        name = f"image {k}"
        for i, slot in enumerate(image.slots):
            tile = f", tile {i}" if len(image.slots) > 1 else ""
            drawn = picture(row.pixel_KHW3[slot], alt=f"{name}{tile} as the model sees it")
            figures.append(
                element(
                    "figure",
                    drawn,
                    element("figcaption", f"{name}{tile} · {where} · {one_line(image.caption)}"),
                    tabindex=0,
                )
            )
    return element("div", *figures, class_="pictures") if figures else Html("")


def _segment(row: Row, number: int, runs: Sequence[Run], shown: Sequence[str]) -> Html:
    start, stop = runs[0].start, runs[-1].stop
    tokens = [_run(row, run, shown) for run in runs]
    if number == PADDING:
        return element("div", *tokens, class_="tokens")
    segment = row.segments[number - 1]
    learned = int(np.count_nonzero(row.weight_T[start:stop] > 0))
    notes = [element("span", one_line(note), class_="note") for note in segment.notes]
    return element(
        "article",
        element(
            "header",
            element("b", f"segment {number}"),
            element("b", one_line(segment.source)),
            element("span", one_line(segment.example)),
            element("span", f"{stop - start:,} tokens"),
            element("span", f"learned {learned:,}, {share(learned, stop - start)}"),
            *notes,
        ),
        element("div", *tokens, class_="tokens"),
        _list(row, runs),
        class_="segment",
    )


def _run(row: Row, run: Run, shown: Sequence[str]) -> Html:
    if run.kind == "padding":
        return element("span", f"padding · {run.tokens:,}", class_="box padding")
    if run.kind == "image":
        return _image_box(row, run)
    tokens = []
    for t in range(run.start, run.stop):
        tag = "i" if shown[t].startswith(" ") else "b"
        mark = {"class_": "special"} if row.special_T[t] else {}
        tokens.append(element(tag, shown[t], title=_told(row, t), **mark))
    return (
        element("span", *tokens, class_="learned-text") if run.kind == "learned" else join(*tokens)
    )


def _told(row: Row, t: int) -> str:
    learned = f"\nlearned{_times(row.weight_T[t])}" if row.weight_T[t] > 0 else ""
    special = ", special" if row.special_T[t] else ""
    return (
        f"{rows.spelling(row.piece_T[t])}\nid {row.token_T[t]}{special}\n"
        f"position {row.position_T[t]}\nsegment {row.segment_T[t]}{learned}"
    )


def _times(weight: float) -> str:
    return "" if weight in (0, 1) else f" × {weight:g}"


def _image_box(row: Row, run: Run) -> Html:
    image = row.pictures[run.image]
    first, last = row.position_T[run.start], row.position_T[run.stop - 1]
    return element(
        "span",
        thumbnail(row.pixel_KHW3[image.slots[0]], side=_THUMBNAIL, alt=""),
        f"image {run.image} · {run.tokens:,} tokens",
        class_="box image",
        title=f"image {run.image}: {one_line(image.caption)}\npositions {first} to {last}\n"
        f"segment {row.segment_T[run.start]}",
    )


def _list(row: Row, runs: Sequence[Run]) -> Html:
    """What hovering tells, as text."""
    told: list[Sequence[str]] = []
    for run in runs:
        if run.kind == "image":
            first, last = row.position_T[run.start], row.position_T[run.stop - 1]
            told.append((f"image {run.image}, positions {first} to {last}",))
            continue
        told.append((f"{run.kind}: position, id, piece",))
        for t in range(run.start, run.stop):
            piece = f"{rows.spelling(row.piece_T[t])}{_times(row.weight_T[t])}"
            told.append((str(row.position_T[t]), str(row.token_T[t]), piece))
    lines = (join(*fields, between=Html("\t")) for fields in told)
    return element(
        "details",
        element("summary", "ids and positions"),
        element("pre", join(*lines, between="\n")),
    )
