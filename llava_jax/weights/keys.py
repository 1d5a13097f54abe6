"""Key tables: which of PyTorch's tensors holds which of our leaves, and how.

A table is a tuple of rows and is read in both directions. `{}` in a row stands for the layer's
number. Our side is the leaf as a model folder stores it: one leaf per layer and tensor, kernels
with the model's width first, the vocabulary without padding and with added rows apart.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llava_jax.weights.tensor import Tensor


@dataclasses.dataclass(frozen=True)
class Way:
    """How a leaf is turned into PyTorch's tensor and back; both are exact."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _patch_to_ours(kernel_D3pp: np.ndarray) -> np.ndarray:
    return kernel_D3pp.transpose(0, 2, 3, 1).reshape(kernel_D3pp.shape[0], -1)


def _patch_to_theirs(kernel_DC: np.ndarray) -> np.ndarray:
    side = math.isqrt(kernel_DC.shape[1] // 3)
    return kernel_DC.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)


SAME = Way(lambda x: x, lambda x: x)
TRANSPOSED = Way(np.transpose, np.transpose)
PATCHES = Way(_patch_to_ours, _patch_to_theirs)

# Which rows of their tensor a leaf holds: all, those of the original vocabulary, or those behind.
ALL, ORIGINAL, ADDED = "all", "original", "added"


@dataclasses.dataclass(frozen=True)
class Row:
    ours: str
    theirs: str
    way: Way = SAME
    rows: str = ALL

    def at(self, layer: int) -> "Row":
        layer_row = (self.ours.format(layer), self.theirs.format(layer))
        return dataclasses.replace(self, ours=layer_row[0], theirs=layer_row[1])


def table(
    rows: Sequence[Row], *, ours: str = "", theirs: str = "", layers: int = 0
) -> tuple[Row, ...]:
    """The rows with prefixes, those with a `{}` once for each layer."""
    prefixed = [dataclasses.replace(r, ours=ours + r.ours, theirs=theirs + r.theirs) for r in rows]
    return tuple(
        each
        for row in prefixed
        for each in ([row.at(i) for i in range(layers)] if "{}" in row.ours else [row])
    )


def to_ours(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], vocab_size: int
) -> dict[str, Tensor]:
    """Our leaves of the keys that are there. vocab_size: ids of the original vocabulary."""
    kept = {ALL: ..., ORIGINAL: slice(vocab_size), ADDED: slice(vocab_size, None)}
    leaves = {}
    for row in rows:
        tensor = tensors.get(row.theirs)
        if tensor is None or (row.rows == ADDED and tensor.shape[:1] <= (vocab_size,)):
            continue

        def change(x: np.ndarray, row: Row = row) -> np.ndarray:
            return row.way.to_ours(x[kept[row.rows]])

        def read(tensor: Tensor = tensor, change=change) -> np.ndarray:
            return _contiguous(change(tensor.read()))

        shape = change(_unread(tensor)).shape
        leaves[row.ours] = Tensor(shape, tensor.dtype, read, tensor.origin)
    return leaves


def to_theirs(rows: Sequence[Row], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors of the leaves that are there, in the table's order."""
    parts: dict[str, list[tuple[Way, Tensor]]] = {}
    for row in rows:
        if row.ours in leaves:
            parts.setdefault(row.theirs, []).append((row.way, leaves[row.ours]))
    return {key: _joined(found) for key, found in parts.items()}


def _joined(parts: Sequence[tuple[Way, Tensor]]) -> Tensor:
    """One of their tensors, from leaves that hold its first rows, its next rows, …"""
    shapes = [way.to_theirs(_unread(tensor)).shape for way, tensor in parts]
    shape = shapes[0] if len(parts) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
    dtype = np.result_type(*(tensor.dtype for _, tensor in parts))

    def read() -> np.ndarray:
        arrays = [way.to_theirs(tensor.read()) for way, tensor in parts]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, dtype=dtype)
        return _contiguous(whole)

    return Tensor(shape, dtype, read, parts[0][1].origin)


# Measured best of 4 to 256 for f16, and second to 16 for f32.
_COLUMNS = 8


def _contiguous(x: np.ndarray) -> np.ndarray:
    """np.ascontiguousarray, transposed matrices a few columns at a time: what is read then stays in
    the cache, and it takes a quarter of the time."""
    if x.ndim != 2 or x.flags.c_contiguous:
        return np.ascontiguousarray(x)
    out = np.empty(x.shape, x.dtype)
    for column in range(0, x.shape[1], _COLUMNS):
        few = slice(column, column + _COLUMNS)
        out[:, few] = x[:, few]
    return out


def _unread(tensor: Tensor) -> np.ndarray:
    """An array of its shape that takes no memory, to learn what becomes of the shape."""
    return np.broadcast_to(np.zeros((), np.bool_), tensor.shape)
