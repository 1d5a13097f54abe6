"""Files of weights: what the safetensors library writes is read, and the other way."""

import hashlib
import json
import os
import re
import weakref
from io import FileIO

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from llava_jax import files
from llava_jax.weights import io, safetensors_header
from llava_jax.weights.tensor import Tensor, in_memory
from tests.conftest import import_torch
from tests.weights.raw_safetensors import (
    DEEP,
    as_tensors,
    assert_holds,
    every_dtype,
    fake_bucket,
    library_reads,
    same,
)


@pytest.fixture
def bucket():
    return fake_bucket()


def test_reads_what_the_library_writes(tmp_path):
    arrays = every_dtype()
    specs = {
        key: safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for key, array in arrays.items()
    }
    safetensors.serialize_file(specs, tmp_path / "model.safetensors", {"format": "pt"})
    assert_holds(io.read_weights(tmp_path), arrays)


def test_the_library_reads_what_we_write(tmp_path):
    arrays = every_dtype()
    weight_map = io.write_safetensors(tmp_path, as_tensors(arrays))
    assert weight_map == dict.fromkeys(arrays, "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    file = (tmp_path / "model.safetensors").read_bytes()
    assert library_reads(file) == {
        key: (key.split(".")[0], array.shape, array.tobytes()) for key, array in arrays.items()
    }
    header_bytes = int.from_bytes(file[:8], "little")
    assert header_bytes % 8 == 0
    header = json.loads(file[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == list(arrays)
    assert_holds(io.read_weights(tmp_path), arrays)


def test_the_library_loads_numpys_dtypes(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(True)}
    io.write_file(tmp_path / "x.safetensors", as_tensors(arrays))
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert all(same(loaded[key], arrays[key]) for key in arrays)


def test_torch_loads_what_we_write(tmp_path):
    torch = import_torch()
    import safetensors.torch

    # An odd number of bytes first: nothing behind it is aligned.
    arrays = {"odd": np.ones(3, np.int8)} | every_dtype()
    io.write_safetensors(tmp_path, as_tensors(arrays))
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for key, array in arrays.items():
        tensor = loaded[key]
        assert str(tensor.dtype) == f"torch.{array.dtype.name}"
        assert tuple(tensor.shape) == array.shape
        assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == array.tobytes(), key


def test_shards_and_index(tmp_path):
    shapes = {"z": 9, "a": 3, "b": 4, "c": 9, "d": 1, "é": 7}  # z and c are more than a shard
    arrays = {key: np.full(size, size, np.float32) for key, size in shapes.items()}
    weight_map = io.write_safetensors(tmp_path, as_tensors(arrays), shard_bytes=32)
    parts = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert weight_map == dict(zip("zabcdé", np.repeat(parts, [1, 2, 1, 2]), strict=True))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_parameters": 33, "total_size": 132},
        "weight_map": weight_map,
    }
    for part in parts:
        assert library_reads((tmp_path / part).read_bytes()).keys() == {
            key for key, holder in weight_map.items() if holder == part
        }
    assert_holds(io.read_weights(tmp_path), arrays)


@pytest.mark.parametrize("shard_bytes", [1_000_000, 100])
def test_bucket(bucket, shard_bytes):
    arrays = every_dtype()
    with files.fresh_folder(bucket / "out") as folder:
        io.write_safetensors(folder, as_tensors(arrays), shard_bytes=shard_bytes)
    assert_holds(io.read_weights("s3://bucket/out"), arrays)
    io.write_file(bucket / "one.safetensors", as_tensors(arrays))
    assert_holds(io.read_file(bucket / "one.safetensors"), arrays)


def test_a_file_of_tensorflow(tmp_path, monkeypatch):
    """Its files have no readinto, their seek returns nothing, and they take bytes only."""

    class GFile:
        def __init__(self, file):
            self.tell, self._file = file.tell, file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file.close()

        def seek(self, offset, whence=0):
            self._file.seek(offset, whence)

        def read(self, size):
            return self._file.read(min(size, 3))  # it may give less than was asked for

        def write(self, data):
            assert isinstance(data, bytes)
            self._file.write(data)

    folder = files.path(tmp_path)
    plain_open = type(folder).open
    monkeypatch.setattr(
        type(folder), "open", lambda path, mode="r", **_: GFile(plain_open(path, mode))
    )
    monkeypatch.setattr(io, "_PIECE_BYTES", 5)
    io.write_safetensors(folder, as_tensors(every_dtype()))
    assert_holds(io.read_weights(folder), every_dtype())


def test_an_empty_model(tmp_path):
    assert io.write_safetensors(tmp_path, {}) == {}
    assert io.read_weights(tmp_path) == {}


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
        np.arange(12, dtype=">i4").reshape(3, 4),
        np.arange(12, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(3, 4)[:, ::2],
        np.broadcast_to(np.float32(3), (2, 3)),
    ],
    ids=["transposed", "big-endian", "strided", "broadcast"],
)
def test_writes_in_c_order_and_little_endian(tmp_path, array):
    io.write_file(tmp_path / "x.safetensors", {"a": in_memory(array, "a")})
    read = io.read_file(tmp_path / "x.safetensors")["a"].read()
    assert same(read, np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")))


def test_one_tensor_is_held_at_a_time(tmp_path):
    alive = []

    def read():
        assert not any(earlier() is not None for earlier in alive)
        array = np.zeros((2, 3), np.float32)
        alive.append(weakref.ref(array))
        return array

    seen = []
    io.write_safetensors(
        tmp_path,
        {key: Tensor((2, 3), np.dtype(np.float32), read, key) for key in "cab"},
        shard_bytes=48,
        on_tensor=lambda key, array: seen.append((key, float(array.sum()))),
    )
    assert seen == [("c", 0), ("a", 0), ("b", 0)]


def test_every_read_gives_a_fresh_array(tmp_path):
    io.write_file(tmp_path / "x.safetensors", as_tensors({"a": np.zeros(2)}))
    tensor = io.read_file(tmp_path / "x.safetensors")["a"]
    one, other = tensor.read(), tensor.read()
    one[:] = 1
    assert other.sum() == 0


@pytest.mark.parametrize("gives", [np.zeros(3, np.float32), np.zeros(2, np.float16)])
def test_a_broken_promise_is_refused(tmp_path, gives):
    tensor = Tensor((2,), np.dtype(np.float32), lambda: gives, "src: w")
    got = re.escape(f"src: w gave {gives.dtype} of shape {gives.shape} for 'k'")
    with pytest.raises(ValueError, match=rf"{got}; expected float32 of shape \(2,\)"):
        io.write_file(tmp_path / "x.safetensors", {"k": tensor})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("k", np.zeros(2, np.complex128), r"x.safetensors: 'k' has dtype complex128; expected one"),
        ("k", np.zeros(2, ml_dtypes.int4), r"x.safetensors: 'k' has dtype int4; expected one"),
        ("__metadata__", np.zeros(2), "x.safetensors: a tensor is named __metadata__; expected"),
        ("k" * 200, np.zeros(2), r"header of 1 tensors has \d+ bytes; expected at most 200"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, monkeypatch, key, array, message):
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 200)
    with pytest.raises(ValueError, match=message):
        io.write_file(tmp_path / "x.safetensors", {key: in_memory(array, "a")})
    with pytest.raises(ValueError, match=message.replace("x.safe", "model.safe")):
        io.write_safetensors(tmp_path, {key: in_memory(array, "a")})
    assert not list(tmp_path.iterdir())


def test_sha256():
    for array in [*every_dtype().values(), np.arange(12).reshape(3, 4).T, np.arange(9)[::2]]:
        assert io.sha256(array) == hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_file_that_changes_under_our_hands(tmp_path, change):
    path = tmp_path / "x.safetensors"
    io.write_file(path, as_tensors({"a": np.ones(9), "b": np.ones(9)}))
    tensors = io.read_file(path)
    size = path.stat().st_size
    if change == "gone":
        path.unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            tensors["a"].read()
        return
    now = size + (8 if change == "longer" else -8)
    os.truncate(path, now)
    message = re.escape(f"{path}: 'a' cannot be read: the file has {now} bytes; expected {size},")
    with pytest.raises(ValueError, match=message):
        tensors["a"].read()


def test_a_file_that_ends_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    io.write_file(path, as_tensors({"a": np.ones(100_000)}))
    tensor = io.read_file(path)["a"]
    monkeypatch.setattr(io, "_PIECE_BYTES", 80_000)
    pieces = []

    class Shrinking(FileIO):
        def readinto(self, into):
            pieces.append(len(into))
            if len(pieces) == 3:
                os.truncate(path, 100_000)
            return super().readinto(into)

    monkeypatch.setattr(type(files.path(path)), "open", lambda path, mode: Shrinking(path, mode))
    with pytest.raises(ValueError, match=r"x\.safetensors: 'a' cannot be read: the file has"):
        tensor.read()
    assert len(pieces) > 2


# Folders


def test_the_models_own_files_only(tmp_path):
    arrays = {"a": np.ones(2, np.float32)}
    for name in ("adapter_model.safetensors", "mm_projector.safetensors", "model.safetensors"):
        io.write_file(tmp_path / name, as_tensors(arrays))
    for name in ("pytorch_model.bin", "non_lora_trainables.bin", "optimizer.bin"):
        (tmp_path / name).write_bytes(b"never opened")
    assert_holds(io.read_weights(tmp_path), arrays)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        io.read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(
        ValueError,
        match=r"holds 'adapter_model\.safetensors', 'mm_projector\.safetensors', 'non_lora.*bin', "
        r"'optimizer\.bin'; expected a model's weights: model\.safetensors,",
    ):
        io.read_weights(tmp_path)
    assert_holds(io.read_weights(tmp_path / "adapter_model.safetensors"), arrays)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="holds nothing; expected a model's weights"):
        io.read_weights(tmp_path)
    with pytest.raises(ValueError, match=r"got .*/no, which does not exist; expected a file of"):
        io.read_weights(tmp_path / "no")
    (tmp_path / "x.msgpack").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got .*x.msgpack; expected a name that ends in .safet"):
        io.read_file(tmp_path / "x.msgpack")


def sharded(folder, count=3):
    """A folder of `count` shards with two tensors each: 0a 0b, 1a 1b, …"""
    keys = [f"{number}{letter}" for number in range(count) for letter in "ab"]
    arrays = {key: np.full(2, number, np.float32) for number, key in enumerate(keys)}
    io.write_safetensors(folder, as_tensors(arrays), shard_bytes=16)
    return arrays, [folder / f"model-0000{n}-of-0000{count}.safetensors" for n in (1, 2, 3)]


def test_shards_without_an_index(tmp_path):
    arrays, parts = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_holds(io.read_weights(tmp_path), arrays)

    os.truncate(parts[0], parts[0].stat().st_size - 3)
    parts[2].unlink()
    io.write_file(tmp_path / "model.extra.safetensors", as_tensors({"1b": np.ones(1)}))
    with pytest.raises(ValueError, match="has 3 problems:") as error:
        io.read_weights(tmp_path)
    _, *problems = str(error.value).split("\n")
    assert len(problems) == 3
    assert "lacks 'model-00003-of-00003.safetensors'; expected all 3 of the set" in problems[0]
    assert f"{parts[0]}: '0b' lies in bytes 8 to 16 of the data; expected" in problems[1]
    assert (
        f"{tmp_path}/model.extra.safetensors holds '1b', and so does {parts[1]}: 1b; expected "
        "every key once"
    ) in problems[2]


def test_every_problem_of_an_index_in_one_error(tmp_path):
    _, parts = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    names = [part.name for part in parts]
    value["weight_map"] |= {"ghost": names[1], "1a": names[0]}
    del value["weight_map"]["1b"]
    index.write_text(json.dumps(value))
    parts[2].unlink()
    with pytest.raises(ValueError, match="has 4 problems:") as error:
        io.read_weights(tmp_path)
    _, *problems = str(error.value).split("\n  ")
    says = "model.safetensors.index.json"
    assert problems == [
        f"{parts[0]} lacks '1a'; expected, since {says} names it there",
        f"{parts[1]} lacks 'ghost'; expected, since {says} names it there",
        f"{parts[1]} holds '1a', '1b'; expected only what {says} names there, and for this it "
        f"names '{names[0]}', 'no file'",
        f"{parts[2]} is missing; expected, since {says} names it for '2a', '2b'",
    ]


def test_one_problem_is_one_line(tmp_path):
    _, parts = sharded(tmp_path)
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(parts[1]))}: '1b' lies in bytes [^\n]*$"
    ):
        io.read_weights(tmp_path)


def test_an_index_and_a_whole_file(tmp_path):
    sharded(tmp_path)
    io.write_file(tmp_path / "model.safetensors", as_tensors({"a": np.ones(1)}))
    with pytest.raises(
        ValueError, match=r"holds model\.safetensors, and model\.safetensors\.index"
    ):
        io.read_weights(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with b''; expected a JSON object"),
        ('{"weight_map": {"a": "x", "a": "x"}}', "no valid JSON: it says 'a' twice"),
        ('{"weight_map": ' + DEEP, "no valid JSON: maximum recursion depth"),
        ("{}", "weight_map is None; expected an object"),
        ('{"weight_map": {"a": 3}}', "'a' is in 3; expected the name of a file beside the index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "'a' is in '../x.safetensors'; expected"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "'a' is in '/etc/x.safetensors'; expected"),
        ('{"weight_map": {"a": ".."}}', "'a' is in '..'; expected the name of a file"),
        ('{"weight_map": {"a": ""}}', "'a' is in ''; expected the name of a file"),
        ('{"weight_map": {"a": "x.bin"}}', "x.bin is missing; expected, since"),
    ],
)
def test_bad_index(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        io.read_weights(tmp_path)
    assert "model.safetensors.index.json" in str(error.value)
