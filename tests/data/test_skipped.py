"""skipped.jsonl: each conversation once, whatever is read again, and when there are too many."""

import json

import pytest

from llava_jax.data.dataset import open_dataset
from llava_jax.data.pipeline import read_ahead
from llava_jax.data.rows import Segment
from llava_jax.data.schedule import schedule
from llava_jax.data.skipped import Skipped
from tests.data import small


def segment(entry: int, why: str | None = "a.png: broken") -> Segment:
    return Segment("small", f"e{entry}", entry, 9, ("a.png",), skipped=why)


def test_each_conversation_once_and_only_those_skipped(tmp_path):
    file = tmp_path / "skipped.jsonl"
    skipped = Skipped(file)
    skipped.add([segment(1, None), segment(2, None)])
    assert not file.exists()
    skipped.add([segment(1), segment(2, None), segment(3)])
    skipped.add([segment(3), segment(1)])
    assert len(skipped) == 2
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"source": "small", "id": "e1", "entry": 1, "why": "a.png: broken"},
        {"source": "small", "id": "e3", "entry": 3, "why": "a.png: broken"},
    ]


def test_a_resumed_run_goes_on_with_the_list(tmp_path):
    file = tmp_path / "skipped.jsonl"
    Skipped(file).add([segment(1)])
    again = Skipped(file)
    again.add([segment(1), segment(5)])
    assert len(again) == len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "3", '{"source": "a"}', "[]"])
def test_a_list_that_was_edited_by_hand(tmp_path, line):
    file = tmp_path / "skipped.jsonl"
    Skipped(file).add([segment(1)])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"skipped\.jsonl, line 2: .*remove the line"):
        Skipped(file)


def test_too_many_stop_the_run_with_the_list(tmp_path):
    """All hosts together: one alone may still have few."""
    config = small.write(tmp_path)
    (tmp_path / "images/3.png").unlink()
    dataset = open_dataset(small.changed(config, data={"max_bad_fraction": 0.15}))
    skipped = Skipped(tmp_path / "skipped.jsonl")
    for read in read_ahead(dataset, schedule(dataset)):
        for row in read.segments:
            skipped.add(row)
        skipped.check(dataset)
    broken = [entry for entry in small.entries() if "3.png" in str(entry.get("image"))]
    assert len(skipped) == len(broken) == 7
    skipped.check(dataset, count=9)
    with pytest.raises(ValueError, match="got 10 of 60 conversations without") as error:
        skipped.check(dataset, count=10)
    assert "skipped.jsonl" in str(error.value)
    assert "no picture 3.png" in str(error.value)
