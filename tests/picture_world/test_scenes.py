"""Scenes: pure functions of seed, split and number; what the splits keep apart."""

from collections import Counter

import pytest

from llava_jax.picture_world import scenes
from llava_jax.picture_world.scenes import SPLITS, UNSEEN_PAIRS, comparison, scene


def many(split: str, number: int = 400, seed: int = 0) -> list[scenes.Scene]:
    return [scene(seed, split, index) for index in range(number)]


def content(one: scenes.Scene) -> frozenset:
    return frozenset((t.cell, t.colour, t.shape, t.size, t.text) for t in one.things)


def test_a_scene_depends_on_seed_split_and_number_alone():
    assert scene(3, "train", 7) == scene(3, "train", 7)
    others = [scene(4, "train", 7), scene(3, "dev", 7), scene(3, "train", 8)]
    assert len({scene(3, "train", 7), *others}) == 4
    assert comparison(3, "dev", 7) == comparison(3, "dev", 7)


def test_no_arrangement_of_one_split_is_in_another():
    by_split = {
        split: {content(one) for seed in (0, 1) for one in many(split, 150, seed)}
        for split in SPLITS
    }
    assert all(len(found) > 100 for found in by_split.values())
    for one, other in zip(SPLITS, [*SPLITS[1:], SPLITS[0]], strict=True):
        assert not by_split[one] & by_split[other]
    assert not by_split["train"] & by_split["test"]
    # The same pictures in other splits would make the held-out ones worth nothing: pairs, too.
    for split in SPLITS:
        for index in range(20):
            pair = comparison(0, split, index)
            assert scenes.belongs(pair.first, split)
            assert scenes.belongs(pair.second, split)


def test_unseen_pairs_are_in_one_split_alone():
    assert len(UNSEEN_PAIRS) == 5
    assert len({shape for _, shape in UNSEEN_PAIRS}) == 5
    for split in SPLITS:
        pairs = Counter(thing.pair for one in many(split) for thing in one.shapes)
        if split == "unseen_pairs":
            assert pairs.keys() >= UNSEEN_PAIRS
            assert all({t.pair for t in one.things} & UNSEEN_PAIRS for one in many(split))
        else:
            assert not pairs.keys() & UNSEEN_PAIRS
            assert len(pairs) == 25
            assert max(pairs.values()) < 3 * min(pairs.values())


def test_everything_occurs_about_as_often():
    every = many("train", 1000)
    things = [thing for one in every for thing in one.things]
    counts = [
        Counter(len(one.things) for one in every),
        Counter(one.background for one in every),
        Counter(one.style for one in every),
        Counter(thing.cell for thing in things),
        Counter(thing.size for thing in things if not thing.is_sign),
        Counter(thing.shape for thing in things if not thing.is_sign),
        Counter(thing.colour for thing in things if not thing.is_sign),
        Counter(thing.text for thing in things if thing.is_sign),
    ]
    assert [len(count) for count in counts] == [4, 2, 2, 4, 2, 5, 6, 6]
    for count in counts:
        assert max(count.values()) < 1.5 * min(count.values()), count


@pytest.mark.parametrize("split", SPLITS)
def test_names_are_of_one_object_and_cells_hold_one(split):
    for one in many(split):
        assert len({thing.pair for thing in one.shapes}) == len(one.shapes)
        assert len({thing.cell for thing in one.things}) == len(one.things)
        for thing in one.things:
            radius = scenes.DIAMETER[thing.size] / 2
            for place, number in zip(thing.centre, (thing.column, thing.row), strict=True):
                assert 0.5 * number <= place - radius
                assert place + radius <= 0.5 * number + 0.5


def test_two_scenes_to_compare_differ_as_said():
    kinds = Counter()
    for index in range(200):
        pair = comparison(0, "train", index)
        gone = set(pair.first.things) - set(pair.second.things)
        new = set(pair.second.things) - set(pair.first.things)
        assert gone == {pair.before} - {None}
        assert new == {pair.after} - {None}
        assert pair.first.shapes
        assert pair.second.shapes  # a lone sign would leave little to ask or to see
        kinds[pair.kind, bool(gone), bool(new)] += 1
        if pair.before and pair.after:
            attributes = ("shape", "colour", "size", "cell", "shift", "text")
            differ = [a for a in attributes if getattr(pair.before, a) != getattr(pair.after, a)]
            assert differ == [pair.kind]
    assert {kind for kind, *_ in kinds} == {"colour", "shape", "count"}
    assert min(kinds.values()) > 20
    assert set(kinds) == {
        ("colour", True, True),
        ("shape", True, True),
        ("count", True, False),
        ("count", False, True),
    }


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="got split 'val', expected one of train, dev, test"):
        scene(0, "val", 0)
