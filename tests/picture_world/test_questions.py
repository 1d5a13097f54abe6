"""Closed questions: every answer is what the picture shows, and none can be told without it."""

import itertools
from collections import Counter, defaultdict

import pytest

from llava_jax.picture_world import dialogues, questions
from llava_jax.picture_world.scenes import UNSEEN_PAIRS, comparison, generator, scene
from tests.picture_world import oracle

HELD_OUT = ("dev", "test", "unseen_pairs")
# No answer has more of its category than this, in percent; a fair share is 100 by the answers.
MOST = {"colour": 25, "shape": 28, "at": 15, "where": 31, "count": 31, "read": 25}
MOST |= {"size": 56, "exist": 56, "bigger": 10, "left": 10, "higher": 10}


@pytest.mark.parametrize("split", HELD_OUT)
def test_every_answer_is_what_the_picture_shows(world, split):
    rows = world.rows(f"closed_{split}.jsonl")
    for row in rows:
        assert oracle.answer(row["text"], world.reading(row["image"])) == row["answer"], row
        assert row["two_way"] == (row["category"] in "size bigger left higher exist".split())
    assert {row["category"] for row in rows} == set(MOST)
    assert len({row["question_id"] for row in rows}) == len(rows)


def asked(split: str, number: int) -> list[questions.Question]:
    return [
        question
        for index in range(number)
        for question in questions.closed(
            scene(0, split, index), generator(0, split, index, "closed")
        )
    ]


@pytest.fixture(scope="module")
def train() -> list[questions.Question]:
    return asked("train", 2000)


def test_no_answer_is_usual(train):
    answers = defaultdict(Counter)
    for question in train:
        answers[question.category][question.answer] += 1
    for category, counts in answers.items():
        [(answer, most)] = counts.most_common(1)
        assert 100 * most / counts.total() < MOST[category], (category, answer)


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_answer_is_usual_in_what_is_written_by_default(split):
    """200 scenes and 100 pairs: above the most of 2,000 only by what so few leave to chance."""
    answers, named_first = defaultdict(Counter), Counter()
    pairs = [comparison(0, split, index) for index in range(100)]
    about_two = [question for pair in pairs for question in dialogues.compare(pair)]
    for question in [*asked(split, 200), *about_two]:
        answers[question.category][question.answer] += 1
        if question.category in ("bigger", "left", "higher"):
            named_first[question.text.index(question.answer) < question.text.index(" or ")] += 1
    assert set(answers) == {*MOST, "more", "change"}
    assert abs(answers["more"]["the first"] - answers["more"]["the second"]) <= 1
    assert max(answers["change"].values()) <= 35
    assert 0.42 < named_first[True] / named_first.total() < 0.58
    # Of unseen pairs there are five, and questions are about these.
    most = MOST | ({"at": 25, "bigger": 20, "left": 20, "higher": 20} if "un" in split else {})
    for category in MOST:
        share, n = most[category] / 100, answers[category].total()
        [(answer, number)] = answers[category].most_common(1)
        assert number < n * share + 2 * (n * share * (1 - share)) ** 0.5, (category, answer)


@pytest.mark.parametrize("seed", range(4))
def test_neither_picture_is_the_one_with_more(seed):
    for pairs in (10, 25, 50):
        answers = Counter(
            question.answer
            for index in range(pairs)
            for question in dialogues.compare(comparison(seed, "train", index))
            if question.two_way
        )
        assert abs(answers["the first"] - answers["the second"]) <= 1


def test_a_question_does_not_tell_its_answer(train):
    """The usual answer to each question, learned by its very words, is no better than chance."""
    usual, fallback = defaultdict(Counter), defaultdict(Counter)
    for question in train:
        usual[question.text][question.answer] += 1
        fallback[question.category][question.answer] += 1
    right, total = Counter(), Counter()
    for question in asked("test", 500):
        guess = usual.get(question.text) or fallback[question.category]
        right[question.category] += guess.most_common(1)[0][0] == question.answer
        total[question.category] += 1
    # Of two named objects one is right; the others as often as their usual answer, and what 500
    # scenes leave to chance.
    most = {**MOST, "bigger": 50, "left": 50, "higher": 50}
    for category in total:
        assert total[category] > 60
        assert 100 * right[category] / total[category] < most[category] + 8, category


def test_the_first_named_is_right_half_the_time(train):
    for category in ("bigger", "left", "higher"):
        of_category = [question for question in train if question.category == category]
        first = sum(q.text.index(q.answer) < q.text.index(" or ") for q in of_category)
        assert 0.46 < first / len(of_category) < 0.54


def test_objects_that_are_not_there_are_asked_for_by_what_is(train):
    """Half of the refusals can only be known by seeing which colour has which shape."""
    hard = total = 0
    for index in range(600):
        one = scene(0, "train", index)
        question = questions.ask("exist", one, generator(0, "train", index, "exist"))
        assert question
        if question.answer == "no" and len(one.shapes) > 2:
            colour, shape = question.text.removesuffix("?").split()[-2:]
            hard += any(t.colour == colour for t in one.shapes) and any(
                t.shape == shape for t in one.shapes
            )
            total += 1
    assert 0.4 < hard / total < 0.9


def test_of_unseen_pairs_it_is_these_that_are_asked_for():
    for question in asked("unseen_pairs", 200):
        if question.category in ("where", "size", "exist"):
            words = question.text.replace("?", "").split()
            assert any(pair in UNSEEN_PAIRS for pair in itertools.pairwise(words))
    answers = [q.answer for q in asked("unseen_pairs", 200) if q.category == "exist"]
    assert 0.35 < answers.count("yes") / len(answers) < 0.65
