"""Which conversations an epoch shows: of each source a part, and how often.

Dims: N examples of an epoch.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ALL = "all"


def taken(take: str, count: int, name: str, seed: int) -> np.ndarray:
    """int64, rising: the entries of a source of `count` that `take` names.

    A drawn part depends on the seed and the source's name alone, and a smaller one is contained in
    a larger one.
    """
    number = number_taken(take, count, name)
    if take == ALL or take.startswith("first:"):
        return np.arange(number)
    return np.sort(np.argsort(random_keys(count, name, seed), kind="stable")[:number])


def number_taken(take: str, count: int, name: str) -> int:
    kind, _, amount = take.partition(":")
    if take == ALL:
        return count
    if kind not in ("first", "random", "fraction") or not amount:
        raise ValueError(
            f"source {name}: got take {take!r}, expected all, first:N, random:N or fraction:0.25"
        )
    number = _fraction_of(amount, count, take, name) if kind == "fraction" else amount
    if not str(number).isdecimal():
        raise ValueError(f"source {name}: got take {take!r}, expected a whole number behind the :")
    if int(number) > count:
        raise ValueError(f"source {name}: got take {take!r}, expected at most the {count} it has")
    return int(number)


def _fraction_of(amount: str, count: int, take: str, name: str) -> int:
    try:
        fraction = Fraction(amount)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(-1)
    if not 0 <= fraction <= 1:
        raise ValueError(f"source {name}: got take {take!r}, expected a fraction of 0 to 1")
    return round(fraction * count)


def random_keys(count: int, *names: object) -> np.ndarray:
    """uint64: sorting by them is a shuffle. NumPy promises these bits, not those of shuffle()."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.PCG64(int.from_bytes(digest, "little")).random_raw(count)


def repeated(entries: Sequence[np.ndarray], epochs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """source_N, entry_N: all that an epoch shows, source by source."""
    times = [np.tile(mine, count) for mine, count in zip(entries, epochs, strict=True)]
    source_N = np.repeat(np.arange(len(times)), [len(mine) for mine in times])
    return source_N.astype(np.int32), np.concatenate(times).astype(np.int64)
