"""Closed questions about pictures of the picture world that training has not seen.

An answer is right if it is the expected one, letter by letter. Questions with two possible answers
are counted apart: there a guess is right half of the time. What can be said without sight is
measured beside the model, by rows that are blind:

    another picture   the model with the picture of the next scene
    mean picture      the model with the mean of the training pictures
    usual answer      no model: what training most often answers to the very same question, or, to
                      one it does not ask, to questions of its category

>>> questions = read(world, "test")
>>> said = examine(world, questions, generate)
>>> scores = {row: score(questions, answers) for row, answers in said.items()}
"""

import collections
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from llava_jax import files
from llava_jax.picture_world.questions import CATEGORIES, TWO_WAY

MODEL, OTHER, MEAN, USUAL = "the model", "another picture", "mean picture", "usual answer"
ROWS = (MODEL, OTHER, MEAN, USUAL)
MANY, TWO = "one in many", "one of two"
GROUPS = {
    MANY: tuple(name for name in CATEGORIES if name not in TWO_WAY),
    TWO: tuple(name for name in CATEGORIES if name in TWO_WAY),
}
ANSWER_TOKENS = 16  # "a yellow ladder" and the like, letter by letter at the worst

Generate = Callable[[list[str], list[list[Any]]], list[str]]  # prompts, pictures of each; answers
Folder = str | os.PathLike[str]

# What the generator of questions writes, so that those in training's conversations, which carry no
# category, get theirs.
_FORMS = {
    "colour": r"what colour is the [a-z]+\?",
    "shape": r"what shape is the [a-z]+ object\?",
    "at": r"what is at the [a-z-]+\?",
    "where": r"where is the [a-z]+( [a-z]+)?\?",
    "count": r"how many objects are there\?",
    "read": r"what does the sign say\?",
    "size": r"is the [a-z ]+ small or big\?",
    "bigger": r"which is bigger, .+\?",
    "left": r"which is further left, .+\?",
    "higher": r"which is higher, .+\?",
    "exist": r"is there an? [a-z ]+\?",
}
assert tuple(_FORMS) == CATEGORIES


class Question(NamedTuple):
    """scene: its picture's name, in the world's folder."""

    id: str
    scene: str
    text: str
    answer: str
    category: str


class Share(NamedTuple):
    """error: the standard error of right / of. Questions about one picture are not independent:
    it is taken over pictures."""

    right: int
    of: int
    error: float

    @property
    def share(self) -> float:
        return self.right / self.of


Score = dict[str, Share]  # by group (MANY, TWO) and by category


def read(world: Folder, split: str, scenes: int = 0) -> list[Question]:
    """The closed questions of a split, or those about its first `scenes` pictures."""
    file = files.path(world) / f"closed_{split}.jsonl"
    if not file.exists():
        raise ValueError(
            f"got no {file}, expected the questions of a picture world: "
            f"python -m llava_jax.picture_world --out {world}"
        )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = dict.fromkeys(row["image"] for row in rows)
    if scenes:
        kept = dict.fromkeys(list(kept)[:scenes])
    return [
        Question(row["question_id"], row["image"], row["text"], row["answer"], row["category"])
        for row in rows
        if row["image"] in kept
    ]


def examine(
    world: Folder,
    questions: Sequence[Question],
    generate: Generate,
    *,
    on_answers: Callable[[int], None] = lambda count: None,
) -> dict[str, list[str]]:
    """Answers of every row, in the order of the questions. on_answers: gets how many there are
    more; in all three times as many as questions."""
    folder = files.path(world)
    seen = [str(folder / question.scene) for question in questions]
    others = [str(folder / scene) for scene in next_scenes(questions)]
    mean = mean_picture(sorted((folder / "train").iterdir()))
    return {
        MODEL: ask(questions, seen, generate, on_answers=on_answers),
        OTHER: ask(questions, others, generate, on_answers=on_answers),
        MEAN: ask(questions, [mean] * len(questions), generate, on_answers=on_answers),
        USUAL: usual_answers(training_rounds(folder), questions),
    }


def ask(
    questions: Sequence[Question],
    pictures: Sequence[str | bytes],
    generate: Generate,
    *,
    rows: int = 64,
    on_answers: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """An answer to each question about its picture, so many rows at a time. A question that comes
    again about the same picture is not asked again."""
    asked = list(zip([question.text for question in questions], pictures, strict=True))
    # Like lengths together, and always as many: generation compiles for each shape.
    waiting = sorted(set(asked), key=lambda one: (len(one[0]), one[0], str(one[1])))
    times = collections.Counter(asked)
    rows = min(rows, 1 << (len(waiting) - 1).bit_length())
    answers: dict[tuple[str, str | bytes], str] = {}
    for first in range(0, len(waiting), rows):
        some = waiting[first : first + rows]
        filled = some + some[-1:] * (rows - len(some))
        said = generate([text for text, _ in filled], [[picture] for _, picture in filled])
        answers |= zip(some, said, strict=False)
        on_answers(sum(times[one] for one in some))
    return [answers[one] for one in asked]


def next_scenes(questions: Sequence[Question]) -> list[str]:
    """For each question the scene after its own; after the last comes the first."""
    scenes = list(dict.fromkeys(question.scene for question in questions))
    if len(scenes) < 2:
        raise ValueError(f"got questions about {len(scenes)} pictures, expected 2 or more")
    following = dict(zip(scenes, [*scenes[1:], scenes[0]], strict=True))
    return [following[question.scene] for question in questions]


def mean_picture(pictures: Iterable[epath.Path]) -> bytes:
    """A PNG of the mean of pictures of one size."""
    total, count = np.zeros(()), 0
    for file in pictures:
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            total = total + np.asarray(picture.convert("RGB"), np.float64)
        count += 1
    if not count:
        raise ValueError("got no pictures to take the mean of, expected at least one")
    png = io.BytesIO()
    Image.fromarray(np.rint(total / count).astype(np.uint8)).save(png, "PNG")
    return png.getvalue()


def training_rounds(world: Folder) -> list[tuple[str, str]]:
    """The closed questions in stage 2's conversations, with their answers."""
    entries = json.loads((files.path(world) / "llava_instruct.json").read_text())
    found = []
    for entry in entries:
        turns = [turn["value"].removeprefix("<image>\n") for turn in entry["conversations"]]
        found += zip(turns[::2], turns[1::2], strict=True)
    return [(text, answer) for text, answer in found if category_of(text)]


def category_of(text: str) -> str | None:
    """Of a closed question; None: it is none."""
    for category, form in _FORMS.items():
        if re.fullmatch(form, text):
            return category
    return None


def usual_answers(training: Iterable[tuple[str, str]], questions: Sequence[Question]) -> list[str]:
    """The strongest guess without sight. Among the two that a question names ("the red ring or the
    blue cross?") a category's usual answer is the one that comes first, or the second."""
    by_text: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    by_category = {category: collections.Counter[str]() for category in CATEGORIES}
    for text, answer in training:
        category = category_of(text)
        assert category, text
        by_text[text][answer] += 1
        by_category[category][_placed(text, answer)] += 1
    return [
        _most(by_text[question.text])
        if question.text in by_text
        else _named(question.text, _most(by_category[question.category]))
        for question in questions
    ]


_FIRST, _SECOND = "the first named", "the second named"


def _options(text: str) -> list[str]:
    named = re.fullmatch(r"which is [a-z ]+, (.+) or (.+)\?", text)
    return list(named.groups()) if named else []


def _placed(text: str, answer: str) -> str:
    options = _options(text)
    return (_FIRST, _SECOND)[options.index(answer)] if answer in options else answer


def _named(text: str, answer: str) -> str:
    if answer in (_FIRST, _SECOND) and (options := _options(text)):
        return options[answer == _SECOND]
    return answer


def _most(counts: collections.Counter[str]) -> str:
    """Of two that are as frequent, the one earlier in the alphabet."""
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")


def is_right(question: Question, answer: str) -> bool:
    return answer.strip() == question.answer


def score(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Shares of right answers: of both groups, then of each category, where it has questions."""
    rights = [is_right(q, answer) for q, answer in zip(questions, answers, strict=True)]
    wanted = {**GROUPS, **{category: (category,) for category in CATEGORIES}}
    found = {}
    for name, categories in wanted.items():
        by_scene: dict[str, list[bool]] = collections.defaultdict(list)
        for question, right in zip(questions, rights, strict=True):
            if question.category in categories:
                by_scene[question.scene].append(right)
        if by_scene:
            found[name] = _share(by_scene)
    return found


def _share(by_scene: Mapping[str, Sequence[bool]]) -> Share:
    right, of = (sum(map(each, by_scene.values())) for each in (sum, len))
    mean, scenes = right / of, len(by_scene)
    # The usual estimate for the ratio of two sums over independent scenes.
    apart = sum((sum(rights) - mean * len(rights)) ** 2 for rights in by_scene.values())
    return Share(right, of, math.sqrt(apart * scenes / max(scenes - 1, 1)) / of)


def strongest_blind(scores: Mapping[str, Score], name: str) -> float:
    """The largest share of any row but the model's, in a group or a category."""
    return max(score[name].share for row, score in scores.items() if row != MODEL)


def chosen(questions: Sequence[Question], answers: Sequence[str]) -> list[int]:
    """Which to show: of each category the first that is right and the first that is wrong, in the
    order of the ids' SHA-256."""
    order = sorted(range(len(questions)), key=lambda i: sha256(questions[i].id.encode()).digest())
    found: dict[tuple[str, bool], int] = {}
    for i in order:
        found.setdefault((questions[i].category, is_right(questions[i], answers[i])), i)
    kinds = [
        (name, right) for names in GROUPS.values() for name in names for right in (True, False)
    ]
    return [found[kind] for kind in kinds if kind in found]
