"""What a preparation found, as tables for the terminal and for pages: nothing goes unsaid."""

from collections.abc import Mapping, Sequence

import numpy as np

from llava_jax.data.dataset import Dataset
from llava_jax.data.findings import Findings
from llava_jax.data.schedule import Schedule
from llava_jax.pages.markup import one_line

COMPOSITION = (
    "source",
    "has",
    "taken",
    "epochs",
    "refused",
    "no picture",
    "conversations",
    "share",
    "tokens each",
    "of tokens",
    "learned",
    "pictures",
)


def composition(dataset: Dataset) -> list[tuple[str, ...]]:
    """A row for each source and one for all, under COMPOSITION."""
    rows = []
    all_tokens = int(dataset.tokens_N.sum(dtype=np.int64))
    for name, lengths in dataset.lengths.items():
        settings, usable = dataset.config.data.sources[name], lengths.usable
        learned_N, lost = lengths.learned_N[usable], "–"
        if (checked := dataset.checked.get(name)) is not None:
            learned_N, lost = learned_N[~checked.broken_N], f"{int(checked.broken_N.sum()):,}"
        count = int(usable.sum()) * settings.epochs
        tokens = int(lengths.tokens_N.sum(dtype=np.int64))
        rows.append(
            (
                name,
                f"{len(dataset.sources[name]):,}",
                settings.take if settings.take != "all" else f"{len(lengths.entry_N):,}",
                str(settings.epochs),
                f"{int((~usable).sum()):,}",
                lost,
                f"{count:,}",
                f"{count / len(dataset):.1%}",
                f"{tokens / max(1, usable.sum()):.0f}",
                f"{tokens * settings.epochs / all_tokens:.1%}",
                f"{learned_N.sum(dtype=np.int64) / max(1, tokens):.1%}",
                f"{int(lengths.pictures_N.sum(dtype=np.int64)) * settings.epochs:,}",
            )
        )
    if len(rows) > 1:
        total = ("all", "", "", "", "", "", f"{len(dataset):,}", "100.0%")
        each = f"{all_tokens / len(dataset):.0f}"
        pictures = f"{int(dataset.pictures_N.sum(dtype=np.int64)):,}"
        rows.append((*total, each, "100.0%", "", pictures))
    return rows


def findings(dataset: Dataset) -> Mapping[str, Findings]:
    """What was refused, repaired, missing or repeated, by name of the source: only what was."""
    found = {}
    for name, lengths in dataset.lengths.items():
        for what, mine in (
            ("refused", lengths.refused),
            ("repaired", lengths.repaired),
            ("pictures", _pictures(dataset, name)),
            ("repeated", lengths.repeated),
        ):
            if mine.count:
                found[f"{name}, {what}"] = mine
    return found


def _pictures(dataset: Dataset, name: str) -> Findings:
    checked = dataset.checked.get(name)
    return checked.findings if checked else Findings()


def steps(dataset: Dataset, schedule: Schedule) -> list[tuple[str, str]]:
    """How conversations fall into rows, and rows into steps."""
    batch = dataset.config.batch
    plan, epochs = schedule.plans[0], len(schedule.plans)
    real = int(dataset.tokens_N.sum(dtype=np.int64))
    per_step = len(dataset) / (len(schedule) / epochs)
    how = "packed, each blind to the others" if batch.pack else "one conversation a row"
    return [
        ("rows", f"{len(plan):,} of {batch.tokens} tokens and {batch.images} images, {how}"),
        ("filled", f"{real / (len(plan) * batch.tokens):.2%} of the rows' tokens are real"),
        (
            "a step",
            f"{_counted(schedule.rows_per_step, 'row')}, {per_step:.1f} conversations on average",
        ),
        ("asked for", f"{batch.conversations} conversations a step (config.batch.conversations)"),
        ("steps", f"{len(schedule):,} in {_counted(epochs, 'epoch')}"),
        ("fingerprint", dataset.digest[:16]),
    ]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def text(dataset: Dataset, schedule: Schedule) -> str:
    """The whole report for a terminal."""
    parts = [table(COMPOSITION, composition(dataset))]
    for title, found in findings(dataset).items():
        lines = [title]
        for kind, count in found.count.most_common():
            lines.append(f"  {count:,} × {kind}")
            # Ids and texts are other people's: nothing of them may move the terminal's cursor.
            lines += [f"      {one_line(example)}" for example in found.first[kind]]
        parts.append("\n".join(lines))
    width = max(len(name) for name, _ in steps(dataset, schedule))
    parts.append("\n".join(f"{name:{width}}  {said}" for name, said in steps(dataset, schedule)))
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
