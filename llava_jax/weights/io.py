"""Files of weights: read one tensor at a time, written as a stream.

Reading gives the names, shapes and dtypes of a whole checkpoint at once; the bytes of a tensor are
read when it is asked for, into an array of its own. Nothing is mapped into memory: touched pages
of a map count as resident, and a bucket (gs://) cannot be mapped.
"""

import concurrent.futures
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.weights import safetensors_header, torch_files
from llava_jax.weights.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    quoted,
    strict_json,
)
from llava_jax.weights.tensor import Tensor

# What moves at a time: large for throughput, small beside the largest tensor.
_PIECE_BYTES = 64 * 2**20

_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")

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
        if suffix == ".bin" and (own or index in present) and not allow_pickle:
            raise torch_files.refusal(path / (own or [index])[0])
        if index in present:
            weight_map = _weight_map(path / index)
            whole = f"{stem}{suffix}"
            if whole in present and whole not in weight_map.values():
                raise ValueError(
                    f"{path} holds {whole}, and {index} that names other files; expected one of "
                    "the two: remove the one that is out of date"
                )
            return _read_indexed(path, index, weight_map, allow_pickle)
        if own:
            return _read_set(path, own, allow_pickle)
    raise ValueError(
        f"{path} holds {_some(present) if present else 'nothing'}; expected a model's weights: "
        "model.safetensors, model-00001-of-….safetensors or pytorch_model….bin"
    )


def read_file(path: epath.PathLike, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of one file, in its order."""
    path = files.path(path)
    if not path.exists():
        raise ValueError(f"got {path}, which does not exist; expected a file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in torch_files.SUFFIXES:
        raise ValueError(
            f"got {path}; expected a name that ends in .safetensors or "
            f"{' or '.join(torch_files.SUFFIXES)}"
        )
    if not allow_pickle:
        raise torch_files.refusal(path)
    return torch_files.read(path)


def _weight_map(index: epath.Path) -> dict[str, str]:
    """Which file holds which tensor, as an index says it."""
    if (size := index.stat().length) > MAX_HEADER_BYTES:
        raise ValueError(f"{index} has {size} bytes; expected at most {MAX_HEADER_BYTES}")
    weight_map = strict_json(index.read_bytes(), f"{index}").get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map is {quoted(weight_map)}; expected an object")
    for key, shard in weight_map.items():
        # A path could lead out of the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+", shard) or shard == "..":
            raise ValueError(
                f"{index}: {quoted(key)} is in {quoted(shard)}; expected the name of a file beside "
                "the index"
            )
    return weight_map


def _read_indexed(
    folder: epath.Path, index: str, weight_map: dict[str, str], allow_pickle: bool
) -> dict[str, Tensor]:
    """The tensors of the files that an index names, when each holds exactly what it says."""
    tensors: dict[str, Tensor] = {}
    problems = []
    named: dict[str, list[str]] = {}
    for key, shard in weight_map.items():
        named.setdefault(shard, []).append(key)
    for shard, keys in sorted(named.items()):
        path = folder / shard
        if not path.exists():
            problems.append(
                f"{path} is missing; expected, since {index} names it for {_some(keys)}"
            )
            continue
        try:
            found = read_file(path, allow_pickle=allow_pickle)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if absent := [key for key in keys if key not in found]:
            problems.append(f"{path} lacks {_some(absent)}; expected, since {index} names it there")
        if stray := [key for key in found if weight_map.get(key) != shard]:
            holders = {weight_map.get(key, "no file") for key in stray}
            problems.append(
                f"{path} holds {_some(stray)}; expected only what {index} names there, and for "
                f"this it names {_some(sorted(holders))}"
            )
        tensors |= found
    _raise_all(problems, folder)
    return tensors


def _read_set(folder: epath.Path, names: list[str], allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a model's files that no index describes."""
    tensors: dict[str, Tensor] = {}
    problems = []
    # Without an index only the numbers tell that a file is missing.
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    for stem, count, suffix in sorted(
        {match.group("stem", "count", "suffix") for match in numbered}
    ):
        every = [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
        if missing := sorted(set(every) - set(names)):
            problems.append(
                f"{folder} lacks {_some(missing)}; expected all {int(count)} of the set"
            )
    for name in names:
        try:
            found = read_file(folder / name, allow_pickle=allow_pickle)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if twice := [key for key in found if key in tensors]:
            problems.append(
                f"{folder / name} holds {_some(twice)}, and so does {tensors[twice[0]].origin}; "
                "expected every key once"
            )
        tensors |= found
    _raise_all(problems, folder)
    return tensors


def _raise_all(problems: list[str], folder: epath.Path) -> None:
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{folder} has {len(problems)} problems:\n  " + "\n  ".join(problems))


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(quoted, names[:most])) + more


def _read_safetensors(path: epath.Path) -> dict[str, Tensor]:
    size = path.stat().length
    if size < LENGTH_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected a safetensors file, at least 8")
    length = bytearray(LENGTH_BYTES)
    _read_range(path, size, 0, memoryview(length), str(path))
    header_bytes = int.from_bytes(length, "little")
    data = LENGTH_BYTES + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data > size:
        raise ValueError(
            f"{path} announces a header of {header_bytes} bytes; expected at most "
            f"{min(MAX_HEADER_BYTES, size - LENGTH_BYTES)}, as the file has {size} (cut off, or "
            "no safetensors file?)"
        )
    header = bytearray(header_bytes)
    _read_range(path, size, LENGTH_BYTES, memoryview(header), str(path))

    def reader(entry: safetensors_header.Entry) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            array = np.empty(entry.shape, entry.dtype)
            what = f"{path}: {quoted(entry.key)}"
            _read_range(path, size, data + entry.begin, _bytes_of(array), what)
            return array

        return read

    return {
        entry.key: Tensor(entry.shape, entry.dtype, reader(entry), f"{path}: {entry.key}")
        for entry in safetensors_header.parse(bytes(header), size - data, str(path))
    }


def _read_range(path: epath.Path, size: int, begin: int, into: memoryview, what: str) -> None:
    """Fills `into` from byte `begin` of a file that had `size` bytes; `what`: for messages."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        now = file.tell()
        file.seek(begin)
        while now == size and into:
            piece = into[:_PIECE_BYTES]
            if hasattr(file, "readinto"):
                got = file.readinto(piece)  # pyright: ignore[reportAttributeAccessIssue]
            else:  # TensorFlow's files, one of the ways in which epath reaches a bucket
                read = file.read(len(piece))
                got = len(read)
                piece[:got] = read
            if not got:
                now = file.tell()
                break
            into = into[got:]
    if into:
        raise ValueError(
            f"{what} cannot be read: the file has {now} bytes; expected {size}, as when it was "
            "opened: something changes it"
        )


def write_safetensors(
    folder: epath.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int = 5_000_000_000,
    on_tensor: OnTensor | None = None,
) -> dict[str, str]:
    """Writes a model's tensors into an existing folder; which file holds which key.

    One model.safetensors if that fits in `shard_bytes`, else numbered shards and an index. Each
    tensor is read, handed to `on_tensor` (by another thread, while the one before it is written),
    written and forgotten, in the order given.
    """
    assert shard_bytes > 0
    folder = files.path(folder)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for key, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes

    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    # All headers first: what cannot be written shows before an hour of writing.
    headers = [_header(shard, folder / name) for shard, name in zip(shards, names, strict=True)]
    for shard, name, header in zip(shards, names, headers, strict=True):
        with (folder / name).open("wb") as file:
            _write(file, header, shard, on_tensor)
    weight_map = {key: name for shard, name in zip(shards, names, strict=True) for key in shard}
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
                "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            },
            "weight_map": weight_map,
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / "model.safetensors.index.json").write_bytes(text.encode())
    return weight_map


def write_file(
    path: epath.PathLike, tensors: Mapping[str, Tensor], on_tensor: OnTensor | None = None
) -> None:
    """Writes one safetensors file of its own, whole or not at all."""
    header = _header(tensors, files.path(path))
    with files.new_file(path) as file:
        _write(file, header, tensors, on_tensor)


def _header(tensors: Mapping[str, Tensor], path: epath.Path) -> bytes:
    promised = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    return safetensors_header.build(promised, str(path))


def _write(
    file: IO[bytes], header: bytes, tensors: Mapping[str, Tensor], on_tensor: OnTensor | None
) -> None:
    file.write(header)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        coming = None
        for key, tensor in tensors.items():
            following = ahead.submit(_read_tensor, key, tensor, on_tensor)
            if coming is not None:
                _write_array(file, coming.result())
            coming = following
        if coming is not None:
            _write_array(file, coming.result())


def _read_tensor(key: str, tensor: Tensor, on_tensor: OnTensor | None) -> np.ndarray:
    array = tensor.read()
    if (array.dtype, array.shape) != (tensor.dtype, tensor.shape):
        raise ValueError(
            f"{tensor.origin} gave {array.dtype} of shape {array.shape} for {quoted(key)}; "
            f"expected {tensor.dtype} of shape {tensor.shape}"
        )
    if on_tensor is not None:
        on_tensor(key, array)
    return array


def _write_array(file: IO[bytes], array: np.ndarray) -> None:
    view = _bytes_of(array.astype(array.dtype.newbyteorder("<"), copy=False))
    for begin in range(0, len(view), _PIECE_BYTES):
        piece = view[begin : begin + _PIECE_BYTES]
        # TensorFlow's files take nothing but bytes; a local file takes the array's own memory.
        file.write(piece if isinstance(file, io.BufferedIOBase) else bytes(piece))


def sha256(array: np.ndarray) -> str:
    """Of the bytes as they would be written, in C order."""
    return hashlib.sha256(_bytes_of(array)).hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    """The bytes in C order; those of the array itself where it lies so in memory."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
