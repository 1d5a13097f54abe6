"""A model folder says what it is, notices what was done to it, and loads onto any mesh."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from llava_jax import model_folder
from llava_jax.model_folder import About, Base, StoredModel, Tokens
from llava_jax.models.llama import RopeConfig
from llava_jax.models.llava import Llava, LlavaConfig, released
from llava_jax.models.lora import LoraConfig
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.weights import settings
from llava_jax.weights.assembly import Choices, open_model
from llava_jax.weights.memory import loaded, params_in_memory, stored_shapes
from llava_jax.weights.tensor import in_memory
from tests import tiny

# Three blocks of which two run; head and projector as in tiny.
CONFIG = dataclasses.replace(
    tiny.CONFIG, vision=dataclasses.replace(tiny.CONFIG.vision, num_layers=3)
)


def random_model(config: LlavaConfig = CONFIG, seed: int = 0, dtype="float32") -> StoredModel:
    rng = np.random.default_rng(seed)
    leaves = {
        path: in_memory(rng.standard_normal(shape).astype(dtype), path)
        for path, shape in stored_shapes(config).items()
    }
    return StoredModel(About(config), leaves)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> epath.Path:
    folder = epath.Path(tmp_path_factory.mktemp("saved") / "model")
    model_folder.save(random_model(), folder)
    return folder


def changed(saved: epath.Path, to: Path, edit) -> epath.Path:
    """A copy of the folder with llava.json edited."""
    shutil.copytree(saved, to)
    file = to / "llava.json"
    described = json.loads(file.read_text())
    edit(described)
    file.write_text(json.dumps(described))
    return epath.Path(to)


def test_what_is_saved_is_read(saved):
    stored, expected = model_folder.read(saved), random_model()
    assert stored.about == expected.about
    assert stored.leaves.keys() == expected.leaves.keys()
    for path, tensor in expected.leaves.items():
        np.testing.assert_array_equal(stored.leaves[path].read(), tensor.read())


def test_every_tensor_is_described(saved):
    described = json.loads((saved / "llava.json").read_text())
    assert described["tensors"].keys() == stored_shapes(CONFIG).keys()
    leaves = random_model().leaves
    for path, tensor in described["tensors"].items():
        array = leaves[path].read()
        assert tensor == {
            "dtype": "float32",
            "shape": list(array.shape),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
    assert "vision/layers/2/q/kernel" in described["tensors"]  # never run, and kept


def test_orbax_alone_reads_the_params(saved):
    tree = ocp.StandardCheckpointer().restore(saved / "params")
    expected = random_model().leaves["language/decoder/layers/1/gate/kernel"].read()
    np.testing.assert_array_equal(
        tree["language"]["decoder"]["layers"]["1"]["gate"]["kernel"], expected
    )


def test_the_description_survives_json():
    about = About(
        config=dataclasses.replace(
            CONFIG,
            vision=dataclasses.replace(CONFIG.vision, select_layers=(-2, 1), select="cls_patch"),
            projector=dataclasses.replace(CONFIG.projector, input_size=64),
            language=dataclasses.replace(
                CONFIG.language,
                rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0),
                lora=LoraConfig(rank=2, targets=("q", "o")),
            ),
            row_end=True,
        ),
        template="v0",
        start_end_tokens=True,
        image_mode="crop",
        tower="someone/clip",
        tokens=Tokens(image=7, image_start=8),
    )
    written = json.loads(json.dumps(settings.to_json(about)))
    assert settings.from_json(About, written, "here") == about


@pytest.mark.parametrize("name", ["v1-7b", "v1-13b", "v1.5-7b", "v1.5-13b"])
def test_a_released_architecture_is_recognised(name):
    assert About(released(name)).variant == name
    more_ids = dataclasses.replace(released(name).language, added_vocab=64)
    assert About(dataclasses.replace(released(name), language=more_ids)).variant == name
    assert About(CONFIG).variant is None


def test_the_name_of_the_folder_means_nothing(saved, tmp_path):
    for name in ("text-only-lora-delta", "llava-v1-13b"):
        shutil.copytree(saved, tmp_path / name)
        stored = model_folder.read(epath.Path(tmp_path / name))
        assert stored.about == model_folder.read(saved).about


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        None,
        MeshShape(fsdp=(8,)),
        MeshShape(data=2, fsdp=(2, 2)),
        MeshShape(fsdp=(4,), tensor=2),
    ],
    ids=["one", "fsdp", "data and torus", "tensor"],
)
def test_it_loads_into_any_shards(saved, shape, dtype):
    layout = None if shape is None else Layout(make_mesh(shape))
    stored = model_folder.read(saved)
    params = params_in_memory(CONFIG, stored.leaves, layout)
    if dtype:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), params
        )
        params = loaded(stored.leaves, like)
    Llava(CONFIG).check(params)
    if layout is not None:
        expected = layout.param_shardings(params)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, expected)
        assert all(jax.tree.leaves(same))
    kernel = params["language"]["decoder"]["layers"]["down"]["kernel"]
    assert kernel.dtype == (dtype or "float32")
    leaves = random_model().leaves
    layers = [leaves[f"language/decoder/layers/{i}/down/kernel"].read() for i in range(2)]
    np.testing.assert_array_equal(kernel, np.stack(layers).astype(kernel.dtype))
    assert params["vision"]["layers"]["q"]["kernel"].shape[0] == 2  # of the 3 that are stored
    head = np.asarray(params["language"]["head"]["kernel"])
    size = CONFIG.language.vocab_size
    np.testing.assert_array_equal(
        head[:, :size], leaves["language/head/kernel"].read().astype(head.dtype)
    )
    assert not head[:, size:].any()


def test_a_shard_reads_its_own_part(saved):
    """What a host would do: of a tensor cut eight ways, an eighth is asked for."""
    asked = []
    leaves = dict(model_folder.read(saved).leaves)
    path = "language/decoder/layers/0/gate/kernel"

    whole = leaves[path]

    def part(index):
        asked.append(index)
        return whole.read_part(index)

    leaves[path] = dataclasses.replace(whole, part=part)
    params_in_memory(CONFIG, leaves, Layout(make_mesh(MeshShape(fsdp=(8,)))))
    rows = leaves[path].shape[0]
    assert sorted(index[0].start for index in asked) == [i * rows // 8 for i in range(8)]
    assert all(index[0].stop - index[0].start == rows // 8 for index in asked)


def test_dtypes_may_differ_from_tensor_to_tensor(tmp_path):
    model = random_model()
    one = "language/decoder/layers/1/q/kernel"
    half = model.leaves[one].read().astype(np.float16)
    mixed = dataclasses.replace(model, leaves={**model.leaves, one: in_memory(half, one)})
    model_folder.save(mixed, epath.Path(tmp_path / "model"))
    stored = model_folder.read(epath.Path(tmp_path / "model"))
    assert stored.leaves[one].dtype == np.float16
    params = params_in_memory(CONFIG, stored.leaves)
    kernel = params["language"]["decoder"]["layers"]["q"]["kernel"]
    assert kernel.dtype == np.float32  # which holds both
    np.testing.assert_array_equal(kernel[1], half.astype(np.float32))


# Thin folders.


def thin_folder(saved: epath.Path, folder: epath.Path, path: str) -> StoredModel:
    other = random_model(seed=1)
    leaves = {p: t for p, t in other.leaves.items() if p.startswith("projector/")}
    own = dataclasses.replace(other, leaves=leaves)
    model_folder.save(own, folder, base=Base(model_folder.fingerprint(saved), path))
    return own


def test_a_thin_folder_stands_on_its_base(saved, tmp_path):
    thin = epath.Path(tmp_path / "thin")
    own = thin_folder(saved, thin, str(saved))
    assert set((json.loads((thin / "llava.json").read_text()))["tensors"]) == set(own.leaves)
    stored = model_folder.read(thin)
    for path, tensor in random_model().leaves.items():
        expected = own.leaves.get(path, tensor)
        np.testing.assert_array_equal(stored.leaves[path].read(), expected.read())


def test_a_thin_folder_and_its_base_move_together(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a" / "base")
    thin_folder(saved, epath.Path(tmp_path / "a" / "thin"), "../base")
    (tmp_path / "a").rename(tmp_path / "b")
    stored = model_folder.read(epath.Path(tmp_path / "b" / "thin"))
    assert stored.leaves.keys() == stored_shapes(CONFIG).keys()


def test_a_base_that_moved_away_can_be_named(saved, tmp_path):
    thin = epath.Path(tmp_path / "thin")
    thin_folder(saved, thin, "nowhere")
    with pytest.raises(ValueError, match=r"are not at .*nowhere: name their folder"):
        model_folder.read(thin)
    assert model_folder.read(thin, saved).leaves.keys() == stored_shapes(CONFIG).keys()


def test_a_whole_model_takes_no_base(saved, tmp_path):
    with pytest.raises(ValueError, match="which holds a whole model: leave it out"):
        model_folder.read(saved, saved)
    with pytest.raises(ValueError, match="got 2 bases for a model folder"):
        open_model(saved, [saved, saved])


def test_the_template_can_be_told(saved):
    assert open_model(saved, choices=Choices(template="v0")).about.template == "v0"


def test_another_base_is_refused(saved, tmp_path):
    other, thin = (epath.Path(tmp_path / name) for name in ("other", "thin"))
    model_folder.save(random_model(seed=2), other)
    thin_folder(saved, thin, str(saved))
    with pytest.raises(ValueError, match="was made for weights of fingerprint"):
        model_folder.read(thin, other)


# What is wrong is named.


def test_a_model_that_is_not_whole_is_not_written(tmp_path):
    model = random_model()
    leaves = dict(model.leaves)
    del leaves["projector/linear_0/bias"]
    leaves["projector/linear_1/bias"] = in_memory(np.zeros(3, np.float32), "file: b")
    leaves["projector/linear_9/bias"] = in_memory(np.zeros(3, np.float32), "file: c")
    with pytest.raises(ValueError, match="3 leaves do not fit") as error:
        model_folder.save(dataclasses.replace(model, leaves=leaves), epath.Path(tmp_path / "model"))
    for part in (
        "projector/linear_0/bias: missing, expected shape (64,)",
        "file: b: got shape (3,), expected (64,)",
        "projector/linear_9/bias: not a leaf",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "model").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    model = random_model()
    path = "language/embed/table"
    broken = dataclasses.replace(model.leaves[path], read=fail)
    with pytest.raises(OSError, match="o space left"):
        model_folder.save(
            dataclasses.replace(model, leaves={**model.leaves, path: broken}),
            epath.Path(tmp_path / "model"),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused(saved):
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        model_folder.save(random_model(), saved)


def test_a_folder_without_a_description_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no llava\.json"):
        model_folder.read(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(llava_jax=99), "got format 99, expected"),
        (lambda d: d.update(surprise=1), r"unknown \['surprise'\]"),
        (lambda d: d["config"]["language"].update(num_layers="2"), "'num_layers' is '2'"),
        (lambda d: d["config"]["language"].pop("num_heads"), "'num_heads' is missing"),
        (lambda d: d["config"]["language"].update(num_layers=10**9), "got 1000000000 layers"),
        (lambda d: d.pop("tensors"), "expected 'tensors'"),
        (lambda d: d["tensors"].popitem(), "fingerprint is not that of the tensors"),
        (
            lambda d: d["tensors"]["projector/linear_0/bias"].update(shape=[65]),
            r"got float32 \[64\], expected float32 \[65\]",
        ),
        (
            lambda d: d["config"]["language"].update(num_layers=3),
            "language/decoder/layers/2/q/kernel: missing",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_refused(saved, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        model_folder.read(changed(saved, tmp_path / "model", edit))


def test_a_description_that_is_no_json_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "llava.json").write_text('{"llava_jax": 1, ')
    with pytest.raises(ValueError, match=r"llava\.json is not JSON"):
        model_folder.read(epath.Path(tmp_path / "model"))


def test_params_that_are_gone_or_damaged_are_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone" / "params")
    with pytest.raises(ValueError, match="holds no Orbax checkpoint"):
        model_folder.read(epath.Path(tmp_path / "gone"))
    shutil.copytree(saved, tmp_path / "cut")
    for file in (tmp_path / "cut" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        model_folder.read(epath.Path(tmp_path / "cut"))


def test_a_tensor_whose_bytes_are_gone_is_named(tmp_path):
    model_folder.save(random_model(), epath.Path(tmp_path / "model"))
    stored = model_folder.read(epath.Path(tmp_path / "model"))
    data = max((tmp_path / "model" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"params: .*: cannot be read"):
        for tensor in stored.leaves.values():
            tensor.read()
