"""Which mixtures of lengths fill rows best: the linear program of cutting stock, by columns.

A pattern is a set of kinds that fits one row. The program asks how often to use each pattern so
that every kind is placed and the rows are fewest; a fraction of a row is allowed, so the answer is
also a bound on what any packing can reach. There are far too many patterns to list: the simplex
method runs over a pool of them, and its prices (how much of a row a kind costs) tell which patterns
the pool still lacks, by dynamic programming over the room in a row. Where nearly every row can be
filled, thousands of patterns are equally dear, and the pool is slow to hold those that go together;
so it is also given patterns that begin with kinds as they come in the data.

Every host must come to the same answer, so all arithmetic is single operations of IEEE doubles,
element by element: no sums by NumPy, no BLAS, no LAPACK, whose order of adding depends on the
machine.

Letters: I kinds, C room for tokens + 1, M room for images + 1, P patterns of the pool.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

# Prices are blended with the best found before, which keeps them from swinging to and fro.
_OLD_PRICES = 0.3
_MOST_COMPANIONS = 4
_CLOSE_ENOUGH = 5e-4  # of the rows, between the program's rows and the bound
_ROUNDS = 40
_PIVOTS_OF_A_KIND = 40


@dataclasses.dataclass(frozen=True)
class Kinds:
    """What is to be placed: kinds by rising tokens, each fitting a row of this room."""

    tokens_I: np.ndarray
    images_I: np.ndarray
    count_I: np.ndarray
    tokens: int  # the room of a row
    images: int


@dataclasses.dataclass(frozen=True)
class Mix:
    """patterns[p], kinds with repeats, fills times_P[p] rows. price_I: in rows."""

    patterns: list[tuple[int, ...]]
    times_P: np.ndarray
    price_I: np.ndarray


def solve(kinds: Kinds) -> Mix:
    price_I = np.maximum(kinds.tokens_I / kinds.tokens, kinds.images_I / max(kinds.images, 1))
    program = _Program(kinds, price_I)
    pivots = _PIVOTS_OF_A_KIND * len(price_I)
    every_I = np.arange(len(price_I))
    companions = _as_they_come(kinds)
    old, bound = 1.0, 0.0
    for _ in range(_ROUNDS):
        asked_I = old * price_I + (1 - old) * program.price_I
        most, last_CM = _fill(kinds, asked_I, every_I)
        # Prices by which no pattern costs over a row: what all kinds cost is a bound on the rows.
        if (rows := math.fsum(kinds.count_I * asked_I) / most) > bound:
            price_I, bound = asked_I / most, rows
        if program.rows - bound < _CLOSE_ENOUGH * program.rows:
            break
        program.add(_ideas(kinds, last_CM, companions))
        better = 0
        while pivots and program.pivot():
            better, pivots = better + 1, pivots - 1
        if not pivots or not (better or old):
            break
        # Blended prices may name no new pattern; the program's own do, until it is solved.
        old = _OLD_PRICES if better else 0.0
    return Mix(program.basis, program.times_I, price_I)


class _Program:
    """The simplex method over a pool of patterns; as many are in use (the basis) as kinds."""

    def __init__(self, kinds: Kinds, price_I: np.ndarray):
        size = len(kinds.count_I)
        self._seen: set[tuple[int, ...]] = set()
        # Patterns, plain and counted, those of most kinds first: then each place (the first kind,
        # the second, …, and how often) is a slice of the pool.
        self._pool: list[tuple[tuple[int, ...], list[tuple[int, int]]]] = []
        self._places: list[tuple[np.ndarray, np.ndarray]] = []

        self.basis: list[tuple[int, ...]] = []
        self.times_I = np.zeros(size)
        self.price_I = np.zeros(size)
        self._inverse_II = np.zeros((size, size))
        used_by: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        for number, (pattern, times, used_up) in enumerate(_one_by_one(kinds, price_I)):
            # What a pattern uses up stands in none of the later ones: a triangle is inverted.
            row_I = self._inverse_II[number]
            row_I[used_up] = 1
            for earlier, often in used_by[used_up]:
                row_I -= self._inverse_II[earlier] * often
            row_I /= pattern.count(used_up)
            for kind, often in _counted(pattern):
                used_by[kind].append((number, often))
            self.basis.append(pattern)
            self.times_I[number] = times
            self.price_I += row_I

    @property
    def rows(self) -> float:
        return math.fsum(self.times_I)

    def add(self, patterns: Iterator[tuple[int, ...]]) -> None:
        new = sorted(set(patterns) - self._seen)
        self._seen.update(new)
        counted = [(pattern, _counted(pattern)) for pattern in new]
        self._pool = sorted(self._pool + counted, key=lambda entry: -len(entry[1]))
        self._places = []
        size = len(self._pool)
        for place in range(len(self._pool[0][1])):
            while len(self._pool[size - 1][1]) <= place:
                size -= 1
            held = np.array([counted[place] for _, counted in self._pool[:size]])
            self._places.append((held[:, 0], held[:, 1]))

    def pivot(self) -> bool:
        """Takes the dearest pattern of the pool into use; False when none costs over a row."""
        worth_P = np.zeros(len(self._pool))
        for kind_P, times_P in self._places:
            worth_P[: len(kind_P)] += self.price_I[kind_P] * times_P
        best = int(worth_P.argmax())
        if worth_P[best] < 1 + 1e-7:
            return False
        entering, counted = self._pool[best]
        change_I = np.zeros(len(self.times_I))
        for kind, times in counted:
            change_I += self._inverse_II[:, kind] * times
        falls_I = change_I > 1e-9
        lasts_I = np.full(len(change_I), np.inf)
        np.divide(self.times_I, change_I, out=lasts_I, where=falls_I)
        leaving = int(lasts_I.argmin())
        times = lasts_I[leaving]

        self.times_I = np.maximum(self.times_I - times * change_I, 0)
        self.times_I[leaving] = times
        row_I = self._inverse_II[leaving] / change_I[leaving]
        self.price_I = self.price_I - (worth_P[best] - 1) * row_I
        self._inverse_II -= change_I[:, None] * row_I
        self._inverse_II[leaving] = row_I
        self.basis[leaving] = entering
        return True


def _counted(pattern: tuple[int, ...]) -> list[tuple[int, int]]:
    return sorted(collections.Counter(pattern).items())


def _one_by_one(kinds: Kinds, price_I: np.ndarray) -> Iterator[tuple[tuple[int, ...], float, int]]:
    """A plan to begin with: the kind that takes most of a row, beside it the dearest that fits.

    Each pattern is used until one of its kinds is used up: yields it, how often, and that kind.
    """
    share_I = np.maximum(kinds.tokens_I * max(kinds.images, 1), kinds.images_I * kinds.tokens)
    order = np.argsort(-share_I, kind="stable").tolist()
    left_I = kinds.count_I.astype(np.float64)
    gone_I = np.zeros(len(left_I), bool)
    last_CM = None
    for first in order:
        while not gone_I[first]:
            if last_CM is None:
                _, last_CM = _fill(kinds, price_I, np.flatnonzero(~gone_I))
            pattern = _trace(kinds, last_CM, [first])
            if gone_I[list(pattern)].any():
                last_CM = None
                continue
            used, places = np.unique(pattern, return_counts=True)
            times_U = left_I[used] / places
            least = int(times_U.argmin())
            left_I[used] = np.maximum(left_I[used] - times_U[least] * places, 0)
            gone_I[used[least]] = True
            yield pattern, float(times_U[least]), int(used[least])


def _as_they_come(kinds: Kinds) -> Iterator[int]:
    """Kinds without end, each as often as it has conversations, evenly mixed."""
    upto_I = np.cumsum(kinds.count_I)
    total = int(upto_I[-1])
    # Steps of the golden ratio: no two neighbours are alike, and no stretch leaves out any part.
    number, step = 0, max(total * 610 // 987, 1)
    while True:
        number = (number + step) % total
        yield int(np.searchsorted(upto_I, number, side="right"))


def _ideas(
    kinds: Kinds, last_CM: np.ndarray, companions: Iterator[int]
) -> Iterator[tuple[int, ...]]:
    """For each kind the dearest pattern that holds it, and it and some companions."""
    for kind in range(len(kinds.count_I)):
        for company in range(_MOST_COMPANIONS + 1):
            begin = [kind]
            tokens, images = int(kinds.tokens_I[kind]), int(kinds.images_I[kind])
            for companion in itertools.islice(companions, company):
                more_tokens = tokens + int(kinds.tokens_I[companion])
                more_images = images + int(kinds.images_I[companion])
                if more_tokens <= kinds.tokens and more_images <= kinds.images:
                    begin.append(companion)
                    tokens, images = more_tokens, more_images
            yield _trace(kinds, last_CM, begin)


def _fill(kinds: Kinds, price_I: np.ndarray, of: np.ndarray) -> tuple[float, np.ndarray]:
    """The dearest filling of a row with kinds out of `of`, and the last kind of that of any room;
    −1: the filling is that of one token less."""
    tokens_I, images_I, price_I = kinds.tokens_I[of], kinds.images_I[of], price_I[of]
    room_M = np.arange(kinds.images + 1)
    # Columns before the first one stand for less room than none.
    before = int(images_I.max())
    worth_CM = np.zeros((kinds.tokens + 1, before + kinds.images + 1))
    worth_CM[:, :before] = -np.inf
    last_CM = np.full((kinds.tokens + 1, kinds.images + 1), -1)
    column_IM = before + room_M - images_I[:, None]
    fitting_C = np.searchsorted(tokens_I, np.arange(kinds.tokens + 1), side="right")
    for tokens in range(1, kinds.tokens + 1):
        worth_CM[tokens] = worth_CM[tokens - 1]
        fitting = fitting_C[tokens]
        if not fitting:
            continue
        worth_IM = worth_CM[(tokens - tokens_I[:fitting])[:, None], column_IM[:fitting]]
        worth_IM += price_I[:fitting, None]
        kind_M = worth_IM.argmax(axis=0)
        worth_M = worth_IM[kind_M, room_M]
        # Not only where dearer: what costs nothing may still take room that is left.
        better_M = worth_M >= worth_CM[tokens, before:]
        worth_CM[tokens, before:][better_M] = worth_M[better_M]
        last_CM[tokens][better_M] = of[kind_M[better_M]]
    return float(worth_CM[-1, -1]), last_CM


def _trace(kinds: Kinds, last_CM: np.ndarray, begin: list[int]) -> tuple[int, ...]:
    """The pattern that begins so, with the dearest filling of the room beside."""
    pattern = list(begin)
    tokens = kinds.tokens - int(kinds.tokens_I[begin].sum())
    images = kinds.images - int(kinds.images_I[begin].sum())
    while tokens > 0:
        kind = int(last_CM[tokens, images])
        if kind < 0:
            tokens -= 1
        else:
            pattern.append(kind)
            tokens -= int(kinds.tokens_I[kind])
            images -= int(kinds.images_I[kind])
    return tuple(sorted(pattern))
