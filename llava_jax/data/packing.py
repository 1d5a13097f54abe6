"""The packing plan: which conversations share a row, from lengths, seed and epoch alone.

Packing is solved for the whole set at once, over the histogram of lengths: cutting_stock.py says
which mixtures of lengths fill rows best and how often to use each; what whole numbers of them leave
over goes longest first where it fits best. Then chance takes over: which conversations of a length
sit where, their order in a row, and the order of the rows are drawn.

A plan is the same on every machine, under every NumPy 2.

Letters: N conversations, L lengths (a length: so many tokens and so many images), G groups of
lengths, R rows, R1 rows + 1, S seats (a place in a row).
"""

import dataclasses
import hashlib
import io
import os
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from llava_jax import files
from llava_jax.data import cutting_stock

# The algorithm's version: part of the data fingerprint. Raise it when any plan changes.
PACKER = 1

# Twice as fine gains a quarter of a percent, and takes ten times as long.
_MOST_GROUPS = 512
_FINEST = 512  # pieces of a row
# With fewer conversations to a group, most rows would be fractions.
_CONVERSATIONS_OF_A_GROUP = 32
_NEAR = 1.005  # of the rows that the tokens would fill; the grid costs as much
_COARSEST = 16  # pieces; a coarser grid wastes more than it finds

_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row r holds the conversations example_N[start_R1[r] : start_R1[r + 1]], in that order."""

    example_N: np.ndarray
    start_R1: np.ndarray

    def __len__(self) -> int:
        return len(self.start_R1) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"got row {row}, expected one of {len(self)}")
        return self.example_N[self.start_R1[row] : self.start_R1[row + 1]]


def pack(
    tokens_N: np.ndarray,
    images_N: np.ndarray,
    *,
    row_tokens: int,
    row_images: int,
    seed: int,
    epoch: int,
) -> Plan:
    """Every conversation in one row, in as few rows as can be found.

    tokens_N: of each conversation, those of its images included. The number of rows depends on the
    lengths alone, not on seed and epoch.
    """
    tokens_N, images_N = _checked(tokens_N, images_N)
    _check_fit(tokens_N, "tokens", row_tokens)
    _check_fit(images_N, "images", row_images)
    if (images_N * row_tokens <= tokens_N * row_images).all():
        # Tokens fill a row before images do: one limit says it all.
        images_N, row_images = np.zeros_like(images_N), 0
    key_L, length_N = np.unique(tokens_N * (row_images + 1) + images_N, return_inverse=True)
    tokens_L, images_L = np.divmod(key_L, row_images + 1)
    lengths = _Lengths(tokens_L, images_L, np.bincount(length_N), row_tokens, row_images)
    return _seat(_lay_out(lengths), length_N, _Draw(seed, epoch))


def one_a_row(
    tokens_N: np.ndarray,
    images_N: np.ndarray,
    *,
    group_of: int,
    grouped: bool,
    seed: int,
    epoch: int,
) -> Plan:
    """One conversation a row, shuffled.

    grouped: like the reference's sampler. The conversations of a step (group_of) have all images
    or all none, the longest first; the last step or two hold what is left of both kinds.
    """
    tokens_N, images_N = _checked(tokens_N, images_N)
    if group_of < 1:
        raise ValueError(f"got groups of {group_of} conversations, expected at least 1")
    draw = _Draw(seed, epoch)
    order_N = draw.permutation(len(tokens_N))
    if grouped:
        steps, left = [], []
        for kind in (order_N[images_N[order_N] > 0], order_N[images_N[order_N] == 0]):
            whole = len(kind) // group_of * group_of
            steps += list(kind[:whole].reshape(-1, group_of))
            left.append(kind[whole:])
        steps = [steps[step] for step in draw.permutation(len(steps))] + [np.concatenate(left)]
        order_N = np.concatenate(
            [step[np.argsort(-tokens_N[step], kind="stable")] for step in steps]
        )
    return Plan(order_N.astype(np.int32), np.arange(len(order_N) + 1))


class Summary(NamedTuple):
    """fill: the part of the rows' tokens that is no padding. The others: conversations of a row."""

    rows: int
    fill: float
    fewest: int
    mean: float
    most: int


def summary(plan: Plan, tokens_N: np.ndarray, row_tokens: int) -> Summary:
    held_R = np.diff(plan.start_R1)
    return Summary(
        len(plan),
        fill(plan, tokens_N, row_tokens),
        int(held_R.min()),
        len(plan.example_N) / len(plan),
        int(held_R.max()),
    )


def fill(plan: Plan, tokens_N: np.ndarray, row_tokens: int) -> float:
    """The part of the rows' tokens that is no padding."""
    used = int(np.asarray(tokens_N, np.int64)[plan.example_N].sum())
    return used / (len(plan) * row_tokens)


def save(plan: Plan, file: str | os.PathLike[str]) -> None:
    with files.new_file(file) as opened:
        np.savez(opened, example_N=plan.example_N, start_R1=plan.start_R1)


def load(file: str | os.PathLike[str]) -> Plan:
    damaged = f"{file} is damaged or no packing plan; remove it, and the plan is made again"
    data = io.BytesIO(files.path(file).read_bytes())
    try:
        with np.load(data, allow_pickle=False) as arrays:  # TypeError: one array, not a zip
            plan = Plan(arrays["example_N"], arrays["start_R1"])
    except _DAMAGE as error:
        raise ValueError(damaged) from error
    if not _is_whole(plan):
        raise ValueError(damaged)
    return plan


def _is_whole(plan: Plan) -> bool:
    example_N, start_R1 = plan.example_N, plan.start_R1
    return (
        (example_N.dtype, start_R1.dtype) == (np.int32, np.int64)
        and (example_N.ndim, start_R1.ndim) == (1, 1)
        and len(start_R1) > 1
        and (start_R1[0], start_R1[-1]) == (0, len(example_N))
        and bool((np.diff(start_R1) > 0).all())
        and bool((np.sort(example_N) == np.arange(len(example_N))).all())
    )


def _checked(tokens_N: np.ndarray, images_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens_N, images_N = np.asarray(tokens_N), np.asarray(images_N)
    assert tokens_N.shape == images_N.shape == (tokens_N.size,), "one number a conversation"
    if not len(tokens_N):
        raise ValueError("got no conversations, expected at least one")
    for name, value_N, least in (("tokens", tokens_N, 1), ("images", images_N, 0)):
        assert np.issubdtype(value_N.dtype, np.integer), f"{name} are counted in whole numbers"
        if value_N.min() < least:
            number = int((value_N < least).argmax())
            raise ValueError(
                f"got {value_N[number]} {name} in conversation {number}, expected at least {least}"
            )
    return tokens_N.astype(np.int64), images_N.astype(np.int64)


def _check_fit(value_N: np.ndarray, name: str, limit: int) -> None:
    if value_N.max() > limit:
        number = int((value_N > limit).argmax())
        raise ValueError(
            f"got {value_N[number]} {name} in conversation {number}, expected at most {limit}, "
            "which is all a row has; cut or drop such conversations, or use longer rows"
        )


class _Draw:
    """Chance, from seed and epoch alone.

    NumPy promises the raw words of its bit generators for ever, and of its shuffles only that they
    are random: so the keys are raw words, and sorting is stable.
    """

    def __init__(self, seed: int, epoch: int):
        digest = hashlib.sha256(f"packing, seed {int(seed)}, epoch {int(epoch)}".encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def permutation(self, size: int) -> np.ndarray:
        return np.argsort(self._bits.random_raw(size), kind="stable")


class _Lengths(NamedTuple):
    """By rising tokens, then images; the room of a row."""

    tokens_L: np.ndarray
    images_L: np.ndarray
    count_L: np.ndarray
    row_tokens: int
    row_images: int


class _Layout(NamedTuple):
    """Rows of seats. A seat of a group takes any of its lengths; one of a length takes only that.

    alone_L: how many of each length sit on seats of their own. Seats are by rising group, length.
    """

    rows: int
    group_L: np.ndarray
    group_row_S: np.ndarray
    alone_L: np.ndarray
    alone_row_S: np.ndarray


def _lay_out(lengths: _Lengths) -> _Layout:
    """The fewest rows of several ways: longest first by two measures, and best mixtures."""
    fewest = -(-int((lengths.count_L * lengths.tokens_L).sum()) // lengths.row_tokens)
    none = np.zeros(0, np.int64)
    layouts = []
    for order in _longest_first(lengths):
        row_S, rows = _best_fit(lengths, order, lengths.count_L, none, none)
        layouts.append(_Layout(rows, np.zeros_like(order), none, lengths.count_L, row_S))
    layout = min(layouts, key=lambda layout: layout.rows)
    if layout.rows > _NEAR * fewest and (grain := _grain(lengths)):
        layout = min(layout, _mix(lengths, grain), key=lambda layout: layout.rows)
    return layout


def _longest_first(lengths: _Lengths) -> list[np.ndarray]:
    """By tokens; where image slots may run out, also by the larger part of a row."""
    by_tokens = np.lexsort((-lengths.images_L, -lengths.tokens_L))
    if not lengths.row_images:
        return [by_tokens]
    share_L = np.maximum(
        lengths.tokens_L * lengths.row_images, lengths.images_L * lengths.row_tokens
    )
    return [np.lexsort((-lengths.tokens_L, -share_L)), by_tokens]


def _grain(lengths: _Lengths) -> int:
    """The finest grid of lengths that leaves few enough groups; 0 if none does."""
    # Image slots are a second dimension, and dear.
    most = _MOST_GROUPS // (2 if lengths.row_images else 1)
    most = min(most, int(lengths.count_L.sum()) // _CONVERSATIONS_OF_A_GROUP)
    grain = -(-lengths.row_tokens // _FINEST)
    while len(np.unique(_group_key(lengths, grain))) > most:
        grain *= 2
        if grain * _COARSEST > lengths.row_tokens:
            return 0
    return grain


def _group_key(lengths: _Lengths, grain: int) -> np.ndarray:
    return -(-lengths.tokens_L // grain) * (lengths.row_images + 1) + lengths.images_L


def _mix(lengths: _Lengths, grain: int) -> _Layout:
    """By the best mixtures of lengths, each rounded up to the grid."""
    key_G, group_L = np.unique(_group_key(lengths, grain), return_inverse=True)
    count_G = np.bincount(group_L, weights=lengths.count_L).astype(np.int64)
    tokens_G, images_G = np.divmod(key_G, lengths.row_images + 1)
    room = lengths.row_tokens // grain
    # Where the grid does not divide a row, the longest may be rounded up to more than a row.
    fits = int(np.searchsorted(tokens_G, room, side="right"))
    kinds = cutting_stock.Kinds(
        tokens_G[:fits], images_G[:fits], count_G[:fits], room, lengths.row_images
    )
    mix = cutting_stock.solve(kinds)
    return _round(lengths, kinds, mix, group_L, count_G, grain)


def _round(
    lengths: _Lengths,
    kinds: cutting_stock.Kinds,
    mix: cutting_stock.Mix,
    group_L: np.ndarray,
    count_G: np.ndarray,
    grain: int,
) -> _Layout:
    """Whole rows of the mixtures; the shortest of each group are left over, and fitted in."""
    left_G = count_G.copy()
    rows, seat_row, seat_group, room_R, slots_R = 0, [], [], [], []
    for pattern in np.argsort(-mix.times_P, kind="stable"):
        group, places = np.unique(mix.patterns[pattern], return_counts=True)
        times = int(min(mix.times_P[pattern] + 1e-6, (left_G[group] // places).min()))
        left_G[group] -= times * places
        for seat in mix.patterns[pattern]:
            seat_row.append(np.arange(rows, rows + times))
            seat_group.append(np.full(times, seat))
        held = list(mix.patterns[pattern])
        room_R.append(np.full(times, lengths.row_tokens - grain * kinds.tokens_I[held].sum()))
        slots_R.append(np.full(times, lengths.row_images - kinds.images_I[held].sum()))
        rows += times
    by_group = np.argsort(np.concatenate(seat_group), kind="stable")

    order_L = np.lexsort((lengths.tokens_L, group_L))
    count_L = lengths.count_L[order_L]
    start_G = np.cumsum(count_G) - count_G
    shorter_L = np.cumsum(count_L) - count_L - start_G[group_L[order_L]]
    alone_L = np.zeros_like(count_L)
    alone_L[order_L] = np.clip(left_G[group_L[order_L]] - shorter_L, 0, count_L)
    alone_row_S, rows = _best_fit(
        lengths,
        _longest_first(lengths)[0],
        alone_L,
        np.concatenate(room_R),
        np.concatenate(slots_R),
    )
    return _Layout(rows, group_L, np.concatenate(seat_row)[by_group], alone_L, alone_row_S)


def _best_fit(
    lengths: _Lengths,
    order_L: np.ndarray,
    count_L: np.ndarray,
    room_R: np.ndarray,
    slots_R: np.ndarray,
) -> tuple[np.ndarray, int]:
    """In this order, each in the row that it fills best, else in a new one.

    room_R, slots_R: tokens and images that rows already begun still have. The rows, for each length
    one after the other, and how many rows there are then.
    """
    most, slots = lengths.row_tokens, lengths.row_images
    begun: dict[tuple[int, int], list[int]] = {}
    many = np.zeros((most + 1, slots + 1), np.int64)  # rows begun, by what they have left

    def leave(room: int, images: int, left: list[int]) -> None:
        begun.setdefault((room, images), []).extend(left)
        many[room, images] += len(left)

    for row, (room, images) in enumerate(zip(room_R.tolist(), slots_R.tolist(), strict=True)):
        leave(room, images, [row])
    rows = len(room_R)
    seats: list[list[int]] = [[] for _ in count_L]
    for length in order_L.tolist():
        tokens, images = int(lengths.tokens_L[length]), int(lengths.images_L[length])
        left = int(count_L[length])
        while left:
            room_KM = many[tokens:, images:]
            nearest = int((room_KM > 0).argmax())
            room, free = nearest // room_KM.shape[1], nearest % room_KM.shape[1]
            if room_KM[room, free]:
                found = begun[tokens + room, images + free]
                taken = found[-left:]
                del found[-left:]
                many[tokens + room, images + free] -= len(taken)
                leave(room, free, taken)
                seats[length] += taken
                left -= len(taken)
                continue
            row_holds = most // tokens if not images else min(most // tokens, slots // images)
            whole, last = divmod(left, row_holds)
            for held, new in ((row_holds, whole), (last, 1 if last else 0)):
                taken = list(range(rows, rows + new))
                leave(most - held * tokens, slots - held * images, taken)
                seats[length] += taken * held
                rows += new
            left = 0
    return np.array([row for held in seats for row in held], np.int64), rows


def _seat(layout: _Layout, length_N: np.ndarray, draw: _Draw) -> Plan:
    order_N = draw.permutation(len(length_N))
    order_N = order_N[np.argsort(length_N[order_N], kind="stable")]
    count_L = np.bincount(length_N)
    rank_N = np.arange(len(order_N)) - np.repeat(np.cumsum(count_L) - count_L, count_L)
    alone_N = rank_N < layout.alone_L[length_N[order_N]]
    row_N = np.empty_like(order_N)
    row_N[order_N[alone_N]] = layout.alone_row_S
    order_N = order_N[~alone_N]
    order_N = order_N[draw.permutation(len(order_N))]
    order_N = order_N[np.argsort(layout.group_L[length_N[order_N]], kind="stable")]
    row_N[order_N] = layout.group_row_S

    row_N = draw.permutation(layout.rows)[row_N]
    order_N = draw.permutation(len(length_N))
    order_N = order_N[np.argsort(row_N[order_N], kind="stable")]
    start_R1 = np.zeros(layout.rows + 1, np.int64)
    np.cumsum(np.bincount(row_N, minlength=layout.rows), out=start_R1[1:])
    return Plan(order_N.astype(np.int32), start_R1)
