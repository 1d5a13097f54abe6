"""skipped.jsonl: the conversations of a run that nothing was learned from, and why.

A line names source, id, entry, and the picture with what was wrong with it. Rows that are read
again, after a resume or in another epoch, add nothing.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

from llava_jax import files
from llava_jax.data.dataset import Dataset
from llava_jax.data.rows import Segment


class Skipped:
    """The list of one host. It is written whole, beside and renamed: a reader sees no half line."""

    def __init__(self, file: str | os.PathLike[str]):
        self._file = files.path(file)
        self._lines: dict[tuple[str, int], dict[str, Any]] = {}
        if self._file.exists():
            for number, line in enumerate(self._file.read_text().splitlines(), 1):
                self._add(self._parsed(line, number))

    def _parsed(self, line: str, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            return {key: entry[key] for key in ("source", "id", "entry", "why")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"got {self._file}, line {number}: {line[:60]!r}, expected an object with source, "
                "id, entry and why: remove the line"
            ) from error

    def _add(self, line: dict[str, Any]) -> None:
        self._lines.setdefault((line["source"], line["entry"]), line)

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, segments: Iterable[Segment]) -> None:
        """Notes what was skipped among the segments of rows that were read."""
        before = len(self)
        for segment in segments:
            if segment.skipped is not None:
                self._add(
                    {
                        "source": segment.source,
                        "id": segment.id,
                        "entry": segment.entry,
                        "why": segment.skipped,
                    }
                )
        if len(self) > before:
            lines = (json.dumps(line, ensure_ascii=False) for line in self._lines.values())
            files.write_text(self._file, "\n".join(lines) + "\n")

    def check(self, dataset: Dataset, count: int | None = None) -> None:
        """Stops the run if too many were skipped. count: of all hosts, so that all stop alike."""
        count = len(self) if count is None else count
        allowed = dataset.config.data.max_bad_fraction
        if count <= allowed * len(dataset):
            return
        first = "".join(
            f"\n  {line['source']} {line['id']}: {line['why']}"
            for line in list(self._lines.values())[:5]
        )
        raise ValueError(
            f"got {count} of {len(dataset)} conversations without their picture, expected at most "
            f"{allowed:.2%} (config.data.max_bad_fraction); all of them are in {self._file}:{first}"
        )
