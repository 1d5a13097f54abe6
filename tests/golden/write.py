"""Writes the golden files: python -m tests.golden.write (pixels need transformers)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from tests.golden import dialogues, oracle, pictures

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "tokenizer.model"  # tests/tiny_tokenizer.py trained it: 512 ids
NAMES = {"<unk>": 0, "<s>": 1, "</s>": 2, "<im_start>": 512, "<im_end>": 513}


def main() -> None:
    for name, text in files().items():
        (FOLDER / name).write_text(text)
    (FOLDER / "pixels.jsonl").write_text(_lines(pixels()))


def files() -> dict[str, str]:
    return {
        "training.jsonl": _lines(training()),
        "cuts.jsonl": _lines(cuts()),
        "prompts.jsonl": _lines(prompts()),
        "tiles.jsonl": _lines(pictures.tiles()),
    }


def _lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def training() -> Iterator[dict[str, Any]]:
    processor = _processor()
    for row in dialogues.training():
        how = _row(row)
        ids, labels = oracle.ids_and_labels(how, processor)
        yield row | {"text": oracle.written(how), "ids": ids, "learned": runs(labels)}


def cuts() -> Iterator[dict[str, Any]]:
    processor = _processor()
    for row in dialogues.cuts():
        room = {key: row[key] for key in ("max_tokens", "tokens_per_image", "too_long")}
        got = oracle.cut(_row(row), processor, **room)._asdict()
        labels = got.pop("labels")
        yield row | got | {"learned": runs(labels)}


def prompts() -> Iterator[dict[str, Any]]:
    processor = _processor()
    for row in dialogues.prompts():
        how = _row(row)
        text = oracle.written(how).replace("«", "").replace("»", "")
        ids, _ = oracle.ids_and_labels(how, processor)
        yield row | {"text": text, "ids": ids, "stop": oracle.STOPS[row["template"]]}


def pixels() -> Iterator[dict[str, Any]]:
    for row in pictures.pixels():
        yield row | {"sha256": pictures.sha256(pictures.by_transformers(row))}


def _processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=MODEL.read_bytes())


def _row(row: dict[str, Any]) -> oracle.Row:
    changes = {"system": oracle.SYSTEMS[row["template"]]} | row["changes"]
    return oracle.Row(
        template=row["template"],
        conversations=row["conversations"],
        legacy=row["legacy"],
        names=NAMES,
        image_last=row.get("image_last", False),
        **changes,
    )


def runs(labels: list[int]) -> list[list[int]]:
    """Where something is learned: [begin, end) of each run."""
    edges = [
        at
        for at, (before, here) in enumerate(zip([-100, *labels], [*labels, -100], strict=True))
        if (before == -100) != (here == -100)
    ]
    return [edges[at : at + 2] for at in range(0, len(edges), 2)]


if __name__ == "__main__":
    main()
