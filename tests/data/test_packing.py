"""The packing plan: every conversation once, limits held, few rows, the same for ever."""

import hashlib
import io
import itertools
import math

import numpy as np
import pytest

from llava_jax.data import cutting_stock, packing
from llava_jax.data.packing import Plan

ROW = {"row_tokens": 256, "row_images": 4, "seed": 0, "epoch": 0}


def pack(tokens, images=None, **changed):
    return packing.pack(np.array(tokens), text_only(tokens) if images is None else np.array(images),
                        **{**ROW, **changed})  # fmt: skip


def text_only(tokens):
    return np.zeros(len(tokens), np.int64)


def check(plan: Plan, tokens, images, row_tokens, row_images):
    assert (plan.example_N.dtype, plan.start_R1.dtype) == (np.int32, np.int64)
    assert sorted(plan.example_N.tolist()) == list(range(len(tokens)))
    rows = [plan[row].tolist() for row in range(len(plan))]
    assert [example for row in rows for example in row] == plan.example_N.tolist()
    for row in rows:
        assert row
        assert sum(int(tokens[example]) for example in row) <= row_tokens
        assert sum(int(images[example]) for example in row) <= row_images


def first_fit_decreasing(tokens, images, row_tokens, row_images):
    """Rows of the textbook's way: on lists, one conversation at a time."""
    rooms = []
    for size, pictures in sorted(zip(tokens, images, strict=True), reverse=True):
        for room in rooms:
            if size <= room[0] and pictures <= room[1]:
                room[0] -= size
                room[1] -= pictures
                break
        else:
            rooms.append([row_tokens - size, row_images - pictures])
    return len(rooms)


def like_instructions(size, seed=0):
    """Lengths like those of LLaVA-1.5's mixture: most of an image and a few turns, some of text."""
    rng = np.random.default_rng(seed)
    images = (rng.random(size) > 0.06).astype(np.int64)
    text = rng.lognormal(np.where(images, 5.2, 6.8), np.where(images, 0.6, 0.7)).astype(np.int64)
    return np.minimum(text + 30 + 576 * images, 2048), images


CASES = [
    (size, row_tokens, row_images, most_images, seed)
    for seed, (size, row_tokens, row_images, most_images) in enumerate(
        [
            (1, 16, 1, 1),
            (2, 16, 0, 0),
            (50, 16, 4, 2),
            (300, 100, 2, 1),
            (300, 101, 3, 3),
            (2000, 64, 8, 2),
            (3000, 1000, 4, 4),
            (3000, 333, 5, 1),
            (5000, 2047, 3, 1),
        ]
        * 3
    )
]


@pytest.mark.parametrize(("size", "row_tokens", "row_images", "most_images", "seed"), CASES)
def test_each_once_within_the_limits_in_few_rows(size, row_tokens, row_images, most_images, seed):
    rng = np.random.default_rng(seed)
    shape = rng.choice([0.3, 1.0, 3.0])
    tokens = np.maximum((rng.beta(shape, 2, size) * row_tokens).astype(np.int64), 1)
    images = rng.integers(0, most_images + 1, size)
    plan = packing.pack(
        tokens, images, row_tokens=row_tokens, row_images=row_images, seed=seed, epoch=0
    )
    check(plan, tokens, images, row_tokens, row_images)
    simple = first_fit_decreasing(tokens.tolist(), images.tolist(), row_tokens, row_images)
    assert len(plan) <= simple + 1


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        ([1], 1),
        ([256], 1),
        ([256] * 40, 40),
        ([1] * 1000, 4),
        ([129] * 33, 33),
        ([128] * 33, 17),
        ([127] * 40 + [2] * 20, 20),
        ([100] * 1000, 500),
        ([86] * 2000, 1000),
    ],
)
def test_extremes_take_the_fewest_rows(tokens, rows):
    plan = pack(tokens)
    check(plan, tokens, text_only(tokens), 256, 4)
    assert len(plan) == rows


def test_pairs_that_fill_rows_are_found():
    first = np.random.default_rng(0).integers(1, 4096, 5000)
    plan = pack(np.concatenate([first, 4096 - first]), row_tokens=4096)
    assert len(plan) == 5000
    assert packing.fill(plan, np.concatenate([first, 4096 - first]), 4096) == 1


def test_triples_that_best_fit_misses_are_found():
    # Best fit puts 120 beside 120 and is left with 68s, of which three fill only 204.
    tokens = np.repeat([120, 68], [2000, 4000])
    assert first_fit_decreasing(tokens, text_only(tokens), 256, 4) == 2334
    assert len(pack(tokens)) == 2000


def test_lengths_like_a_real_mixture_fill_rows():
    tokens, images = like_instructions(10_000)
    plan = packing.pack(tokens, images, row_tokens=4096, row_images=8, seed=0, epoch=0)
    check(plan, tokens, images, 4096, 8)
    assert packing.fill(plan, tokens, 4096) > 0.98


def test_the_real_mixture_fills_rows(shared):
    stored = np.load(shared / "data" / "lengths_mix665k.npz")
    some = np.random.default_rng(0).permutation(len(stored["images"]))[:20_000]
    images = stored["images"][some].astype(np.int64)
    tokens = np.minimum(stored["text_tokens"][some] + 576 * images, 2048)
    plan = packing.pack(tokens, images, row_tokens=4096, row_images=8, seed=0, epoch=0)
    check(plan, tokens, images, 4096, 8)
    assert packing.fill(plan, tokens, 4096) > 0.98


def test_image_slots_that_run_out_first():
    tokens, images = np.full(1000, 10), np.ones(1000, np.int64)
    plan = pack(tokens, images)
    check(plan, tokens, images, 256, 4)
    assert len(plan) == 250


def test_text_fills_the_tokens_that_image_slots_leave():
    # 4 images of 40 tokens and one text of 96 fill a row both ways.
    tokens, images = np.repeat([40, 96], [4000, 1000]), np.repeat([1, 0], [4000, 1000])
    plan = pack(tokens, images)
    check(plan, tokens, images, 256, 4)
    assert len(plan) == 1000


def test_seed_and_epoch_change_who_sits_where_but_not_the_number_of_rows():
    tokens, images = like_instructions(2000)
    plans = [
        packing.pack(tokens, images, row_tokens=4096, row_images=8, seed=seed, epoch=epoch)
        for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    first, again, other_epoch, other_seed = plans
    assert (first.example_N == again.example_N).all()
    assert (first.start_R1 == again.start_R1).all()

    def sets(plan):
        return {frozenset(plan[row].tolist()) for row in range(len(plan))}

    for other in (other_epoch, other_seed):
        assert len(other) == len(first)
        assert len(sets(other) & sets(first)) < 0.1 * len(first)
    assert (other_epoch.example_N != other_seed.example_N).any()


def test_rows_and_what_is_in_them_come_in_no_order():
    tokens, images = like_instructions(10_000)
    plan = packing.pack(tokens, images, row_tokens=4096, row_images=8, seed=0, epoch=0)
    firsts, lasts = (
        tokens[plan.example_N[plan.start_R1[:-1]]],
        tokens[plan.example_N[plan.start_R1[1:] - 1]],
    )
    # Means of 2,000 lengths with a deviation of 250: 6 of theirs is 34.
    assert abs(firsts.mean() - lasts.mean()) < 48
    longest = np.maximum.reduceat(tokens[plan.example_N], plan.start_R1[:-1])
    numbers = np.arange(len(plan))
    assert abs(np.corrcoef(longest, numbers)[0, 1]) < 0.1
    # The conversations' own order must not show either.
    assert abs(np.corrcoef(plan.example_N, np.arange(len(tokens)))[0, 1]) < 0.05


def test_plans_stay_as_they_are():
    # Another hash? Either a mistake, or packing.PACKER goes up: checkpoints then refuse old data.
    number = np.arange(3000)
    images = (number % 5 > 0).astype(np.int64)
    tokens = 500 + number * 7919 % 350 + number * 104729 % 200
    digest = hashlib.sha256()
    for row_images in (1000, 2):  # of images no limit, and one
        plan = packing.pack(tokens, images, row_tokens=2048, row_images=row_images, seed=7, epoch=3)
        digest.update(plan.example_N.astype("<i4").tobytes())
        digest.update(plan.start_R1.astype("<i8").tobytes())
    for grouped in (False, True):
        plan = one_a_row(tokens, images, grouped=grouped, seed=7, epoch=3)
        digest.update(plan.example_N.astype("<i4").tobytes())
    assert packing.PACKER == 1
    assert digest.hexdigest() == "30b0ca18fa919174d84fcab5a8e239099f370fb90b40b7113331bb1b25eb6737"


@pytest.mark.parametrize(
    ("tokens", "images", "says"),
    [
        ([], [], "no conversations"),
        ([10, 257], [0, 0], "257 tokens in conversation 1, expected at most 256"),
        ([10, 10], [5, 0], "5 images in conversation 0, expected at most 4"),
        ([10, 0], [0, 0], "0 tokens in conversation 1, expected at least 1"),
        ([10, 10], [0, -1], "-1 images in conversation 1, expected at least 0"),
    ],
)
def test_what_fits_no_row_is_refused(tokens, images, says):
    with pytest.raises(ValueError, match=says):
        pack(np.array(tokens, np.int64), np.array(images, np.int64))


def test_a_row_that_is_not_there():
    plan = pack([10])
    for row in (-1, 1):
        with pytest.raises(IndexError, match="expected one of 1"):
            plan[row]


def test_summary():
    plan = Plan(np.array([2, 0, 1], np.int32), np.array([0, 2, 3]))
    assert packing.summary(plan, np.array([10, 20, 30], np.uint8), 64) == (2, 60 / 128, 1, 1.5, 2)


# One conversation a row.


def one_a_row(tokens, images, **changed):
    arguments = {"group_of": 16, "grouped": True, "seed": 0, "epoch": 0, **changed}
    return packing.one_a_row(tokens, images, **arguments)


@pytest.mark.parametrize("grouped", [False, True])
def test_one_a_row(grouped):
    tokens, images = like_instructions(1000)
    plan = one_a_row(tokens, images, grouped=grouped)
    check(plan, tokens, images, 2048, 1)
    assert len(plan) == 1000
    assert (plan.example_N == one_a_row(tokens, images, grouped=grouped).example_N).all()
    for other in ({"seed": 1}, {"epoch": 1}):
        changed = one_a_row(tokens, images, grouped=grouped, **other)
        assert (changed.example_N == plan.example_N).mean() < 0.1


def test_shuffled_is_not_sorted():
    tokens, images = like_instructions(1000)
    plan = one_a_row(tokens, images, grouped=False)
    assert abs(np.corrcoef(plan.example_N, np.arange(1000))[0, 1]) < 0.15


def test_steps_of_one_kind_the_longest_first():
    rng = np.random.default_rng(0)
    images = rng.permutation(np.repeat([0, 1, 2], [100, 300, 77]))  # 377 with images
    tokens = rng.integers(1, 2048, len(images))
    order = one_a_row(tokens, images).example_N
    steps = np.split(order, range(16, len(order), 16))
    whole = 377 // 16 + 100 // 16
    for step in steps[:whole]:
        assert len({bool(images[example]) for example in step}) == 1
        assert (np.diff(tokens[step]) <= 0).all()
    left = order[16 * whole :]
    assert (images[left] > 0).sum() == 377 % 16
    assert (images[left] == 0).sum() == 100 % 16
    assert (np.diff(tokens[left]) <= 0).all()
    # Steps are drawn, not first those with images and then those without.
    kinds = [bool(images[step[0]]) for step in steps[:whole]]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 1


def test_groups_of_nobody_are_refused():
    with pytest.raises(ValueError, match="groups of 0"):
        one_a_row(np.array([5]), np.array([0]), group_of=0)


# Files.


def test_a_plan_is_saved_and_loaded(tmp_path):
    plan = pack([200, 100, 50, 156, 3])
    packing.save(plan, tmp_path / "plan.npz")
    loaded = packing.load(tmp_path / "plan.npz")
    assert (loaded.example_N == plan.example_N).all()
    assert (loaded.start_R1 == plan.start_R1).all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.npz"]


def test_damaged_files_are_refused(tmp_path):
    plan = pack(np.arange(1, 200))
    file = tmp_path / "plan.npz"
    packing.save(plan, file)
    whole = file.read_bytes()
    refused = 0
    rng = np.random.default_rng(0)
    one_array = io.BytesIO()
    np.save(one_array, plan.example_N)
    damaged = [
        one_array.getvalue(),
        b"",
        b"<html>",
        whole[:10],
        whole[: len(whole) // 2],
        whole[:-1],
    ]
    for place in rng.integers(0, len(whole), 200):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    for data in damaged:
        file.write_bytes(data)
        try:
            loaded = packing.load(file)
        except ValueError as error:
            assert f"{file} is damaged" in str(error)  # noqa: PT017
            refused += 1
        else:  # what changed is not read, a date for example
            assert (loaded.example_N == plan.example_N).all()
            assert (loaded.start_R1 == plan.start_R1).all()
    assert refused > 0.8 * len(damaged)


@pytest.mark.parametrize(
    ("example", "start"),
    [
        ([0, 1, 1], [0, 3]),  # twice
        ([0, 1, 3], [0, 3]),  # one is missing
        ([0, 1, 2], [0, 2]),  # one is in no row
        ([0, 1, 2], [0, 2, 2, 3]),  # an empty row
        ([0, 1, 2], [1, 3]),
        ([], [0]),
        ([0.0, 1.0, 2.0], [0, 3]),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, example, start):
    file = tmp_path / "plan.npz"
    dtype = np.float32 if 0.0 in example and isinstance(example[0], float) else np.int32
    np.savez(file, example_N=np.array(example, dtype), start_R1=np.array(start, np.int64))
    with pytest.raises(ValueError, match="damaged or no packing plan"):
        packing.load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        packing.load(tmp_path / "none.npz")


# The program.


def kinds_of(seed, images=0):
    rng = np.random.default_rng(seed)
    key = np.unique(rng.integers(4, 40, 12) * (images + 1) + rng.integers(0, images + 1, 12))
    tokens, pictures = np.divmod(key, images + 1)
    return cutting_stock.Kinds(tokens, pictures, rng.integers(50, 500, len(key)), 60, images)


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_program_against_a_solver_that_is_told_every_pattern(seed, images):
    optimize = pytest.importorskip("scipy.optimize")
    kinds = kinds_of(seed, images)
    patterns = [[]]
    every = []
    while patterns:
        pattern = patterns.pop()
        every.append(np.bincount(pattern, minlength=len(kinds.tokens_I)).astype(int))
        for kind in range(pattern[-1] if pattern else 0, len(kinds.tokens_I)):
            held = [*pattern, kind]
            if kinds.tokens_I[held].sum() <= 60 and kinds.images_I[held].sum() <= images:
                patterns.append(held)
    every = np.array(every).T
    best = optimize.linprog(np.ones(every.shape[1]), A_ub=-every, b_ub=-kinds.count_I)
    mix = cutting_stock.solve(kinds)
    rows = mix.times_P.sum()
    assert best.fun * (1 - 1e-6) <= rows <= best.fun * 1.0006  # _CLOSE_ENOUGH
    held = np.array([np.bincount(p, minlength=len(kinds.tokens_I)) for p in mix.patterns])
    np.testing.assert_allclose(mix.times_P @ held, kinds.count_I, rtol=1e-6)
    # The prices prove the bound: no pattern costs over a row.
    assert (mix.price_I @ every).max() <= 1 + 1e-6
    assert math.isclose(mix.price_I @ kinds.count_I, best.fun, rel_tol=6e-4)
