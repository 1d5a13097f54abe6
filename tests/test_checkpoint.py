"""A training run's workdir is a model too: what trained, over the base it names."""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from llava_jax import api, checkpoint, model_folder
from llava_jax.model_folder import About, Base
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.weights import exporting, settings
from llava_jax.weights.memory import params_in_memory, stored_shapes
from tests.test_model_folder import CONFIG, random_model


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> epath.Path:
    """Two checkpoints of a stage 2 on eight devices: projector and language model train."""
    root = epath.Path(tmp_path_factory.mktemp("run"))
    base = random_model()
    model_folder.save(base, root / "base")
    meta = {
        "about": settings.to_json(About(CONFIG, template="v0")),
        "base": settings.to_json(Base(model_folder.fingerprint(root / "base"), "../base")),
    }
    layout = Layout(make_mesh(MeshShape(fsdp=(8,))))
    with ocp.CheckpointManager(
        root / "workdir" / "checkpoints", item_names=("trainable", "opt", "meta")
    ) as manager:
        for step in (5, 10):
            trained = params_in_memory(CONFIG, random_model(seed=step).leaves, layout)
            del trained["vision"]
            manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(trained),
                    opt=ocp.args.StandardSave({"count": np.int32(step)}),
                    meta=ocp.args.JsonSave({"step": step, **meta}),
                ),
            )
    return root / "workdir"


@pytest.mark.parametrize("step", [None, 5])
def test_the_trained_leaves_stand_over_the_base(workdir, step):
    stored = checkpoint.read_model(workdir, step=step)
    assert stored.about == About(CONFIG, template="v0")
    base, trained = random_model(), random_model(seed=step or 10)
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


def test_the_public_doors_take_a_workdir(workdir, tmp_path):
    stored = api.open_stored(workdir)
    assert stored.notes[0].startswith("step 10 of")
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
