"""Questions in ScienceQA's format: every answer is worked out again from picture, hint or facts."""

import re
from collections import Counter

import pytest

from llava_jax.picture_world.scenes import generator
from llava_jax.picture_world.science import problem
from tests.picture_world import oracle

FIELDS = (
    "question choices answer hint image task grade subject topic category skill lecture solution "
    "split"
).split()
FACTS = {  # what a person would say of each shape
    "circle": "is round and has no hole",
    "ring": "is round and has a hole",
    "cross": "is made of two lines that meet in the middle",
    "ladder": "has two long sides with steps between them",
    "comb": "has teeth",
}
ROUND_THE_MAP = ["north", "east", "south", "west"]


def solve(row: dict, seen: oracle.Reading | None) -> str:
    question, hint = row["question"], row["hint"]
    if question == "which object in the picture is the biggest?":
        assert seen
        [big] = [thing for thing in seen.things if thing.size == "big"]
        return f"the {big.name}"
    if question == "what is written on the sign?":
        assert seen
        return oracle.answer("what does the sign say?", seen)
    if match := re.fullmatch(r"which object is in the (north|south)-(west|east)\?", question):
        assert seen
        assert hint == "the picture is a map. north is at the top."
        ways = {"north": "top", "south": "bottom", "west": "left", "east": "right"}
        return f"the {seen.at[f'{ways[match[1]]}-{ways[match[2]]}'].name}"
    if question == "which of the three is the widest?":
        widths = {name: int(cm) for name, cm in re.findall(r"the (\w+) is (\d+) cm wide\.", hint)}
        assert len(widths) == 3
        return f"the {max(widths, key=lambda name: widths[name])}"
    if question == "how many coins do both cost together?":
        prices = re.findall(r"costs (\d+) coins", hint)
        return f"{sum(map(int, prices))} coins"
    if match := re.fullmatch(r"which word tells the colour of the (\w+)\?", question):
        [colour] = re.findall(rf"the {match[1]} is (\w+)\.", hint)
        return colour
    if match := re.fullmatch(r"which of these (.*)\?", question):
        [shape] = [shape for shape, fact in FACTS.items() if fact == match[1]]
        return f"a {shape}"
    if match := re.fullmatch(r"which way is opposite to (\w+)\?", question):
        return ROUND_THE_MAP[(ROUND_THE_MAP.index(match[1]) + 2) % 4]
    assert question == "which word comes first in a dictionary?"
    return sorted(row["choices"])[0]


def test_every_answer_can_be_worked_out(world):
    problems = world.json("science_qa/problems.json")
    for pid, row in problems.items():
        assert list(row) == FIELDS
        picture = f"science_qa/images/{row['split']}/{pid}/{row['image']}"
        seen = world.reading(picture) if row["image"] else None
        assert row["choices"][row["answer"]] == solve(row, seen), (pid, row)
        assert len(set(row["choices"])) == len(row["choices"]) >= 2
        assert row["lecture"]
        assert row["choices"][row["answer"]].split()[-1] in row["solution"]
    files = sorted(path.name for path in (world.folder / "science_qa/images").rglob("*.*"))
    assert files == ["image.png"] * sum(row["image"] is not None for row in problems.values())


def test_splits_subjects_grades_and_sources(world):
    problems = world.json("science_qa/problems.json")
    splits = world.json("science_qa/pid_splits.json")
    assert list(splits) == ["train", "val", "test"]
    assert sorted(pid for pids in splits.values() for pid in pids) == sorted(problems)
    for split, pids in splits.items():
        assert all(problems[pid]["split"] == split for pid in pids)
        rows = [problems[pid] for pid in pids]
        assert {row["subject"] for row in rows} == {
            "natural science",
            "social science",
            "language science",
        }
        # With a picture, with a hint only, with neither: all three occur in each split.
        sources = {(bool(row["image"]), bool(row["hint"])) for row in rows}
        assert sources >= {(True, False), (False, True), (False, False)}
        grades = {int(row["grade"].removeprefix("grade")) for row in rows}
        assert min(grades) <= 6 < max(grades)


@pytest.mark.parametrize("kind", range(9))
def test_no_place_among_the_choices_is_usual(kind):
    rows = [problem(kind, "train", generator(0, "x", n, "choices")).row for n in range(120)]
    by_length = Counter((len(row["choices"]), row["answer"]) for row in rows)
    for (length, _), number in by_length.items():
        total = sum(count for (other, _), count in by_length.items() if other == length)
        assert number < total / length + 3 * (total / length) ** 0.5 + 3
