"""The world on disk: the same bytes from the same seed, whole or not at all, with stable names."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_jax import picture_world
from llava_jax.picture_world import writing
from llava_jax.picture_world.scenes import COLOURS, SHAPES, UNSEEN_PAIRS


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llava_jax.picture_world", *arguments],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )


def test_two_processes_write_the_same_bytes_and_another_seed_others(tmp_path):
    done = command("--out", str(tmp_path / "a"), "--scenes", "10", hash_seed="1")
    assert done.returncode == 0, done.stderr
    writing.write(tmp_path / "b", scenes=10)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    writing.write(tmp_path / "c", scenes=10, seed=1)
    one, other = hashes(tmp_path / "b"), hashes(tmp_path / "c")
    assert one.keys() - other.keys() == set()  # how many, and their names, are not drawn
    same = {name for name in one if one[name] == other[name]}
    assert same <= {"science_qa/pid_splits.json"}

    # What it says it wrote is there, and "drawing" is reported on stderr.
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert all((tmp_path / "a" / name).exists() for name in names)
    assert "drawing: " in done.stderr


def test_the_files_are_those_the_package_names(world):
    doc = picture_world.__doc__
    assert doc
    files = {name for name in hashes(world.folder) if not name.endswith((".png", ".jpg"))}
    named = set()
    for name in re.findall(r"[\w/{},]+\.jsonl?", doc):
        name = (
            name
            if "/" in name or name.startswith(("llava", "cl", "comp"))
            else f"science_qa/{name}"
        )
        held_out = ("dev", "test", "unseen_pairs")
        in_annotations = name.startswith("annotations")
        splits = ("train", *held_out) if in_annotations else held_out
        named |= {name.replace("{split}", split) for split in splits}
    assert files == named


def test_pictures_are_what_their_names_say(world):
    kinds = set()
    for split in ("train", "dev", "test", "unseen_pairs"):
        names = sorted(path.name for path in (world.folder / split).iterdir())
        assert len(names) == (120 if split == "train" else 12)
        assert names[0] == "000000000001.png"
        assert [int(name.split(".")[0]) for name in names] == list(range(1, len(names) + 1))
        for name in names[:4]:
            with Image.open(world.folder / split / name) as picture:
                kinds.add((name[-4:], picture.format, picture.size))
    assert kinds == {(".png", "PNG", (48, 48)), (".jpg", "JPEG", (48, 48))}


def texts_of(world, held_out_pairs: bool) -> str:
    """All texts of the files of one split, or of all others. Names of files say which is which."""
    found = []
    for path in sorted(world.folder.rglob("*.json*")):
        if ("unseen_pairs" in path.name) == held_out_pairs:
            found.append(path.read_text())
    return "\n".join(found)


def test_unseen_pairs_are_in_no_other_text(world):
    assert len(UNSEEN_PAIRS) == 5

    def occur(pair: tuple[str, str], text: str) -> bool:
        colour, shape = pair
        return bool(re.search(rf"\b{colour} {shape}|\bthe {shape} is {colour}\b", text))

    others, own = texts_of(world, False), texts_of(world, True)
    assert not [pair for pair in UNSEEN_PAIRS if occur(pair, others)]
    assert all(occur(pair, own) for pair in UNSEEN_PAIRS)
    seen = {(c, s) for c in COLOURS for s in SHAPES} - UNSEEN_PAIRS
    assert all(occur(pair, others) for pair in seen)
    # Nor does a question ask for one with its answer's help.
    for colour, shape in UNSEEN_PAIRS:
        assert f'what colour is the {shape}?", "answer": "{colour}"' not in others
        assert not re.search(rf"what colour is the {shape}\?[^?]*\"{colour}\"", others)
        assert not re.search(rf"what shape is the {colour} object\?[^?]*\"{shape}\"", others)


def test_the_words_are_few(world):
    def words(pattern: str, *fields: str) -> set[str]:
        found = set()
        for path in sorted(world.folder.glob(pattern)):
            for field in fields:
                for text in re.findall(rf'"{field}": "((?:[^"\\]|\\.)*)"', path.read_text()):
                    found |= set(re.findall(r"[A-Za-z-]+|\d+|[^\w\s]", text.replace("\\n", " ")))
        return found

    pictures = words("llava_*.json", "value") | words("c*.jsonl", "text", "answer")
    assert len(pictures - set("<>")) < 160
    science = words("science_qa/problems.json", "question", "hint", "lecture", "solution")
    assert len(pictures | science) < 260
    capitals = {word for word in pictures if word != word.lower()}
    assert capitals == {"L", "T", "X", "GO", "HI", "UP"}


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    done = command("--out", str(tmp_path))
    assert done.returncode == 2
    assert "expected a new or empty folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 9}, "got 9 scenes, expected 10 to 100000"),
        ({"scenes": 10**6}, "got 1000000 scenes, expected 10 to 100000"),
        ({"size": 8}, "got size 8, expected 32 to 1024 pixels"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        writing.write(tmp_path / "world", **changes)
    assert not list(tmp_path.iterdir())


def test_the_help_tells_what_can_be_drawn():
    told = " ".join(command("--help").stdout.split())
    assert "10 to 100,000" in told
    assert "32 to 1024" in told


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the pen broke")

    monkeypatch.setattr(writing.science, "problem", fail)
    with pytest.raises(RuntimeError, match="pen"):
        writing.write(tmp_path / "world", scenes=10)
    monkeypatch.undo()
    monkeypatch.setattr(writing.dialogues, "comparison", fail)
    with pytest.raises(RuntimeError, match="pen"):
        writing.write(tmp_path / "world", scenes=10)
    assert not list(tmp_path.iterdir())


def test_another_size(tmp_path):
    writing.write(tmp_path / "large", scenes=10, size=64)
    with Image.open(tmp_path / "large/train/000000000001.png") as picture:
        assert picture.size == (64, 64)
