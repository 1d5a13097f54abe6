"""Golden pixels and tiles of ours, by transformers and by LLaVA's published rule.

tests/test_image.py compares with the reference's own, where they are at hand.
"""

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from llava_jax.batch import ROW_END
from llava_jax.image import ImageProcessing, best_resolution
from tests.golden import pictures, write


def golden(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (write.FOLDER / name).read_text().splitlines()]


def test_pixels():
    rows = golden("pixels.jsonl")
    for row in rows:
        got = ImageProcessing(row["mode"], row["size"]).process(pictures.encoded(row))
        assert pictures.sha256(got) == row["sha256"], {**row, "shape": got.shape}
    assert len(rows) == len(list(pictures.pixels())) == 77


def test_transformers_makes_the_golden_pixels():
    pytest.importorskip("transformers")
    for row in golden("pixels.jsonl"):
        assert pictures.sha256(pictures.by_transformers(row)) == row["sha256"], row


def test_tiles():
    rows = golden("tiles.jsonl")
    for row in rows:
        width, height = row["size"]
        processing = ImageProcessing("anyres", 336, pinpoints=row["pinpoints"])
        best = best_resolution(width, height, processing.pinpoints)
        assert best == tuple(row["best_resolution"]), row
        assert processing.grid(width, height) == tuple(row["grid"]), row
        assert processing.tiles(width, height) == row["tiles"] + 1, row
        index = processing.feature_index(width, height, pictures.PATCHES)
        order = np.where(index == ROW_END, -1, index).tolist()
        text = json.dumps(order, separators=(",", ":"))
        assert len(order) == row["tokens"], row
        assert hashlib.sha256(text.encode()).hexdigest() == row["order_sha256"], row
    assert len(rows) == 27
    assert {tuple(row["best_resolution"]) for row in rows} == set(pictures.PINPOINTS)


def test_the_published_rule_chooses_the_references_tiles(shared):
    told = json.loads((shared / "data/golden/anyres.json").read_text())
    for case in told["cases"]:
        ours = pictures.tiling(*case["size"])
        assert ours == {key: case[key] for key in ours}, case["size"]
