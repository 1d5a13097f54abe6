"""The header of a safetensors file: where each tensor lies. Trusts nothing it reads.

A file is 8 bytes of little-endian length, that many bytes of JSON, then the tensors' bytes side by
side. The JSON maps each key to {"dtype", "shape", "data_offsets": [begin, end]}, the offsets
counted from the end of the header. As in the library that defined the format, the tensors must
cover the data exactly: no overlap, no hole, nothing behind the last. Stricter than the library, a
key may stand once only and an entry has those three fields and no other.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_METADATA = "__metadata__"

assert sys.byteorder == "little", "tensors are read and written as they lie in memory"

# All whole-byte dtypes of the format; the library's F4 and F6 pack several numbers into a byte.
_SCALARS: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
DTYPES = {name: np.dtype(scalar) for name, scalar in _SCALARS.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: the offsets count from the end of the header."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse(header: bytes, data_bytes: int, file: str) -> list[Entry]:
    """The tensors of a header, in its order, when `data_bytes` follow it; `file`: for messages."""
    entries = []
    for key, value in strict_json(header, f"{file}: the header").items():
        if key == _METADATA:
            _check_metadata(value, file)
        else:
            entries.append(_entry(key, value, data_bytes, f"{file}: {quoted(key)}"))
    _check_cover(entries, data_bytes, file)
    return entries


def strict_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object in UTF-8 that says each thing once."""
    if data[:1] != b"{":
        raise ValueError(f"{what} starts with {data[:1]!r}; expected a JSON object, so b'{{'")
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_once_each,
            parse_int=_exact_integer,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no valid JSON: {error}; expected a JSON object") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = {}
    for key, item in pairs:
        for text in (key, item):
            if isinstance(text, str):
                text.encode()  # half a surrogate pair is no text, and could not be written again
        if key in value:
            raise ValueError(f"it says {quoted(key)} twice")
        value[key] = item
    return value


def _exact_integer(text: str) -> int | float:
    """What no offset can be becomes a float, which no check lets through."""
    return int(text) if len(text) <= 20 and text != "-0" else float(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"it holds {text}")


def quoted(text: Any) -> str:
    """For messages: a file may hold keys of any length."""
    text = repr(text)
    return text if len(text) <= 200 else f"{text[:160]}… ({len(text)} characters)"


def _check_metadata(value: Any, file: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"{file}: {_METADATA} is {quoted(value)}; expected an object of texts")


def _entry(key: str, value: Any, data_bytes: int, where: str) -> Entry:
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(value, dict) or set(value) != fields:
        raise ValueError(
            f"{where} is described by {quoted(value)}; expected an object of dtype, shape and "
            "data_offsets"
        )
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{where} has dtype {quoted(name)}; expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    if not _are_sizes(shape):
        raise ValueError(f"{where} has shape {quoted(shape)}; expected a list of integers ≥ 0")
    # The rest of an empty tensor's shape must be possible too, or NumPy refuses it.
    if len(shape) > 64 or math.prod(dim for dim in shape if dim) * dtype.itemsize >= 2**63:
        raise ValueError(
            f"{where} has shape {quoted(shape)}; expected at most 64 dims and fewer than 2**63 "
            "bytes"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{where} has data_offsets {quoted(offsets)}; expected two integers ≥ 0, [begin, end]"
        )
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise ValueError(
            f"{where} lies in bytes {begin} to {end} of the data; expected begin ≤ end ≤ "
            f"{data_bytes}, the bytes that the file holds behind its header (cut off?)"
        )
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise ValueError(
            f"{where} has {end - begin} bytes; expected {expected} for {name} of shape "
            f"{quoted(shape)}"
        )
    return Entry(key, dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    """Whether it is a list of integers ≥ 0; true and false are no integers here."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(entries: Iterable[Entry], data_bytes: int, file: str) -> None:
    covered, before = 0, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != covered:
            problem = "overlaps" if entry.begin < covered else "leaves a hole behind"
            raise ValueError(
                f"{file}: {quoted(entry.key)} begins at byte {entry.begin} of the data and "
                f"{problem} {before}; expected it to begin at {covered}"
            )
        covered, before = entry.end, quoted(entry.key)
    if covered != data_bytes:
        raise ValueError(
            f"{file}: {data_bytes} bytes follow the header, its tensors cover {covered}; expected "
            "the same number"
        )


def build(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], file: str) -> bytes:
    """Length and header of a file that holds these tensors in this order."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    begin = 0
    for key, (dtype, shape) in tensors.items():
        name = _NAMES.get(dtype.newbyteorder("<"))
        if name is None:
            raise ValueError(
                f"{file}: {quoted(key)} has dtype {dtype}; expected one that safetensors has: "
                f"{', '.join(map(str, _NAMES))}"
            )
        if key == _METADATA:
            raise ValueError(f"{file}: a tensor is named {key}; expected another name")
        end = begin + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data of an 8-byte dtype begins aligned
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{file}: the header of {len(tensors)} tensors has {len(text)} bytes; expected at most "
            f"{MAX_HEADER_BYTES}"
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
