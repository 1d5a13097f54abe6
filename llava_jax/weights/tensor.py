"""A tensor that has not been read yet: what every source of weights hands out.

Names, shapes and dtypes of a whole checkpoint are known at once; bytes are read one tensor at a
time, so that a model of any size passes through little memory.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """read(): the values, of this shape and dtype. part(index): some of them, where the source can
    do that for less than the whole. origin: for messages."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    origin: str
    part: Callable[[Index], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_part(self, index: Index) -> np.ndarray:
        return self.read()[index] if self.part is None else self.part(index)


def in_memory(array: np.ndarray, origin: str) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array, origin, array.__getitem__)
