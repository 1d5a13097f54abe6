"""PyTorch's files: read to the bit, refused in one sentence, and nothing in them ever runs."""

import json
import os
import pickle
import re
import sys
import zipfile
from io import BytesIO

import ml_dtypes
import numpy as np
import pytest

from llava_jax import files
from llava_jax.weights import io, torch_files
from llava_jax.weights.safetensors_header import DTYPES
from tests.conftest import import_torch
from tests.weights.raw_safetensors import assert_holds, fake_bucket


@pytest.fixture
def bucket():
    return fake_bucket()


class Malicious:
    """Opening its pickle with the pickle module makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def torch_tensors(torch):
    base = torch.arange(24, dtype=torch.float32)
    return {
        "plain": base.reshape(4, 6),
        "transposed": base.reshape(4, 6).T,
        "strided": base[1::3],
        "shared": base[6:12],
        "expanded": torch.tensor([3.0]).expand(2, 3),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bfloat16": torch.randn(5, 3).bfloat16().T,
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(4, dtype=torch.uint8),
        "conjugated": torch.tensor([1 + 2j]).conj(),
    }


def as_arrays(torch, tensors):
    def bits(tensor):
        tensor = tensor.detach().resolve_conj().contiguous().clone().reshape(-1)
        return bytes(tensor.view(torch.uint8).numpy())

    return {
        key: np.frombuffer(
            bits(value), next(d for d in DTYPES.values() if f"torch.{d.name}" == str(value.dtype))
        ).reshape(tuple(value.shape))
        for key, value in tensors.items()
    }


@pytest.mark.parametrize("form", ["zip", "compressed zip", "before PyTorch 1.6", "bucket"])
@pytest.mark.parametrize("window", [2**29, 8], ids=["one map", "many maps"])
def test_reads_what_torch_writes(tmp_path, monkeypatch, bucket, form, window):
    torch = import_torch()
    monkeypatch.setattr(torch_files, "_MAP_BYTES", window)
    folder = bucket if form == "bucket" else files.path(tmp_path)
    path = folder / "mm_projector.bin"
    tensors = torch_tensors(torch)
    if form == "before PyTorch 1.6":
        del tensors["float8"]  # the old format does not know it
    with path.open("wb") as file:
        torch.save(tensors, file, _use_new_zipfile_serialization="before" not in form)
    if form == "compressed zip":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, member in members.items():
                archive.writestr(name, member)
    arrays = as_arrays(torch, tensors)
    read = io.read_file(path, allow_pickle=True)
    assert_holds(read, arrays)
    assert read["bfloat16"].dtype == ml_dtypes.bfloat16
    read["plain"].read()[:] = 0
    assert_holds(read, arrays)


def test_maps_are_opened_anew(tmp_path, monkeypatch):
    """Two shards read in turns share one allowance."""
    torch = import_torch()
    for number in (1, 2):
        torch.save(
            {f"{number}.{i}": torch.full((10,), float(i)) for i in range(8)},
            tmp_path / f"pytorch_model-0000{number}-of-00002.bin",
        )
    monkeypatch.setattr(torch_files, "_MAP_BYTES", 160)  # four tensors
    monkeypatch.setattr(torch_files._TorchFile, "_touched", 0)
    opened = []
    plain_load = torch.load

    def load(path, **options):
        opened.append((path, options["mmap"], options["weights_only"]))
        return plain_load(path, **options)

    monkeypatch.setattr(torch, "load", load)
    read = io.read_weights(tmp_path, allow_pickle=True)
    assert len(opened) == 2
    for i in range(8):
        for number in (1, 2):
            assert read[f"{number}.{i}"].read().tolist() == [i] * 10
    # 16 tensors in windows of four: after the first, both maps are opened anew in each.
    assert len(opened) == 2 + 3 * 2
    assert {options[1:] for options in opened} == {(True, True)}


def test_pickled_shards(tmp_path):
    torch = import_torch()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    arrays = {f"{i}": np.full(3, i, np.float32) for i in range(4)}
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    torch.save({key: tensors[key] for key in "01"}, tmp_path / names[0])
    torch.save({key: tensors[key] for key in "23"}, tmp_path / names[1])
    (tmp_path / "mm_projector.bin").write_bytes(b"never opened")
    assert_holds(io.read_weights(tmp_path, allow_pickle=True), arrays)

    index = tmp_path / "pytorch_model.bin.index.json"
    weight_map = {"0": names[0], "1": names[0], "2": names[1], "3": names[1]}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_holds(io.read_weights(tmp_path, allow_pickle=True), arrays)
    index.write_text(json.dumps({"weight_map": weight_map | {"9": names[1], "0": "gone.bin"}}))
    with pytest.raises(ValueError, match="has 3 problems") as error:
        io.read_weights(tmp_path, allow_pickle=True)
    for problem in ("gone.bin is missing", "00001-of-00002.bin holds '0'", "bin lacks '9'"):
        assert problem in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_no_pickle_without_the_flag(tmp_path, name):
    for file in (name, "pytorch_model.more.bin"):
        (tmp_path / file).write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    message = (
        rf"^{re.escape(str(tmp_path / name))} is a pickle, and opening a pickle can run any code; "
        r"expected \.safetensors.*--allow-pickle .*weights_only=True.*safer"
    )
    for read, where in ((io.read_weights, tmp_path), (io.read_file, tmp_path / name)):
        with pytest.raises(ValueError, match=message):
            read(where)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["pickle", "zip", "before PyTorch 1.6"])
def test_malicious_pickle(tmp_path, form):
    torch = import_torch()
    path, trap = tmp_path / "x.bin", Malicious(tmp_path / "ran")
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap, protocol=2))
    else:
        tensors = {"a": torch.zeros(3), "b": trap}
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        ValueError,
        match=rf"cannot read {re.escape(str(path))}: its pickle wants to call {os.mkdir.__module__}"
        r"\.mkdir, which tensors do not need; expected a dict of tensors",
    ):
        io.read_file(path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    if form != "pickle":  # the trap is a real one
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()


def saved(torch, value, **options):
    file = BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def test_pytorchs_advice_to_drop_the_protection_is_not_passed_on(tmp_path):
    import_torch()
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "ran"), protocol=4))
    with pytest.raises(
        ValueError, match="UnpicklingError: Unsupported operand 149; expected"
    ) as error:
        io.read_file(path, allow_pickle=True)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 40, 200, 1000, -1, -100, -3000])
def test_truncated_pickle(tmp_path, legacy, kept):
    torch = import_torch()
    whole = saved(torch, {"a": torch.zeros(1000)}, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "x.bin").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"cannot read .*x\.bin: [^\n]*\(is the file whole\?\)$"):
        io.read_file(tmp_path / "x.bin", allow_pickle=True)


def test_not_a_pickle(tmp_path):
    import_torch()
    for junk in (
        b"hello, I am a text",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\0" * 99,
    ):
        (tmp_path / "x.bin").write_bytes(junk)
        with pytest.raises(ValueError, match=r"cannot read .*x\.bin: .*; expected a dict of tens"):
            io.read_file(tmp_path / "x.bin", allow_pickle=True)


def test_a_storage_that_claims_more_than_its_file_has(tmp_path):
    torch = import_torch()
    with zipfile.ZipFile(tmp_path / "y.bin", "w") as changed:
        torch.save({"a": torch.zeros(3000)}, tmp_path / "x.bin")
        with zipfile.ZipFile(tmp_path / "x.bin") as archive:
            for name in archive.namelist():
                member = archive.read(name)
                if name.endswith("data.pkl"):
                    assert member.count((3000).to_bytes(2, "little")) == 2
                    member = member.replace(
                        (3000).to_bytes(2, "little"), (60_000).to_bytes(2, "little")
                    )
                changed.writestr(name, member)
    with pytest.raises(ValueError, match=r"cannot read .*y\.bin: "):
        io.read_file(tmp_path / "y.bin", allow_pickle=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda t: [t.zeros(2)], "holds a list; expected a dict of tensors"),
        (lambda t: t.zeros(2), "holds a Tensor; expected a dict of tensors"),
        (
            lambda t: {"model": {"a": t.zeros(2)}, "epoch": 3, "b": t.zeros(2)},
            "'model' is a dict of 1 entries, 'epoch' is a int; expected names of tensors",
        ),
        (lambda t: {"state_dict": {"a": t.zeros(2)}}, "'state_dict' is a dict of 1 entries; exp"),
        (lambda t: {3: t.zeros(2)}, "3 is a tensor of torch.float32"),
        (lambda t: {"a": t.eye(2).to_sparse()}, "'a' is a tensor of torch.float32, torch.sparse_"),
        (lambda t: {"a": t.zeros(2, device="meta")}, "torch.strided, on meta; expected names of"),
        (lambda t: {"a": t.zeros(2, dtype=t.complex128)}, "'a' is a tensor of torch.complex128"),
        (lambda t: {str(i): i for i in range(9)}, "'4' is a int (and 4 more); expected names of"),
    ],
)
def test_pickles_of_other_things(tmp_path, value, message):
    torch = import_torch()
    torch.save(value(torch), tmp_path / "x.bin")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        io.read_file(tmp_path / "x.bin", allow_pickle=True)
    assert str(tmp_path / "x.bin") in str(error.value)


@pytest.mark.parametrize("change", ["shorter", "another"])
def test_a_pickle_that_changes_under_our_hands(tmp_path, monkeypatch, change):
    torch = import_torch()
    monkeypatch.setattr(torch_files, "_MAP_BYTES", 0)
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(3000), "b": torch.zeros(3)}, path)
    tensors = io.read_file(path, allow_pickle=True)
    if change == "shorter":
        os.truncate(path, 5000)
    else:
        torch.save({"a": torch.zeros(3000), "b": torch.zeros(3).int()}, path)
    with pytest.raises(ValueError, match=r"x\.bin: ('its size'|'b') is not what it was when the"):
        tensors["b"].read()


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.bin is PyTorch's own format.*run: pip install torch"):
        io.read_file(tmp_path / "x.bin", allow_pickle=True)
