"""Safetensors files made by hand, and the library that defined the format as their judge."""

import json
from collections.abc import Mapping
from typing import Any

import fsspec
import numpy as np
import safetensors
from etils import epath

from llava_jax import files
from llava_jax.weights.safetensors_header import DTYPES
from llava_jax.weights.tensor import Tensor, in_memory
from tests.test_files import FakeBucket

# Opens more brackets than any parser may follow.
DEEP = "[" * 100_000


def raw(header: Any, data: bytes = b"") -> bytes:
    """A file of this header (an object, or text as it is) and these bytes behind it."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def library_reads(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor, as the library has them."""
    return {
        key: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for key, info in safetensors.deserialize(file)
    }


def every_dtype(seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of all dtypes and of all kinds of shapes, of random bits."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, dtype in DTYPES.items():
        for shape in [(), (1,), (0,), (3, 0, 2), (5, 3), (2, 1, 4)]:
            size = int(np.prod(shape)) * dtype.itemsize
            bits = rng.integers(0, 2 if name == "BOOL" else 256, size, np.uint8)
            arrays[f"{name}.{'x'.join(map(str, shape))}"] = bits.view(dtype).reshape(shape)
    return arrays


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to the bit: NaN too."""
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: in_memory(array, key) for key, array in arrays.items()}


def assert_holds(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    assert tensors.keys() == arrays.keys()
    for key, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (arrays[key].dtype, arrays[key].shape)
        assert same(tensor.read(), arrays[key]), key


def fake_bucket() -> epath.Path:
    """An empty bucket, s3://bucket."""
    fsspec.register_implementation("s3", FakeBucket, clobber=True)
    FakeBucket.store.clear()
    FakeBucket.pseudo_dirs[:] = ["", "/bucket"]
    return files.path("s3://bucket")
