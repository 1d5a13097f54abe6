"""Bad safetensors files: each is refused in one sentence with file, key, got and expected."""

import json
import re

import pytest

from llava_jax.weights import io
from tests.weights.raw_safetensors import DEEP, entry, raw

DATA = bytes(range(8))

BAD_FILES = {
    "empty": (b"", "x.safetensors has 0 bytes; expected a safetensors file, at least 8"),
    "short": (b"\1\0\0", "has 3 bytes; expected a safetensors file, at least 8"),
    "length past the end": (
        (9).to_bytes(8, "little") + b"{}",
        "announces a header of 9 bytes; expected at most 2, as the file has 10",
    ),
    "length of 2**64 - 1": (
        b"\xff" * 8 + b"{}",
        "announces a header of 18446744073709551615 bytes; expected at most 2",
    ),
    "no header": (raw(b""), "the header starts with b''; expected a JSON object"),
    "no object": (raw("[]"), "the header starts with b'['; expected a JSON object"),
    "space in front": (raw(" {}"), "the header starts with b' '; expected a JSON object"),
    "cut JSON": (raw('{"a":'), "the header is no valid JSON: Expecting value"),
    "more JSON": (raw("{}{}"), "the header is no valid JSON: Extra data"),
    "no UTF-8": (raw(b'{"\xff":1}'), "the header is no valid JSON: 'utf-8' codec can't decode"),
    "half a surrogate": (raw('{"\\ud800":1}'), "no valid JSON: 'utf-8' codec can't encode"),
    "deep": (raw('{"a":' + DEEP), "the header is no valid JSON: maximum recursion depth"),
    "NaN": (raw('{"a":NaN}'), "the header is no valid JSON: it holds NaN"),
    "key twice": (
        raw(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}', DATA),
        "the header is no valid JSON: it says 'a' twice",
    ),
    "dtype twice": (
        raw('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
        "it says 'dtype' twice",
    ),
    "metadata": (
        raw({"__metadata__": {"step": 3}}),
        "__metadata__ is {'step': 3}; expected an object of texts",
    ),
    "metadata null": (raw({"__metadata__": None}), "__metadata__ is None; expected an object"),
    "no entry": (raw({"a": 3}), "'a' is described by 3; expected an object of dtype, shape and"),
    "entry as list": (raw({"a": ["F32", [2], [0, 8]]}, DATA), "'a' is described by ['F32'"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": [2]}}), "'a' is described by {'dtype'"),
    "field more": (raw({"a": {**entry(), "x": 1}}, DATA), "expected an object of dtype, shape and"),
    "dtype unknown": (raw({"a": entry("F31")}, DATA), "'a' has dtype 'F31'; expected one of BOOL"),
    "dtype sub-byte": (raw({"a": entry("F4", [16])}, DATA), "'a' has dtype 'F4'; expected one of"),
    "dtype no text": (raw({"a": entry(["F32"])}, DATA), "'a' has dtype ['F32']; expected one of"),
    "shape no list": (raw({"a": entry(shape=2)}, DATA), "'a' has shape 2; expected a list of int"),
    "shape negative": (raw({"a": entry(shape=[-2])}, DATA), "has shape [-2]; expected a list of i"),
    "shape of bool": (
        raw({"a": entry(shape=[2, True])}, DATA),
        "'a' has shape [2, True]; expected a list of integers ≥ 0",
    ),
    "shape of float": (raw({"a": entry(shape=[2.0])}, DATA), "shape [2.0]; expected a list of int"),
    "shape too large": (
        raw({"a": entry(shape=[2**40, 2**40])}, DATA),
        "'a' has shape [1099511627776, 1099511627776]; expected at most 64 dims and fewer than",
    ),
    "shape empty and too large": (
        raw({"a": entry(shape=[2**40, 0, 2**40], offsets=[0, 0])}),
        "expected at most 64 dims and fewer than 2**63 bytes",
    ),
    "shape of 65 dims": (raw({"a": entry(shape=[1] * 65)}, DATA), "expected at most 64 dims"),
    "shape of many digits": (
        raw('{"a":{"dtype":"F32","shape":[' + "9" * 10_000 + '],"data_offsets":[0,8]}}', DATA),
        "'a' has shape [inf]; expected a list of integers ≥ 0",
    ),
    "offsets negative": (
        raw({"a": entry(offsets=[-8, 0])}, DATA),
        "'a' has data_offsets [-8, 0]; expected two integers ≥ 0",
    ),
    "offset -0": (
        raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', DATA),
        "'a' has data_offsets [-0.0, 8]; expected two integers ≥ 0",
    ),
    "three offsets": (raw({"a": entry(offsets=[0, 4, 8])}, DATA), "[0, 4, 8]; expected two integ"),
    "offsets backwards": (
        raw({"a": entry(offsets=[8, 0])}, DATA),
        "'a' lies in bytes 8 to 0 of the data; expected begin ≤ end ≤ 8",
    ),
    "cut off": (
        raw({"a": entry()}, DATA[:-1]),
        "'a' lies in bytes 0 to 8 of the data; expected begin ≤ end ≤ 7, the bytes that the file",
    ),
    "too few bytes for the shape": (
        raw({"a": entry("F64", [2])}, DATA),
        "'a' has 8 bytes; expected 16 for F64 of shape [2]",
    ),
    "overlap": (
        raw({"a": entry(), "b": entry("U8", [4], [4, 8])}, DATA),
        "'b' begins at byte 4 of the data and overlaps 'a'; expected it to begin at 8",
    ),
    "the same place": (raw({"a": entry(), "b": entry()}, DATA), "'b' begins at byte 0 of the"),
    "hole": (
        raw({"a": entry("U8", [4], [0, 4]), "b": entry("U8", [2], [6, 8])}, DATA),
        "'b' begins at byte 6 of the data and leaves a hole behind 'a'; expected it to begin at 4",
    ),
    "hole in front": (
        raw({"a": entry("U8", [4], [4, 8])}, DATA),
        "'a' begins at byte 4 of the data and leaves a hole behind the header; expected it to",
    ),
    "bytes behind the last": (
        raw({"a": entry("U8", [4], [0, 4])}, DATA),
        "8 bytes follow the header, its tensors cover 4; expected the same number",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    file, message = BAD_FILES[name]
    (tmp_path / "x.safetensors").write_bytes(file)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        io.read_file(tmp_path / "x.safetensors")
    assert str(tmp_path / "x.safetensors") in str(error.value)
    assert len(str(error.value)) < 1000


def test_header_over_the_limit(tmp_path):
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # takes no room on the disk
    with pytest.raises(ValueError, match="header of 100000001 bytes; expected at most 100000000,"):
        io.read_file(tmp_path / "x.safetensors")
