"""Between leaves as they are stored and the tree in memory.

Stored: one leaf per layer and tensor, all CLIP blocks, the vocabulary as it is. In memory: layers
stacked, CLIP's blocks above the selected layer left out, the vocabulary padded (llama.py).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from llava_jax.models.llava import Llava, LlavaConfig
from llava_jax.sharding import Layout, leaf_paths
from llava_jax.weights.tensor import Index, Tensor


@functools.cache
def stored_shapes(config: LlavaConfig) -> Mapping[str, tuple[int, ...]]:
    """Every leaf a whole folder of this architecture holds: all CLIP blocks, no padding."""
    language = config.language
    # The highest hidden state needs all blocks.
    all_blocks = (-1,) * len(config.vision.select_layers)
    complete = dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, select_layers=all_blocks)
    )
    shapes = {}
    for path, leaf in _memory_leaves(complete).items():
        shape = tuple(leaf.shape)
        if path == "language/embed/table":
            shape = (language.vocab_size, shape[1])
        elif path == "language/head/kernel":
            shape = (shape[0], language.vocab_size)
        if "/layers/" in path:
            shapes |= {stored_path(path, i): shape[1:] for i in range(shape[0])}
        else:
            shapes[path] = shape
    width = (config.vision.hidden_size,)
    shapes |= {"vision/post_norm/scale": width, "vision/post_norm/bias": width}
    return MappingProxyType(shapes)


def stored_path(path: str, layer: int) -> str:
    """Where one layer of a stacked leaf is stored."""
    return path.replace("/layers/", f"/layers/{layer}/")


def params_in_memory(
    config: LlavaConfig, stored: Mapping[str, Tensor], layout: Layout | None = None
) -> Any:
    """The whole parameter tree, in the dtypes that are stored. layout: None is one device."""
    shapes = jax.eval_shape(Llava(config).init, jax.random.key(0))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = (
        jax.tree.map(lambda _: one_device, shapes)
        if layout is None
        else layout.param_shardings(shapes)
    )
    like = jax.tree.map(
        lambda path, leaf, lies: jax.ShapeDtypeStruct(
            leaf.shape, _dtype_in_memory(_tensors(path, leaf, stored)), sharding=lies
        ),
        leaf_paths(shapes),
        shapes,
        shardings,
    )
    return loaded(stored, like)


def loaded(
    stored: Mapping[str, Tensor], like: Any, advance: Callable[[int], None] = lambda count: None
) -> Any:
    """The leaves of `like`, a tree in memory or a part of one, each read straight into its shards:
    a host reads its own parts. advance: is told how many values have come."""

    def load(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tensors, stacked = _tensors(path, leaf, stored), "/layers/" in path
        parts: dict[str, np.ndarray] = {}

        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            if str(index) not in parts:  # a leaf that is whole everywhere is read once
                kind = np.dtype(leaf.dtype)
                parts[str(index)] = _read_shard(tensors, stacked, leaf.shape, index, kind)
            return parts[str(index)]

        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, part, dtype=leaf.dtype)
        advance(math.prod(leaf.shape))
        return array

    return jax.tree.map(load, leaf_paths(like), like)


def _tensors(path: str, leaf: jax.ShapeDtypeStruct, stored: Mapping[str, Tensor]) -> list[Tensor]:
    """What is stored of a leaf in memory: of each of its layers, if it is stacked."""
    layers = range(leaf.shape[0]) if "/layers/" in path else None
    return [stored[path]] if layers is None else [stored[stored_path(path, i)] for i in layers]


def _dtype_in_memory(tensors: list[Tensor]) -> np.dtype:
    dtypes = {t.dtype for t in tensors} or {np.dtype(np.float32)}  # a stack may have no layer
    kind = np.result_type(*dtypes)
    # Two doubles have no more to say to a model than two floats.
    return np.dtype(np.float32) if kind == np.float64 else kind


def stored_from_memory(config: LlavaConfig, tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves of the tree in memory as they are stored: a layer apart, the padding cut off."""
    shapes = stored_shapes(config)
    stored = {}
    for path, tensor in tree.items():
        stacked = "/layers/" in path
        for layer in range(tensor.shape[0]) if stacked else [None]:
            name = path if layer is None else stored_path(path, layer)
            if name not in shapes:
                raise ValueError(f"{tensor.origin}: not a leaf of this architecture")
            stored[name] = _part_of(tensor, layer, shapes[name])
    return stored


def _part_of(tensor: Tensor, layer: int | None, shape: tuple[int, ...]) -> Tensor:
    inside = tuple(slice(0, size) for size in shape)

    def read() -> np.ndarray:
        if layer is None:
            return tensor.read_part(inside)
        return tensor.read_part((slice(layer, layer + 1), *inside))[0]

    return Tensor(tuple(shape), tensor.dtype, read, tensor.origin)


def _read_shard(
    tensors: list[Tensor], stacked: bool, shape: tuple[int, ...], index: Index, dtype: np.dtype
) -> np.ndarray:
    """The part of a leaf that one device holds. Beyond the stored tensor lies the vocabulary's
    padding: zeros."""
    spans = [range(*s.indices(size)) for s, size in zip(index, shape, strict=True)]
    shard = np.zeros([len(span) for span in spans], dtype)
    layers, spans = (spans[0], spans[1:]) if stacked else ([0], spans)
    for place, layer in enumerate(layers):
        tensor = tensors[layer]
        inside = tuple(
            slice(span.start, min(span.stop, size))
            for span, size in zip(spans, tensor.shape, strict=True)
        )
        if all(s.start < s.stop for s in inside):
            target = shard[place] if stacked else shard
            target[tuple(slice(0, s.stop - s.start) for s in inside)] = tensor.read_part(inside)
    return shard


def _memory_leaves(config: LlavaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = jax.eval_shape(Llava(config).init, jax.random.key(0))
    paths = jax.tree.leaves(leaf_paths(shapes))
    return dict(zip(paths, jax.tree.leaves(shapes), strict=True))
