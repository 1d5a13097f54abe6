"""Conversations: they parse, render under the templates, and say only what the pictures show."""

import re
from collections import Counter

import numpy as np
import pytest

from llava_jax.conversation import parse, pieces, template
from llava_jax.picture_world import dialogues
from llava_jax.picture_world.scenes import generator, scene
from tests.picture_world import oracle
from tests.picture_world.oracle import CELL, NAME, NUMBERS, Reading

TRAIN = ("llava_pretrain.json", "llava_instruct.json", "llava_compare.json")
SPLITS = ("dev", "test", "unseen_pairs")
HELD_OUT = tuple(f"llava_pretrain_{split}.json" for split in SPLITS)
HELD_OUT_CHATS = tuple(f"llava_instruct_{split}.json" for split in SPLITS)


def images_of(entry: dict) -> list[str]:
    return [entry["image"]] if isinstance(entry["image"], str) else entry["image"]


def rounds_of(entry: dict) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in entry["conversations"]]
    questions = [re.sub(r"\n?<image>\n?", "", value) for value in values[::2]]
    return list(zip(questions, values[1::2], strict=True))


@pytest.mark.parametrize("name", [*TRAIN, *HELD_OUT, *HELD_OUT_CHATS])
def test_every_conversation_parses_and_renders(world, name):
    entries = world.json(name)
    assert len({entry["id"] for entry in entries}) == len(entries)
    for entry in entries:
        images = images_of(entry)
        assert all((world.folder / image).is_file() for image in images)
        turns = parse(entry["conversations"], len(images))
        assert turns[0].images == len(images)
        templates = ["v0", "v1", "plain"] if "pretrain" in name else ["v0", "v1"]
        for kind in templates:
            parts = pieces(turns, template(kind))
            learned = "".join(part.text for part in parts if part.supervised)
            assert all(turn.texts[0] in learned for turn in turns[1::2])


@pytest.mark.parametrize("name", [TRAIN[0], *HELD_OUT])
def test_captions_of_stage_1_are_true(world, name):
    entries = world.json(name)
    for entry in entries:
        [(_, caption)] = rounds_of(entry)
        assert oracle.says_true(caption, world.reading(entry["image"]))
    values = [entry["conversations"][0]["value"] for entry in entries]
    assert len({value.replace("<image>", "").strip() for value in values}) >= 8
    before = sum(value.startswith("<image>") for value in values)
    assert 0.35 < before / len(values) < 0.65


def instruct(world, kind: str) -> list[tuple[Reading, list[tuple[str, str]]]]:
    entries = [e for e in world.json("llava_instruct.json") if e["id"].endswith(f"-{kind}")]
    assert len(entries) >= 60
    return [(world.reading(entry["image"]), rounds_of(entry)) for entry in entries]


def test_conversations_say_what_the_picture_shows(world):
    dense = total = 0
    for seen, rounds in instruct(world, "conversation"):
        assert len(rounds) >= 4
        for question, answer in rounds:
            assert oracle.answer(question, seen) == answer, question
            dense += question.startswith("describe")
            total += 1
    assert 0.37 < dense / total < 0.43


def test_no_answer_is_usual_in_conversations():
    """As in test_questions.py, but as conversations choose what to ask: of each category."""
    answers = {form: Counter() for form in ("how many", "is there", "where is", "what colour")}
    for index in range(2000):
        one, rng = scene(0, "train", index), generator(0, "train", index, "conversation")
        for question, answer in rounds_of(dialogues.conversation("", "", one, rng)):
            if (form := " ".join(question.split()[:2])) in answers:
                answers[form][answer] += 1
    shares = [max(counts.values()) / counts.total() for counts in answers.values()]
    # Fair shares are 0.25, 0.5, 0.25 and 0.17.
    assert np.all(np.subtract(shares, (0.25, 0.5, 0.25, 0.17)) < 0.06), shares


def test_descriptions_are_true_and_whole(world):
    for seen, [(_, text)] in instruct(world, "detail"):
        assert oracle.describes_all(text, seen), text


def test_reasoning_comes_to_what_the_picture_shows(world):
    kinds = Counter()
    for seen, [(question, text)] in instruct(world, "reasoning"):
        kinds[question.split()[0]] += 1
        *steps, last = text.removesuffix(".").split(". ")
        assert len(steps) >= 2
        assert last == conclusion(question, seen), (question, text)
        assert all(step_holds(step, seen) for step in steps), (question, text)
    assert len(kinds) >= 4


def conclusion(question: str, seen: Reading) -> str:
    if re.fullmatch(rf"how many objects are left without the ({NAME})\?", question):
        return f"so it is {NUMBERS[len(seen.at) - 1]}"
    if match := re.fullmatch(rf"where is the ({NAME}) in a mirror\?", question):
        row, side = seen.cell_of(match[1]).split("-")
        return f"so it is at the {row}-{ {'left': 'right', 'right': 'left'}[side] }"
    if match := re.fullmatch(rf"what is (beside|above|below) the ({NAME})\?", question):
        row, side = seen.cell_of(match[2]).split("-")
        if match[1] == "beside":
            cell = f"{row}-{ {'left': 'right', 'right': 'left'}[side] }"
        else:
            assert row == {"above": "bottom", "below": "top"}[match[1]]
            cell = f"{ {'above': 'top', 'below': 'bottom'}[match[1]] }-{side}"
        return f"so it is a {seen.at[cell].name}"
    if question == "are there more big shapes or more small shapes?":
        more = sum(1 if thing.size == "big" else -1 for thing in seen.shapes)
        if not more:
            return "so there are as many of both"
        return f"so there are more {'big' if more > 0 else 'small'} shapes"
    assert question == "which two objects are alike in colour?"
    colours = Counter(thing.colour for thing in seen.shapes)
    [colour] = [colour for colour, number in colours.items() if number == 2]
    one, other = (thing.shape for thing in seen.shapes if thing.colour == colour)
    return f"so it is the {one} and the {other}"


def step_holds(step: str, seen: Reading) -> bool:
    if match := re.fullmatch(rf"the ({NAME}) is at the ({CELL})", step):
        return seen.cell_of(match[1]) == match[2]
    if match := re.fullmatch(r"the (\w+) is (\w+)", step):
        return (match[2], match[1]) in [(thing.colour, thing.shape) for thing in seen.shapes]
    if match := re.fullmatch(r"there are (\w+) objects", step):
        return match[1] == NUMBERS[len(seen.at)]
    if match := re.fullmatch(r"(\w+) minus one is (\w+)", step):
        return NUMBERS.index(match[1]) - 1 == NUMBERS.index(match[2])
    if match := re.fullmatch(r"(big|small) shapes: (\w+)", step):
        number = [thing.size for thing in seen.shapes].count(match[1])
        return match[2] == (NUMBERS[number] if number else "no")
    if match := re.fullmatch(rf"(beside|above|below) it is the ({CELL})", step):
        return match[2] in seen.at
    return step in ("a mirror makes left right", "a mirror makes right left")


def difference(first: Reading, second: Reading) -> tuple[str, str, str | None]:
    """In a sentence, by its kind, and where there is more."""
    [cell] = [
        cell for cell in oracle.CELLS if _about(first.at.get(cell)) != _about(second.at.get(cell))
    ]
    before, after = first.at.get(cell), second.at.get(cell)
    if not before:
        assert after
        return f"there is one more object: a {after.name} at the {cell}.", "the count", "the second"
    if not after:
        return f"the {before.name} at the {cell} is gone.", "the count", "the first"
    if before.shape == after.shape:
        return f"the {before.name} at the {cell} is now {after.colour}.", "a colour", None
    return f"the {before.name} at the {cell} is now a {after.shape}.", "a shape", None


def _about(thing):
    return thing and (thing.full, thing.text)


def test_comparisons_tell_the_difference(world):
    entries = [e for e in world.json("llava_compare.json") if e["id"].endswith("comparison")]
    assert len(entries) == 30
    for entry in entries:
        sentence, kind, more = difference(*map(world.reading, entry["image"]))
        rounds = dict(rounds_of(entry))
        assert rounds.pop("what is different in the second picture?") == sentence
        assert rounds.pop("what changed: a colour, a shape or the count?") == kind
        assert rounds == ({"which picture has more objects?": more} if more else {})


@pytest.mark.parametrize("split", ["dev", "test", "unseen_pairs"])
def test_closed_questions_about_two_pictures(world, split):
    rows = world.rows(f"compare_{split}.jsonl")
    assert len(rows) >= 10
    for row in rows:
        _, kind, more = difference(*map(world.reading, row["image"]))
        assert row["answer"] == {"change": kind, "more": more}[row["category"]]
        assert row["two_way"] == (row["category"] == "more")


def test_summaries_tell_of_each_picture(world):
    entries = [e for e in world.json("llava_compare.json") if e["id"].endswith("summary")]
    assert len(entries) >= 20
    for entry in entries:
        seen = [world.reading(image) for image in entry["image"]]
        [(_, text)] = rounds_of(entry)
        *each, last = text.removesuffix(".").split(". ")
        for order, reading, sentence in zip(("first", "second", "third"), seen, each, strict=True):
            start = f"the {order} picture shows "
            assert sentence.startswith(start)
            named = sorted(oracle.parts(sentence.removeprefix(start)))
            assert named == sorted(f"a {thing.name}" for thing in reading.things)
        total = sum(len(reading.at) for reading in seen)
        assert last == f"together they have {NUMBERS[total]} objects"
