"""Checkpoints: saved and restored to the bit, checked by their bits, and read as a model."""

import dataclasses
import functools
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from llava_jax import api, checkpoint, model_folder, optim, step
from llava_jax.checkpoint import Checkpoints, Meta
from llava_jax.config import STAGE_2
from llava_jax.model_folder import About, Base
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.step import State
from llava_jax.weights import exporting
from llava_jax.weights.memory import params_in_memory, stored_shapes
from tests.test_model_folder import CONFIG, random_model

ADAMW = optim.AdamW()
DATA = {"seed": 42, "packed": True}


@functools.cache
def state_of(seed: int, mesh: MeshShape = MeshShape(fsdp=(8,))) -> State:  # noqa: B008
    """What trains in stage 2, drawn, with moments that are not zero."""
    devices = jax.devices()[: int(np.prod(mesh.sizes))]
    layout = Layout(make_mesh(mesh, devices))
    params = params_in_memory(CONFIG, random_model(seed=seed).leaves, layout)
    trainable = optim.split(params, STAGE_2)[0]
    lies = step.shardings(trainable, ADAMW, layout)
    begin = jax.jit(lambda trainable: step.init(trainable, ADAMW), out_shardings=lies)
    state = begin(trainable)
    rng = np.random.default_rng(seed)
    opt = jax.tree.map(
        lambda leaf: (100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), state.opt
    )
    return jax.device_put(State(state.step + seed, state.trainable, opt), lies)


def like(state: State) -> State:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> Meta:
    root = epath.Path(tmp_path_factory.mktemp("base"))
    model_folder.save(random_model(), root / "base")
    base = Base(model_folder.fingerprint(root / "base"), str(root / "base"))
    return Meta(About(CONFIG, template="v0"), base, DATA, skipped=2)


def save(workdir: epath.Path, meta: Meta, *steps: int, keep: int = 5, keep_every: int = 0) -> None:
    with Checkpoints(workdir, keep=keep, keep_every=keep_every) as saved:
        for number in steps:
            saved.save(number, state_of(number), meta)
        saved.wait()


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, meta) -> Path:
    """Checkpoints of step 5 and 10, on eight devices."""
    folder = tmp_path_factory.mktemp("saved") / "workdir"
    save(epath.Path(folder), meta, 5, 10)
    return folder


@pytest.fixture
def workdir(saved_once, tmp_path) -> epath.Path:
    shutil.copytree(saved_once, tmp_path / "workdir")
    return epath.Path(tmp_path / "workdir")


def restored(workdir: epath.Path, meta: Meta, wanted: State | None = None) -> Any:
    with Checkpoints(workdir, keep=5, keep_every=0) as saved:
        return saved.restore(like(wanted or state_of(0)), meta)


def check_equal(state: State, expected: State) -> None:
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


MESHES = {
    "the same": MeshShape(fsdp=(8,)),
    "one device": MeshShape(),
    "of two axes": MeshShape(fsdp=(4, 2)),
    "of each kind": MeshShape(data=2, fsdp=(2,), tensor=2),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_what_was_saved_comes_back_to_the_bit(workdir, meta, mesh):
    wanted = state_of(0, MESHES[mesh])
    found = restored(workdir, meta, wanted)
    assert (found.step, found.meta, found.notes) == (10, meta, ())
    check_equal(found.state, state_of(10))
    for leaf, one in zip(jax.tree.leaves(found.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == one.sharding


def test_a_new_workdir_has_nothing_to_restore(tmp_path, meta):
    assert restored(epath.Path(tmp_path / "new"), meta) is None


def test_the_last_are_kept_and_each_of_some(tmp_path, meta):
    save(epath.Path(tmp_path / "run"), meta, 2, 4, 6, 8, 10, keep=2, keep_every=4)
    names = sorted(os.listdir(tmp_path / "run" / "checkpoints"), key=int)
    assert names == ["4", "8", "10"]


def test_a_step_is_saved_once(tmp_path, meta):
    workdir = epath.Path(tmp_path)
    save(workdir, meta, 3)
    with Checkpoints(workdir, keep=5, keep_every=0) as saved:
        found = saved.restore(like(state_of(0)), meta)
        assert found is not None
        saved.save(3, found.state, meta)  # a run stopped before it did a step
        saved.wait()


def test_its_size(workdir):
    """12 bytes for each parameter that trains, and little more."""
    count = sum(leaf.size for leaf in jax.tree.leaves(state_of(0).trainable))
    files = (file for file in Path(workdir / "checkpoints" / "10").rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    assert 8 * count < size < 12 * count + 2e6
    assert checkpoint.bytes_of(like(state_of(0))) == 12 * count + 4


# --- damaged ---


def data_files(workdir: epath.Path, step: int) -> list[Path]:
    """Largest first: those that hold arrays."""
    found = [f for f in Path(workdir / "checkpoints" / str(step)).rglob("d/*") if f.is_file()]
    return sorted(found, key=lambda file: -file.stat().st_size)


def flip(file: Path, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 4
    file.write_bytes(data)


def item(workdir: epath.Path, name: str) -> Path:
    return Path(workdir / "checkpoints" / "10" / name)


DAMAGE = {
    "a bit in the data": lambda workdir: flip(data_files(workdir, 10)[0], 0.5),
    "a file cut short": lambda workdir: os.truncate(data_files(workdir, 10)[0], 1000),
    "an empty file": lambda workdir: os.truncate(data_files(workdir, 10)[1], 0),
    "no weights": lambda workdir: shutil.rmtree(item(workdir, "trainable")),
    "no optimizer": lambda workdir: shutil.rmtree(item(workdir, "opt")),
    "no meta": lambda workdir: shutil.rmtree(item(workdir, "meta")),
    "meta that is no JSON": lambda workdir: (item(workdir, "meta") / "metadata").write_text("{"),
    "meta that is a list": lambda workdir: (item(workdir, "meta") / "metadata").write_text("[]"),
    "meta without a format": lambda workdir: edit(workdir, llava_jax=None),
    "meta without data": lambda workdir: edit(workdir, data=None),
    "other bits": lambda workdir: edit(workdir, bits={}),
    "Orbax's own JSON": lambda workdir: (item(workdir, "opt") / "_METADATA").write_text("{"),
}


def edit(workdir: epath.Path, **changes: Any) -> None:
    file = item(workdir, "meta") / "metadata"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_put_aside_for_the_one_before(workdir, meta, damage):
    DAMAGE[damage](workdir)
    found = restored(workdir, meta)
    assert found.step == 5
    check_equal(found.state, state_of(5))
    (note,) = found.notes
    assert note.startswith("step 10 is damaged (")
    assert os.listdir(workdir / "damaged") == ["10"]
    assert os.listdir(workdir / "checkpoints") == ["5"]
    assert restored(workdir, meta).notes == ()


def test_when_all_are_damaged_it_says_so(workdir, meta):
    for number in (5, 10):
        flip(data_files(workdir, number)[0], 0.5)
    for _ in range(2):  # nothing was moved, and no run begins anew unasked
        with pytest.raises(ValueError, match=r"(?s)none of the checkpoints can be rest.*step 5 is"):
            restored(workdir, meta)
    assert not (workdir / "damaged").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(110, "connection timed out"),
        PermissionError(13, "permission denied"),
        MemoryError(),
        ValueError("UNAVAILABLE: Error reading 'checkpoints/10' from a bucket"),
    ],
)
def test_what_could_not_be_read_now_stays(workdir, meta, monkeypatch, error):
    def fail(*arguments, **named):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(OSError, match=r"checkpoints/10: could not be read .*command again"):
            restored(workdir, meta)
    assert restored(workdir, meta).step == 10


# --- of another run ---


def test_other_weights_are_refused(workdir, meta):
    other = dataclasses.replace(meta, base=Base("f" * 64, "elsewhere"))
    with pytest.raises(ValueError, match=f"{meta.base.fingerprint[:12]}.*got ffffffffffff… .elsew"):
        restored(workdir, other)
    assert not (workdir / "damaged").exists()


def test_other_data_is_refused(workdir, meta):
    other = dataclasses.replace(meta, data={"seed": 43, "packed": True, "image": "pad"})
    with pytest.raises(ValueError, match=r"on other data") as refused:
        restored(workdir, other)
    assert 'image: "pad" here, nothing there' in str(refused.value)
    assert "seed: 43 here, 42 there" in str(refused.value)
    assert "packed" not in str(refused.value)


def test_another_architecture_is_refused(workdir, meta):
    vision = dataclasses.replace(CONFIG.vision, select_layers=(-1,))
    about = dataclasses.replace(meta.about, config=dataclasses.replace(CONFIG, vision=vision))
    with pytest.raises(ValueError, match="is of another architecture"):
        restored(workdir, dataclasses.replace(meta, about=about))


def test_another_format_is_refused(workdir, meta):
    edit(workdir, llava_jax=9)
    with pytest.raises(ValueError, match="got format 9, expected 1; go on with the version"):
        restored(workdir, meta)
    assert not (workdir / "damaged").exists()


# --- a save that fails ---


def test_a_save_that_fails_is_told_by_the_next_step(workdir, meta):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(workdir, keep=5, keep_every=0) as saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as a disk that is full
        try:
            saved.save(15, state_of(15), meta)
            with pytest.raises(OSError, match="the checkpoint of step 15 was not written: "):
                saved.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert restored(workdir, meta).step == 10
    with Checkpoints(workdir, keep=5, keep_every=0) as saved:
        saved.save(20, state_of(20), meta)  # waits until what the failed save left is removed
    assert sorted(os.listdir(workdir / "checkpoints")) == ["10", "20", "5"]


def test_what_ended_a_run_is_told_with_the_save_that_failed(workdir, monkeypatch):
    close = ocp.CheckpointManager.close

    def fail(manager):
        close(manager)
        raise RuntimeError("the disk went away")

    monkeypatch.setattr(ocp.CheckpointManager, "close", fail)
    with (
        pytest.raises(ValueError, match="not finite") as told,
        Checkpoints(workdir, keep=5, keep_every=0),
    ):
        raise ValueError("not finite")
    (note,) = told.value.__notes__
    assert "was not written: the disk went away" in note
    with (
        pytest.raises(OSError, match="was not written: the disk went away"),
        Checkpoints(workdir, keep=5, keep_every=0),
    ):
        pass


# --- as a model ---


@pytest.mark.parametrize("number", [None, 5])
def test_the_trained_leaves_stand_over_the_base(workdir, meta, number):
    stored = checkpoint.read_model(workdir, step=number)
    assert stored.about == meta.about
    base, trained = random_model(), random_model(seed=number or 10)
    for path in stored_shapes(CONFIG):
        expected = (base if path.startswith("vision/") else trained).leaves[path].read()
        np.testing.assert_array_equal(stored.leaves[path].read(), expected)
    assert "vision/post_norm/bias" not in stored.own
    assert "language/decoder/layers/1/down/kernel" in stored.own


def test_it_becomes_a_model_folder(workdir, tmp_path):
    model_folder.save(checkpoint.read_model(workdir), epath.Path(tmp_path / "model"))
    params = params_in_memory(CONFIG, model_folder.read(epath.Path(tmp_path / "model")).leaves)
    expected = params_in_memory(CONFIG, random_model(seed=10).leaves)
    jax.tree.map(np.testing.assert_array_equal, params["language"], expected["language"])


def test_the_public_doors_take_a_workdir(workdir, meta, tmp_path):
    stored = api.open_stored(workdir)
    assert stored.base == meta.base
    assert stored.notes[0].startswith("step 10 of")
    earlier = api.open_stored(workdir / "checkpoints" / "5")
    table = earlier.leaves["language/embed/table"].read()
    np.testing.assert_array_equal(table, random_model(seed=5).leaves["language/embed/table"].read())
    exporting.export(stored, epath.Path(tmp_path / "original"), "original")
    again = api.open_stored(epath.Path(tmp_path / "original"))
    path = "language/decoder/layers/0/o/kernel"
    np.testing.assert_array_equal(again.leaves[path].read(), stored.leaves[path].read())


def test_what_is_missing_is_said(workdir, tmp_path):
    with pytest.raises(ValueError, match=r"got step 7, expected one of \[5, 10\]"):
        checkpoint.read_model(workdir, step=7)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        checkpoint.read_model(epath.Path(tmp_path))
    other = dataclasses.replace(random_model(seed=9))
    model_folder.save(other, epath.Path(tmp_path / "other"))
    with pytest.raises(ValueError, match="was made for weights of fingerprint"):
        checkpoint.read_model(workdir, epath.Path(tmp_path / "other"))
