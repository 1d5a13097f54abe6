"""Files of weights: read one tensor at a time, written as a stream.

Reading gives the names, shapes and dtypes of a whole checkpoint at once; the bytes of a tensor are
read when it is asked for, into an array of its own. Nothing is mapped into memory: touched pages
of a map count as resident, and a bucket (gs://) cannot be mapped.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import IO

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.weights import safetensors_header
from llava_jax.weights.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, quoted
from llava_jax.weights.tensor import Tensor

# What moves at a time: large for throughput, small beside the largest tensor.
_PIECE_BYTES = 64 * 2**20

OnTensor = Callable[[str, np.ndarray], None]


def read_weights(
    folder_or_file: epath.PathLike, *, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The tensors of a checkpoint: its model's own files, not adapters or projectors beside them.

    All problems of a folder are reported together. Safetensors are preferred to pickles.
    """
    path = files.path(folder_or_file)
    if not path.is_dir():
        return read_file(path, allow_pickle=allow_pickle)
    present = sorted(entry.name for entry in path.iterdir())
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        own = [name for name in present if name.startswith(stem) and name.endswith(suffix)]
        index = f"{stem}{suffix}.index.json"
        if index in present:
            return _read_indexed(path, index, allow_pickle)
        if own:
            return _read_shards(path, own, None, allow_pickle)
    raise ValueError(
        f"{path} holds {_listed(present) or 'nothing'}; expected model.safetensors, "
        "model-*-of-*.safetensors or pytorch_model*.bin"
    )


def read_file(path: epath.PathLike, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of one file, in its order."""
    path = files.path(path)
    if not path.exists():
        raise ValueError(f"got {path}, which does not exist; expected a file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise ValueError(f"got {path}; expected a file whose name ends in .safetensors")


def _read_indexed(folder: epath.Path, index: str, allow_pickle: bool) -> dict[str, Tensor]:
    where = f"{folder / index}"
    value = safetensors_header.strict_json((folder / index).read_bytes(), where)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{where}: weight_map is {quoted(weight_map)}; expected an object")
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard:
            raise ValueError(
                f"{where}: {quoted(key)} is in {quoted(shard)}; expected the name of a file of "
                "this folder"
            )
    return _read_shards(folder, sorted(set(weight_map.values())), weight_map, allow_pickle)


def _read_shards(
    folder: epath.Path,
    shards: Iterable[str],
    weight_map: Mapping[str, str] | None,
    allow_pickle: bool,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_file(folder / shard, allow_pickle=allow_pickle)
    return tensors


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(quoted, names[:most])) + more


def _read_safetensors(path: epath.Path) -> dict[str, Tensor]:
    size = path.stat().length
    length_bytes = bytearray(LENGTH_BYTES)
    if size < LENGTH_BYTES or _read_range(path, 0, memoryview(length_bytes)) < LENGTH_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected a safetensors file, of at least 8")
    header_bytes = int.from_bytes(length_bytes, "little")
    data = LENGTH_BYTES + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data > size:
        raise ValueError(
            f"{path} announces a header of {header_bytes} bytes; expected at most "
            f"{min(MAX_HEADER_BYTES, size - LENGTH_BYTES)}, as the file has {size} (cut off, or "
            "no safetensors file?)"
        )
    header = bytearray(header_bytes)
    if _read_range(path, LENGTH_BYTES, memoryview(header)) < header_bytes:
        raise ValueError(f"{path} became shorter while it was read; expected {size} bytes")
    return {
        entry.key: Tensor(
            entry.shape, entry.dtype, _reader(path, size, data, entry), f"{path}: {entry.key}"
        )
        for entry in safetensors_header.parse(bytes(header), size - data, str(path))
    }


def _reader(
    path: epath.Path, size: int, data: int, entry: safetensors_header.Entry
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = np.empty(entry.shape, entry.dtype)
        got = _read_range(path, data + entry.begin, _bytes_of(array))
        if got < array.nbytes or path.stat().length != size:
            raise ValueError(
                f"{path}: {quoted(entry.key)} gave {got} bytes of {array.nbytes}, and the file has "
                f"{path.stat().length}; expected {size}, as when its header was read: it changed"
            )
        return array

    return read


def _read_range(path: epath.Path, begin: int, into: memoryview) -> int:
    """Fills `into` from byte `begin` on; how many bytes there were."""
    done = 0
    with path.open("rb") as file:
        file.seek(begin)
        while done < len(into):
            piece = into[done : done + _PIECE_BYTES]
            if hasattr(file, "readinto"):
                got = file.readinto(piece)  # pyright: ignore[reportAttributeAccessIssue]
            else:  # TensorFlow's files, one of the ways in which epath reaches a bucket
                read = file.read(len(piece))
                got = len(read)
                piece[:got] = read
            if not got:
                break
            done += got
    return done


def write_safetensors(
    folder: epath.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int = 5_000_000_000,
    on_tensor: OnTensor | None = None,
) -> dict[str, str]:
    """Writes a model's tensors into an existing folder; which file holds which key.

    One model.safetensors if that fits in `shard_bytes`, else numbered shards and an index. Each
    tensor is read, handed to `on_tensor`, written and forgotten, in the order given.
    """
    folder = files.path(folder)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for key, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        with (folder / name).open("wb") as file:
            _write(file, str(folder / name), shard, on_tensor)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
                "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            },
            "weight_map": weight_map,
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    return weight_map


def write_file(path: epath.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file of its own, whole or not at all."""
    with files.new_file(path) as file:
        _write(file, str(path), tensors, None)


def _write(file: IO, name: str, tensors: Mapping[str, Tensor], on_tensor: OnTensor | None) -> None:
    promised = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    file.write(safetensors_header.build(promised, name))
    for key, tensor in tensors.items():
        array = tensor.read()
        if (array.dtype, array.shape) != promised[key]:
            raise ValueError(
                f"{tensor.origin} gave {array.dtype} of shape {array.shape} for {quoted(key)}; "
                f"expected {tensor.dtype} of shape {tensor.shape}"
            )
        if on_tensor is not None:
            on_tensor(key, array)
        view = _bytes_of(array.astype(array.dtype.newbyteorder("<"), copy=False))
        for begin in range(0, len(view), _PIECE_BYTES):
            file.write(view[begin : begin + _PIECE_BYTES])


def sha256(array: np.ndarray) -> str:
    """Of the bytes as they would be written, in C order."""
    return hashlib.sha256(_bytes_of(array)).hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    """The bytes in C order; those of the array itself where it lies so in memory."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
