"""Data on disk for the tests of sources, and everything that a source says, to compare."""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax.conversation import Refused
from llava_jax.data.entry import Entry, Picture, Source

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello.\0 é 中 😀 \u2028"}]

# Bytes that a copy easily loses: zeros at the end, line ends.
PICTURES = {"a.jpg": b"\xff\xd8a\0\0", "sub/b.png": b"\r\n\0b", "empty.gif": b"", "sub/é.JPG": b"c"}

# Entries of every kind, the broken ones among them.
ENTRIES: list[Any] = [
    {"id": "first", "image": "a.jpg", "conversations": TURNS},
    {"id": "text", "conversations": TALK, "model": "teacher"},
    {"conversations": TALK},
    {"id": 7, "image": ["a.jpg", "sub/b.png", "a.jpg"], "conversations": TURNS},
    {"id": "other word", "images": ["sub/é.JPG"], "image": None, "conversations": TURNS},
    {"id": "no picture there", "image": "sub/gone.png", "conversations": TURNS},
    {"id": "a folder", "image": "sub", "conversations": TURNS},
    {"id": "empty", "image": "empty.gif", "conversations": TURNS},
    {"id": "\ud800 half", "image": "", "conversations": TALK},
    {"id": "half", "conversations": [{"from": "human", "value": "\udc00"}]},
    {"id": "more keys", "conversations": [{"from": "human", "value": "x", "weight": "1"}]},
    {"id": "odd", "conversations": [["human", "x"], None, 1.5]},
    {"id": "not turns", "conversations": "hello"},
    {"id": "no turns", "conversations": []},
    {"id": "none at all"},
    {"id": "outside", "image": "../a.jpg", "conversations": TURNS},
    12,
    None,
]


def write_pictures(folder: Path) -> Path:
    for name, data in PICTURES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, members: dict[str, bytes] = PICTURES) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_json(path: Path, entries: Sequence[Any] = ENTRIES, **how: Any) -> Path:
    path.write_text(json.dumps(entries, **how))
    return path


def everything(source: Source) -> list[Any]:
    return list(map(lambda index: attempt(lambda: entry(source[index])), range(len(source))))


def entry(found: Entry) -> Any:
    return found.id, found.conversations, [(p.name, *picture(p)) for p in found.pictures]


def picture(found: Picture) -> tuple[Any, ...]:
    """Its bytes, or whether it is missing, or only unreadable, and why."""
    try:
        return (found.read(),)
    except FileNotFoundError as error:
        return "missing", str(error)
    except (OSError, ValueError) as error:
        return "unreadable", str(error)


def attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Refused as refused:
        return refused.kind, str(refused)


# ScienceQA.

PROBLEM = {
    "question": "Which  is north?",
    "choices": ["the left", "the  right"],
    "answer": 1,
    "hint": "",
    "image": None,
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map",
    "lecture": "Maps have\nfour directions.",
    "solution": "Look at\\nthe rose.",
    "split": "train",
}


def problems(**changed: Any) -> dict[str, Any]:
    """By id: p1, with an image, and p2, without; others as they are changed from p2."""
    made: dict[str, Any] = {"p1": {**PROBLEM, "image": "image.png", "hint": " Use the map. "}}
    made["p2"] = {**PROBLEM, "lecture": "", "split": "val"}
    for pid, change in changed.items():
        made[pid] = {**PROBLEM, **change} if isinstance(change, dict) else change
    return made


def write_science_qa(folder: Path, made: dict[str, Any], splits: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(made))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for pid, problem in made.items():
        if isinstance(problem, dict) and problem.get("image") == "image.png":
            file = folder / "images" / problem["split"] / pid / "image.png"
            file.parent.mkdir(parents=True)
            file.write_bytes(f"picture of {pid}".encode())
    return folder


def walk(folder: Path) -> Iterator[str]:
    """All files below a folder."""
    return (str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file())
