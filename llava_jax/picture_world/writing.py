"""Writes the picture world into a folder; the package's docstring lists the files."""

import json
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llava_jax import cli, files
from llava_jax.picture_world import annotations, dialogues, drawing, questions, science
from llava_jax.picture_world.questions import Question
from llava_jax.picture_world.scenes import (
    SPLITS,
    Comparison,
    Scene,
    comparison,
    generator,
    scene,
)

_SCENES, _SIZES = range(10, 100_001), range(32, 1025)
_LEAST_PROBLEMS = 45  # each of the nine kinds once in every five: three train, one val, one test


class Written(NamedTuple):
    """A line of the summary: what is in a file or a folder."""

    name: str
    number: int
    what: str


def write(
    folder: str | os.PathLike[str], *, scenes: int = 2000, size: int = 48, seed: int = 0
) -> list[Written]:
    """The whole world in a new folder: `scenes` pictures to train on, a tenth for each other split.

    size: the side of a picture in pixels. The same arguments give the same bytes.
    """
    if scenes not in _SCENES:
        raise ValueError(f"got {scenes} scenes, expected 10 to 100000")
    if size not in _SIZES:
        raise ValueError(f"got size {size}, expected 32 to 1024 pixels: below, shapes blur")
    with files.fresh_folder(folder) as out:
        world = _World(out, scenes, size, seed)
        with world.progress:
            for split in SPLITS:
                world.write_split(split)
            for split in SPLITS:
                world.write_pairs(split)
            world.write_science()
    return world.written


class _World:
    """One writing of the world: where to, how much, and what has been written."""

    def __init__(self, out: os.PathLike[str], scenes: int, size: int, seed: int):
        self._out, self._size, self._seed = files.path(out), size, seed
        held_out = max(scenes // 10, 10)
        self._scenes = {split: scenes if split == "train" else held_out for split in SPLITS}
        self._pairs = {
            split: max(scenes // (4 if split == "train" else 20), 10) for split in SPLITS
        }
        problems = range(1, max(scenes // 4, _LEAST_PROBLEMS) + 1)
        self._problems = {str(number): self._problem(number) for number in problems}
        pictures = (
            sum(self._scenes.values())
            + 2 * sum(self._pairs.values())
            + sum(1 for problem in self._problems.values() if problem.scene)
        )
        self.progress = cli.Progress(pictures, "drawing", "pictures")
        self.written: list[Written] = []

    def write_split(self, split: str) -> None:
        scenes = [scene(self._seed, split, index) for index in range(self._scenes[split])]
        names = [_file_name(number) for number in range(1, len(scenes) + 1)]
        for name, one in zip(names, scenes, strict=True):
            self._draw(f"{split}/{name}", one)
        self.written.append(Written(f"{split}/", len(scenes), "pictures, PNG and JPEG"))

        captions = [
            annotations.captions(one, self._generator(split, index, "captions"))
            for index, one in enumerate(scenes)
        ]
        self._json(
            f"annotations/captions_{split}.json",
            annotations.coco_captions(names, self._size, captions),
            5 * len(scenes),
            "captions",
        )
        boxes = [drawing.boxes(one, self._size) for one in scenes]
        self._json(
            f"annotations/instances_{split}.json",
            annotations.coco(names, self._size, boxes, scenes),
            sum(map(len, boxes)),
            "boxes",
        )
        images = [f"{split}/{name}" for name in names]
        self._pretrain(split, images, captions)
        self._instruct(split, images, scenes)
        if split != "train":
            self._closed(split, images, scenes)

    def write_pairs(self, split: str) -> None:
        pairs = [comparison(self._seed, split, index) for index in range(self._pairs[split])]
        images = []
        for number, pair in enumerate(pairs, 1):
            names = [f"pairs/{split}/{number:012}_{which}.png" for which in (1, 2)]
            self._draw(names[0], pair.first)
            self._draw(names[1], pair.second)
            images.append(names)
        self.written.append(Written(f"pairs/{split}/", 2 * len(pairs), "pictures to compare"))
        if split == "train":
            self._compare(images, pairs)
        else:
            rows = [
                _row(f"{split}-{index + 1:06}", images[index], question)
                for index, pair in enumerate(pairs)
                for question in dialogues.compare(pair)
            ]
            self._jsonl(f"compare_{split}.jsonl", rows, "questions about two pictures")

    def write_science(self) -> None:
        splits: dict[str, list[str]] = {split: [] for split in science.SPLITS}
        for pid, problem in self._problems.items():
            split = problem.row["split"]
            splits[split].append(pid)
            if problem.scene:
                self._draw(f"science_qa/images/{split}/{pid}/image.png", problem.scene)
        rows = {pid: problem.row for pid, problem in self._problems.items()}
        self._json("science_qa/problems.json", rows, len(rows), "questions with choices")
        self._json("science_qa/pid_splits.json", splits, len(splits), "lists of them")

    def _pretrain(
        self, split: str, images: Sequence[str], captions: Sequence[Sequence[str]]
    ) -> None:
        entries = []
        for index, image in enumerate(images):
            rng = self._generator(split, index, "requests")
            entries += [
                dialogues.caption(f"{split}-{index + 1:06}-{number}", image, text, rng)
                for number, text in enumerate(captions[index], 1)
            ]
        name = _of_split("llava_pretrain", split)
        self._json(name, entries, len(entries), "captions as conversations")

    def _instruct(self, split: str, images: Sequence[str], scenes: Sequence[Scene]) -> None:
        entries = []
        for index, (image, one) in enumerate(zip(images, scenes, strict=True)):
            rng = self._generator(split, index, "instruct")
            name = f"{split}-{index + 1:06}"
            entries.append(dialogues.conversation(f"{name}-conversation", image, one, rng))
            # Two conversations to one of each other type.
            if index % 2:
                entries.append(dialogues.reasoning(f"{name}-reasoning", image, one, rng))
            else:
                entries.append(dialogues.detail(f"{name}-detail", image, one, rng))
        name = _of_split("llava_instruct", split)
        self._json(name, entries, len(entries), "conversations of three types")

    def _compare(self, images: Sequence[Sequence[str]], pairs: Sequence[Comparison]) -> None:
        entries = [
            dialogues.comparison(f"train-{number:06}-comparison", names, pair)
            for number, (names, pair) in enumerate(zip(images, pairs, strict=True), 1)
        ]
        for first in range(0, self._scenes["train"] - 2, 6):
            three = range(first, first + 3)
            entries.append(
                dialogues.summary(
                    f"train-{first + 1:06}-summary",
                    [f"train/{_file_name(index + 1)}" for index in three],
                    [scene(self._seed, "train", index) for index in three],
                    self._generator("train", first, "summary"),
                )
            )
        self._json("llava_compare.json", entries, len(entries), "about two or three pictures")

    def _closed(self, split: str, images: Sequence[str], scenes: Sequence[Scene]) -> None:
        rows = []
        for index, (image, one) in enumerate(zip(images, scenes, strict=True)):
            asked = questions.closed(one, self._generator(split, index, "closed"))
            rows += [_row(f"{split}-{index + 1:06}", image, question) for question in asked]
        self._jsonl(f"closed_{split}.jsonl", rows, "questions with exact answers")

    def _problem(self, number: int) -> science.Problem:
        kind, turn = number % 9, number // 9 % 5
        split = {3: "val", 4: "test"}.get(turn, "train")
        return science.problem(kind, split, self._generator("science", number, "problem"))

    def _generator(self, split: str, index: int, purpose: str) -> random.Random:
        return generator(self._seed, split, index, purpose)

    def _draw(self, name: str, one: Scene) -> None:
        target = self._out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = drawing.draw(one, self._size)
        target.write_bytes(drawing.encode(picture, target.suffix))
        self.progress.advance()

    def _json(self, name: str, value: Any, count: int, what: str) -> None:
        # Without indents: they would make up half of these files.
        files.write_text(self._out / name, json.dumps(value, ensure_ascii=False) + "\n")
        self.written.append(Written(name, count, what))

    def _jsonl(self, name: str, rows: Iterable[dict[str, Any]], what: str) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        files.write_text(self._out / name, "".join(lines))
        self.written.append(Written(name, len(lines), what))


def _of_split(name: str, split: str) -> str:
    """What is learned from has the plain name."""
    return f"{name}.json" if split == "train" else f"{name}_{split}.json"


def _file_name(number: int) -> str:
    return f"{number:012}{'.png' if number % 2 else '.jpg'}"


def _row(name: str, image: str | Sequence[str], question: Question) -> dict[str, Any]:
    return {
        "question_id": f"{name}-{question.category}",
        "image": image,
        "text": question.text,
        "answer": question.answer,
        "category": question.category,
        "two_way": question.two_way,
    }
