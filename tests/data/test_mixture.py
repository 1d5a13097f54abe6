"""What an epoch shows of each source: parts that hold still, whatever else the mixture has."""

import numpy as np
import pytest

from llava_jax.data.mixture import random_keys, repeated, taken


def test_all_and_the_first():
    assert taken("all", 4, "a", 0).tolist() == [0, 1, 2, 3]
    assert taken("first:2", 4, "a", 0).tolist() == [0, 1]
    assert taken("first:0", 4, "a", 0).tolist() == []
    assert taken("first:4", 4, "a", 0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fraction", "count"), [("0.25", 25), ("1", 100), ("0", 0), ("1/3", 33), (".005", 0)]
)
def test_fractions(fraction, count):
    part = taken(f"fraction:{fraction}", 100, "a", 0)
    assert len(set(part.tolist())) == count
    assert (np.diff(part) > 0).all()


def test_a_drawn_part_depends_on_the_seed_and_the_name():
    draws = [taken("random:50", 1000, name, seed).tolist() for name in "ab" for seed in (1, 2)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert draws[0] == taken("random:50", 1000, "a", 1).tolist()
    for draw in draws:
        assert max(draw) < 1000
        assert 300 < np.mean(draw) < 700  # from everywhere


def test_less_is_a_part_of_more():
    few, many = (set(taken(f"random:{n}", 1000, "a", 1).tolist()) for n in (50, 400))
    assert few < many
    assert set(taken("fraction:0.4", 1000, "a", 1).tolist()) == many


def test_the_bits_of_a_draw_are_pinned():
    """A library that came to draw otherwise would change every run's batches unseen."""
    assert random_keys(3, "a", 1).tolist() == [
        16495830676931423366,
        1487686785780115890,
        7184300782791780723,
    ]


@pytest.mark.parametrize(
    ("take", "says"),
    [
        ("first:5", "expected at most the 4 it has"),
        ("random:5", "expected at most the 4"),
        ("last:2", "expected all, first:N"),
        ("first", "expected all, first:N"),
        ("first:-1", "expected a whole number"),
        ("first:1.5", "expected a whole number"),
        ("fraction:1.5", "expected a fraction of 0 to 1"),
        ("fraction:x", "expected a fraction"),
        ("fraction:1/0", "expected a fraction"),
        ("", "expected all"),
    ],
)
def test_what_cannot_be_taken(take, says):
    with pytest.raises(ValueError, match=f"source mine: got take.*{says}"):
        taken(take, 4, "mine", 0)


def test_sources_side_by_side():
    source_N, entry_N = repeated([np.array([3, 5]), np.array([0])], [1, 2])
    assert source_N.tolist() == [0, 0, 1, 1]
    assert entry_N.tolist() == [3, 5, 0, 0]
