"""The exam of the picture world: what counts as right, and how much can be said without sight."""

import io
import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from llava_jax.evals import picture_world as exam
from llava_jax.evals.picture_world import GROUPS, MANY, TWO, Question
from llava_jax.picture_world import questions, scenes
from llava_jax.picture_world.writing import write


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "world"
    write(folder, scenes=100)
    return folder


def asked(*categories: str, scene: str = "test/1.png", answer: str = "red") -> list[Question]:
    return [Question(f"{scene}-{c}", scene, f"{c}?", answer, c) for c in categories]


def test_questions_are_those_of_the_file(world):
    every = exam.read(world, "test")
    rows = [json.loads(line) for line in (world / "closed_test.jsonl").read_text().splitlines()]
    assert [(q.id, q.scene, q.text, q.answer, q.category) for q in every] == [
        (r["question_id"], r["image"], r["text"], r["answer"], r["category"]) for r in rows
    ]
    assert all(
        (q.category in GROUPS[TWO]) == r["two_way"] for q, r in zip(every, rows, strict=True)
    )
    three = exam.read(world, "test", scenes=3)
    assert three == [
        q
        for q in every
        if q.scene
        in {f"test/00000000000{i}" + s for i, s in ((1, ".png"), (2, ".jpg"), (3, ".png"))}
    ]
    with pytest.raises(ValueError, match=r"closed_tset\.jsonl, expected .* --out"):
        exam.read(world, "tset")


def test_groups_are_all_categories_once():
    assert sorted(GROUPS[MANY] + GROUPS[TWO]) == sorted(questions.CATEGORIES)


def test_scores():
    one = asked("colour", "shape", "size")
    two = asked("colour", "left", scene="test/2.jpg", answer="the red ring")
    score = exam.score([*one, *two], ["red", "redder", "red", " the red ring\n", "The red ring"])
    assert {name: (share.right, share.of) for name, share in score.items()} == {
        MANY: (2, 3),
        TWO: (1, 2),
        "colour": (2, 2),
        "shape": (0, 1),
        "size": (1, 1),
        "left": (0, 1),
    }
    assert score[MANY].share == 2 / 3


def test_error_over_pictures():
    """Of independent questions it is the binomial one; of copies no less than of one of them."""
    rng = np.random.default_rng(0)
    right_N = rng.random(400) < 0.7
    singles = [asked("colour", scene=str(i))[0] for i in range(400)]
    answers = ["red" if right else "" for right in right_N]
    share = exam.score(singles, answers)["colour"]
    assert share.error == pytest.approx(math.sqrt(share.share * (1 - share.share) / 399))
    copies = [q._replace(category=c) for q in singles for c in GROUPS[MANY][:5]]
    copied = exam.score(copies, [answer for answer in answers for _ in range(5)])[MANY]
    assert (copied.of, copied.share) == (2000, share.share)
    assert copied.error == pytest.approx(share.error)


def test_other_pictures_are_never_ones_own(world):
    every = exam.read(world, "test")
    others = exam.next_scenes(every)
    assert not any(q.scene == other for q, other in zip(every, others, strict=True))
    assert set(others) == {q.scene for q in every}
    by_scene = {(q.scene, other) for q, other in zip(every, others, strict=True)}
    assert len(by_scene) == len(set(others))  # one for each
    with pytest.raises(ValueError, match="about 1 pictures, expected 2"):
        exam.next_scenes(exam.read(world, "test", scenes=1))


def test_mean_picture(tmp_path):
    for i, value in enumerate((10, 20, 60)):
        Image.new("RGB", (4, 3), (value, 0, 255)).save(tmp_path / f"{i}.png")
    with Image.open(io.BytesIO(exam.mean_picture(tmp_path.iterdir()))) as mean:
        assert (mean.size, set(mean.get_flattened_data())) == ((4, 3), {(30, 0, 255)})
    with pytest.raises(ValueError, match="no pictures"):
        exam.mean_picture([])


def test_asking_keeps_order_and_asks_nothing_twice():
    rng = random.Random(0)
    texts = [rng.choice("abcdefg") * rng.randint(1, 9) for _ in range(90)]
    made = [Question(str(i), "", text, "", "colour") for i, text in enumerate(texts)]
    pictures = [rng.choice(["p", "q"]) for _ in made]
    calls, told = [], []

    def generate(prompts, images):
        calls.append(list(zip(prompts, [one for [one] in images], strict=True)))
        return [f"{p} {one}" for p, [one] in zip(prompts, images, strict=True)]

    answers = exam.ask(made, pictures, generate, rows=16, on_answers=told.append)
    assert answers == [f"{t} {p}" for t, p in zip(texts, pictures, strict=True)]
    assert {len(call) for call in calls} == {16}
    unique = {*zip(texts, pictures, strict=True)}
    assert len(calls) == -(-len(unique) // 16)
    assert sum(told) == 90


@pytest.mark.parametrize("split", ["train", "test", "unseen_pairs"])
def test_every_question_is_told_its_category(split):
    rng = random.Random(1)
    for i in range(300):
        for question in questions.closed(scenes.scene(3, split, i), rng):
            assert exam.category_of(question.text) == question.category, question
    for text in ("where is the red ring in a mirror?", "describe the red ring.", ""):
        assert exam.category_of(text) is None


def test_training_rounds(world):
    rounds = exam.training_rounds(world)
    entries = json.loads((world / "llava_instruct.json").read_text())
    said = {turn["value"] for entry in entries for turn in entry["conversations"]}
    assert len(rounds) > 150
    assert all(answer in said for _, answer in rounds)
    assert not any("<image>" in text or "describe" in text for text, _ in rounds)


def test_usual_answers():
    training = [
        ("what colour is the ring?", "blue"),
        ("what colour is the ring?", "red"),
        ("what colour is the ring?", "red"),
        ("what colour is the cross?", "blue"),
        ("what colour is the comb?", "blue"),
        ("which is bigger, the red ring or the blue comb?", "the blue comb"),
        ("which is bigger, the pink ring or the blue comb?", "the blue comb"),
        ("which is bigger, the pink ring or the blue ring?", "the pink ring"),
    ]
    wanted = {
        "what colour is the ring?": "red",  # the usual one to this very question
        "what colour is the ladder?": "blue",  # the category's
        "which is bigger, the red comb or the pink cross?": "the pink cross",  # the second
        "what does the sign say?": "",  # nothing was learned of it
    }
    made = [Question("", "", text, "", exam.category_of(text) or "") for text in wanted]
    assert exam.usual_answers(training, made) == list(wanted.values())


def test_the_usual_answer_is_a_real_bound(world):
    """On the training questions themselves no other constant answer to a text is better."""
    rounds = exam.training_rounds(world)
    made = [Question("", "", text, answer, exam.category_of(text) or "") for text, answer in rounds]
    right = sum(map(exam.is_right, made, exam.usual_answers(rounds, made)))
    answers = {}
    for text, answer in rounds:
        answers.setdefault(text, []).append(answer)
    assert right == sum(max(map(said.count, said)) for said in answers.values())


def test_examination(world):
    """Someone who reads the answers off the pictures, and is told which picture it sees."""
    every = exam.read(world, "test", scenes=4)
    truth = {(q.text, str(world / q.scene)): q.answer for q in every}

    def generate(prompts, images):
        return [truth.get((p, one), "?") for p, [one] in zip(prompts, images, strict=True)]

    told = []
    said = exam.examine(world, every, generate, on_answers=told.append)
    assert tuple(said) == exam.ROWS
    assert sum(told) == 3 * len(every)
    scores = {row: exam.score(every, answers) for row, answers in said.items()}
    assert scores[exam.MODEL][MANY].share == scores[exam.MODEL][TWO].share == 1
    assert scores[exam.OTHER][MANY].share < 0.5
    assert set(said[exam.MEAN]) == {"?"}
    best = max(scores[row][MANY].share for row in exam.ROWS[1:])
    assert exam.strongest_blind(scores, MANY) == best < 1


def test_what_is_shown_was_not_picked(world):
    every = exam.read(world, "test")
    rng = random.Random(2)
    answers = [q.answer if rng.random() < 0.7 else "?" for q in every]
    shown = exam.chosen(every, answers)
    kinds = [(every[i].category, answers[i] == every[i].answer) for i in shown]
    assert len(set(kinds)) == len(kinds) == 22  # right and wrong of eleven categories
    # The order of the file makes no difference.
    again = exam.chosen(every[::-1], answers[::-1])
    assert [every[i] for i in shown] == [every[::-1][i] for i in again]
    assert len({every[i].scene for i in shown}) > 4
    assert all(every[i].category == "colour" for i in exam.chosen(every, answers)[:2])
    assert len(exam.chosen(every, [q.answer for q in every])) == 11
