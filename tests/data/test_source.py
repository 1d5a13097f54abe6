"""What holds conversations is told by its content, and what holds none is refused in a sentence."""

import os
import subprocess
import sys

import pytest

from llava_jax.conversation import parse
from llava_jax.data.source import open_source
from tests.data import sources
from tests.data.sources import TALK, write_json, write_science_qa

ENTRY = {"id": "a", "conversations": TALK}


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl", "chat.csv", "problems.json"])
def test_a_name_says_nothing(tmp_path, name):
    listed = write_json(tmp_path / name, [ENTRY] * 3, indent=1)
    assert len(open_source(listed)) == 3
    lined = tmp_path / name
    lined.write_text('\n{"id": "x"}\n {"id": "y"}\n')
    assert [open_source(str(lined))[i].id for i in range(2)] == ["x", "y"]


def test_entries_are_what_conversation_parses(tmp_path):
    source = open_source(
        write_json(tmp_path / "a", [{"image": "x", "conversations": sources.TURNS}]),
        images=[tmp_path],
    )
    found = source[0]
    assert [turn.role for turn in parse(found.conversations, len(found.pictures))] == [
        "human",
        "gpt",
    ]


def test_folders(tmp_path):
    folder = write_science_qa(tmp_path / "sqa", sources.problems(), {"train": ["p1"]})
    assert open_source(folder)[0].id == "p1"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<!DOCTYPE html><html>", "begins with '<'; expected a JSON list"),
        ("", "with nothing in it; expected a JSON list"),
        (" \n\t", "with nothing in it; expected a JSON list"),
        ("12", "begins with '1'; expected a JSON list"),
        ('"[1]"', "begins with '\"'; expected a JSON list"),
        ("[]", "without an entry, expected at least one"),
        ('{"1": {"question": "?"}, "2": {}}', "one object with the keys '1', '2'; expected a list"),
        ('{"data": [1], "b": 1, "c": 1, "d": 1}', "keys 'data', 'b', 'c', …; expected a list"),
        ('{\n "data": []\n}', "the object goes on in the next line"),
    ],
)
def test_no_conversations(tmp_path, content, reason):
    file = tmp_path / "chat.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")) as caught:
        open_source(file)
    assert str(file) in str(caught.value)


def test_other_things(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        open_source(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="a folder; expected a JSON list"):
        open_source(tmp_path)
    (tmp_path / "problems.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has only problems\.json"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"split 'val' .* has only 'train'"):
        open_source(write_json(tmp_path / "a", [ENTRY]), split="val")


def test_pictures_need_a_place(tmp_path):
    file = write_json(tmp_path / "a", [ENTRY, {"image": "x/a.jpg", "conversations": TALK}])
    with pytest.raises(ValueError, match=r"entry 1 has 'x/a\.jpg'.* expected images= with folders"):
        open_source(file)
    with pytest.raises(
        ValueError, match=r"images .*/gone, which does not exist; expected a folder"
    ):
        open_source(file, images=[tmp_path, tmp_path / "gone"])
    assert len(open_source(file, images=str(tmp_path))) == 2


def test_json_needs_neither_the_extra_nor_jax(tmp_path):
    file = write_json(tmp_path / "a", [ENTRY])
    code = (
        "import sys; from llava_jax.data.source import open_source\n"
        f"assert open_source({str(file)!r})[0].id == 'a'\n"
        "extra = {'tensorflow_datasets', 'array_record', 'grain', 'jax', 'fsspec'}\n"
        "assert not extra & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
