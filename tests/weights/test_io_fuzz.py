"""5,000 damaged safetensors files: read as the library reads them, or refused in a sentence."""

import collections
import contextlib
import copy
import json
import random
import re
from typing import Any

import safetensors

from llava_jax.weights import io
from llava_jax.weights.safetensors_header import DTYPES
from tests.weights.raw_safetensors import entry, fake_bucket, library_reads, raw

CASES = 5000

# Where the library accepts and we refuse, on purpose. Nowhere is it the other way round.
STRICTER = {
    "a key stands twice; the library takes the last": "it says .* twice",
    "an entry has another field, or is a list; the library ignores or converts": (
        "is described by .*; expected an object of dtype, shape and data_offsets"
    ),
    "a dtype is {'F32': null}, which the library's parser takes for 'F32'": (
        r"has dtype \{.*\}; expected one of"
    ),
    "several numbers share a byte, and NumPy has no such dtype": "has dtype 'F[46].*'; expected",
    "__metadata__ is null": "__metadata__ is None",
    "space stands before the header": "the header starts with b'[ \\\\]",
    "an empty tensor has dims that no array can have": "expected at most 64 dims and fewer than",
}

# What our refusals say, so that none of the checks goes unvisited.
REFUSALS = [
    "expected a safetensors file, at least 8",
    "announces a header",
    "no valid JSON",
    "starts with",
    "__metadata__ is",
    "is described by",
    "has dtype",
    "has shape",
    "has data_offsets",
    "lies in bytes",
    r"has \d+ bytes; expected \d+ for",
    "overlaps",
    "leaves a hole",
    "its tensors cover",
]

NASTY = [
    *(0, 1, 2, 3, 4, 5, 8, 12, 16, 24, -1, 2**31, 2**32 + 1, 2**53, 2**62, 2**63, 2**64, 10**30),
    *(1.0, 1e300, True, False, None, "8", "", [], {}, [0, 8], {"F32": None}),
]
TEXTS = [
    *('"a"', "{}", "[]", "null", "true", "-0", "1e1", "1.0", "NaN", "\\u0061", "\\ud800"),
    *(" ", "\n", "\t", "\0", ",", ":", '"', "{", "}", "[" * 2000, "9" * 5000, '"a":1,'),
    *('"dtype":"F32",', '"__metadata__":null,', '"x":0,', "é", "\ufeff"),
]


def valid(rng: random.Random) -> tuple[dict, bytes]:
    """The header and data of a small valid file."""
    header, data = {}, b""
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": "pt"}
    names = ["a", "b", "model.c", "ü"][: rng.randint(0, 4)]
    for name in names:
        dtype = rng.choice([*DTYPES])
        shape = [rng.choice([0, 1, 2, 3]) for _ in range(rng.randint(0, 3))]
        size = DTYPES[dtype].itemsize
        for dim in shape:
            size *= dim
        header[name] = entry(dtype, shape, [len(data), len(data) + size])
        data += rng.randbytes(size)
    items = list(header.items())
    rng.shuffle(items)
    return dict(items), data


def damaged(rng: random.Random) -> bytes:
    kind = rng.choice([edit_header] * 4 + [edit_text] * 2 + [edit_bytes] * 2 + [edit_length])
    return kind(rng, *valid(rng))


def edit_header(rng: random.Random, header: dict, data: bytes) -> bytes:
    """The JSON with another value in one or two places."""
    for _ in range(rng.randint(1, 2)):
        edit = rng.choice([edit_offset, edit_place, edit_shape, edit_dtype, edit_entry, edit_top])
        # The second edit may not find what the first has broken.
        with contextlib.suppress(KeyError, TypeError, IndexError, ValueError, AttributeError):
            edit(rng, header, rng.choice([key for key in header if key != "__metadata__"]))
    return raw(header, data[: len(data) - rng.choice([0] * 9 + [1])])


def nasty(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(NASTY))


def edit_offset(rng: random.Random, header: dict, key: str) -> None:
    offsets = header[key]["data_offsets"]
    at = rng.randrange(2)
    offsets[at] = rng.choice([offsets[at] + rng.choice([-8, -4, -1, 1, 4, 8]), nasty(rng)])


def edit_place(rng: random.Random, header: dict, key: str) -> None:
    """The tensor as it is, elsewhere; or its bytes without it."""
    begin, end = header[key]["data_offsets"]
    by = rng.choice([-8, -4, -1, 1, 4, 8])
    header[key]["data_offsets"] = [begin + by, end + by]
    if rng.random() < 0.3:
        del header[key]


def edit_shape(rng: random.Random, header: dict, key: str) -> None:
    shape = header[key]["shape"]
    change = rng.choice(["set", "insert", "insert", "reverse", "many"])
    if change == "set":
        shape[rng.randrange(len(shape))] = nasty(rng)
    elif change == "insert":
        shape.insert(rng.randint(0, len(shape)), nasty(rng))
    elif change == "many":
        shape += [1] * rng.choice([10, 70])
    else:
        shape.reverse()


def edit_dtype(rng: random.Random, header: dict, key: str) -> None:
    value = header[key]
    value["dtype"] = rng.choice(
        [*DTYPES, "F4", "F6_E2M3", "f32", "C128", {"F32": None}, nasty(rng)]
    )
    if value["dtype"] == "F4":  # two in a byte: true to the format
        value["shape"] = [2 * (value["data_offsets"][1] - value["data_offsets"][0])]
    elif value["dtype"] == {"F32": None}:
        value["shape"] = [(value["data_offsets"][1] - value["data_offsets"][0]) // 4]


def edit_entry(rng: random.Random, header: dict, key: str) -> None:
    value, other = header[key], header[rng.choice(list(header))]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    change = rng.choice(["swap", "set", "drop", "more", "list"])
    if change == "swap":
        value[field], other[field] = other[field], value[field]
    elif change == "list":
        header[key] = [value["dtype"], value["shape"], value["data_offsets"]]
    elif change == "drop":
        del value[field]
    else:
        value[field if change == "set" else "more"] = nasty(rng)


def edit_top(rng: random.Random, header: dict, key: str) -> None:
    more = [{"a": 1}, {"a": "b"}, entry("U8", [], [0, 1]), entry("U8", [0], [0, 0])]
    header[rng.choice(["__metadata__", "new"])] = rng.choice([None, *more, nasty(rng)])


def edit_text(rng: random.Random, header: dict, data: bytes) -> bytes:
    """The JSON as text: something put in, cut out or said twice."""
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5)
    at = rng.choice([0, 1, len(text), rng.randint(0, len(text)), rng.randint(0, len(text))])
    change = rng.choice(["insert", "cut", "twice", "space"])
    if change == "insert":
        text = text[:at] + rng.choice(TEXTS) + text[at:]
    elif change == "cut":
        text = text[:at] + text[at + rng.randint(1, 9) :]
    elif change == "twice" and header:
        first = json.dumps(dict([rng.choice(list(header.items()))]))
        text = first[:-1] + "," + text[1:]
    else:
        spaces = " \t\r\n"[rng.randrange(4)] * rng.randint(1, 9)
        text = rng.choice([spaces + text, text + spaces, text.replace(":", ":" + spaces)])
    return raw(text.encode("utf-8", "surrogatepass"), data)


def edit_bytes(rng: random.Random, header: dict, data: bytes) -> bytes:
    """The file as bytes, its author's intention unknown."""
    file = bytearray(raw(header, data))
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(file) + 1)
        change = rng.choice(["flip", "flip", "truncate", "insert", "delete"])
        if change == "flip" and at < len(file):
            file[at] ^= 1 << rng.randrange(8)
        elif change == "truncate":
            del file[at:]
        elif change == "insert":
            file[at:at] = rng.randbytes(rng.randint(1, 9))
        else:
            del file[at : at + rng.randint(1, 9)]
    return bytes(file)


def edit_length(rng: random.Random, header: dict, data: bytes) -> bytes:
    file = raw(header, data)
    length = int.from_bytes(file[:8], "little")
    near = [length + rng.choice([-9, -1, 1, 2, 9]), len(file) - 8, len(file), 0, 1]
    far = [10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 8, 2**63, 2**64 - 8, 2**64 - 1]
    return max(0, rng.choice(near + far)).to_bytes(8, "little") + file[8:]


def test_damaged_files(monkeypatch):
    size = 0

    def checked(path, size_then, begin, into, what):
        assert 0 <= begin <= begin + len(into) <= size, f"reads {begin} to {begin + len(into)}"
        plain_read_range(path, size_then, begin, into, what)

    plain_read_range = io._read_range
    monkeypatch.setattr(io, "_read_range", checked)
    path = fake_bucket() / "x.safetensors"  # in memory: a busy disk would make this slow
    rng = random.Random(3)
    seen = collections.Counter()
    for _ in range(CASES):
        file = damaged(rng)
        size = len(file)
        path.write_bytes(file)
        try:
            theirs = library_reads(file)
        except safetensors.SafetensorError:
            theirs = None
        try:
            tensors = io.read_file(path)
            arrays = {key: tensor.read() for key, tensor in tensors.items()}
        except (ValueError, OSError) as error:
            message = str(error)
            assert message.startswith(str(path)), file
            assert len(message) < 1000, file
            seen.update(kind for kind in REFUSALS if re.search(kind, message))
            if theirs is None:
                seen["both refuse"] += 1
            else:
                reasons = [name for name, says in STRICTER.items() if re.search(says, message)]
                assert len(reasons) == 1, (message, file)
                seen[reasons[0]] += 1
        else:
            assert theirs is not None, file
            assert theirs == {
                key: (theirs[key][0], array.shape, array.tobytes()) for key, array in arrays.items()
            }
            assert all(DTYPES[theirs[key][0]] == array.dtype for key, array in arrays.items())
            seen["both read"] += 1

    print(seen)
    # The damage reaches every check, and leaves enough files whole.
    assert seen["both read"] > 500
    assert seen["both refuse"] > 2000
    assert not [kind for kind in [*STRICTER, *REFUSALS] if not seen[kind]]
