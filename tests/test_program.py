"""The programs of a run, from its config: the same training however the machine is used."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from etils import epath

from llava_jax import checkpoint, config, optim, program, starting
from llava_jax.batch import Batch
from llava_jax.config import STAGE_1, Config
from llava_jax.data.dataset import open_dataset
from llava_jax.data.rows import empty_row, read_row
from llava_jax.data.schedule import schedule
from llava_jax.models import llava
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.program import Program
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.weights import memory
from tests import training

STEPS, ROWS = 10, 8


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    return training.write(tmp_path_factory.mktemp("program"), epochs=4, tokens=160)


class Run:
    """A run of the small config with some of its fields changed, on the first devices."""

    def __init__(self, file: str, devices: int, rows: int = ROWS, **changes: Any):
        self.config = config.load(file, {name.replace("__", "."): v for name, v in changes.items()})
        layout = program.layout_of(self.config.compute, jax.devices()[:devices])
        start = starting.open_start(self.config, epath.Path(file).parent / "run")
        self.program = program.program(
            self.config, start.about.config, layout, steps=STEPS, rows=rows
        )
        load = functools.partial(memory.loaded, start.leaves)
        self.state = self.program.init(load(self.program.like.trainable))
        self.frozen, self._rows = load(self.program.frozen_like), rows

    def __call__(self, batch: Batch) -> tuple[float, ...]:
        placed = self.program.layout.placed(batch, range(self._rows), self._rows)
        key = jax.random.key(1)
        self.state, metrics = self.program.step(self.state, self.frozen, placed, key)
        return float(metrics.loss), float(metrics.norm), *metrics.loss_S.tolist()


def steps_of(file: str) -> list[list[np.ndarray]]:
    """The examples of each row, of the first steps."""
    dataset = open_dataset(config.load(file))
    steps = schedule(dataset, multiple=ROWS)
    return [[steps.examples(n, place) for place in range(ROWS)] for n in range(STEPS)]


def batch_of(settings: Config, rows: list[Any], count: int = ROWS) -> Batch:
    dataset = open_dataset(settings)
    arrays = [read_row(dataset, row).arrays for row in rows]
    arrays += [empty_row(dataset)] * (count - len(arrays))
    return Batch._make(np.stack(column) for column in zip(*arrays, strict=True))


@pytest.fixture(scope="module")
def batches(file) -> list[Batch]:
    settings = config.load(file)
    return [batch_of(settings, rows) for rows in steps_of(file)]


@pytest.fixture(scope="module")
def whole(file, batches) -> list[tuple[float, ...]]:
    run = Run(file, 1, compute__remat="none")
    return [run(batch) for batch in batches]


# One thing after another is cut, some at once: each must leave the training as it is.
CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "8 devices": (8, {}),
    "8 devices, gspmd": (8, {"compute__gather": "gspmd", "compute__remat": "all"}),
    "data 4, tensor 2": (
        8,
        {
            "compute__data": "4",
            "compute__fsdp": "1",
            "compute__tensor": "2",
            "compute__remat": "attention_gate",
        },
    ),
    "2 of each, 2 parts": (
        8,
        {
            "compute__data": "2",
            "compute__fsdp": "2",
            "compute__tensor": "2",
            "compute__parts": "2",
            "compute__gather": "gspmd",
            "compute__remat": "residual",
        },
    ),
    "2 of each, explicit": (
        8,
        {
            "compute__data": "2",
            "compute__fsdp": "2",
            "compute__tensor": "2",
            "compute__remat": "gate",
        },
    ),
    "fsdp 4 and 2, by axis, pieces": (
        8,
        {
            "compute__fsdp": "4,2",
            "compute__gather": "explicit by axis",
            "compute__loss_pieces": "4",
            "compute__remat": "attention_residual",
        },
    ),
    "2 parts": (1, {"compute__parts": "2", "compute__remat": "value"}),
    "4 parts, unrolled": (
        1,
        {"compute__parts": "4", "compute__scan": "False", "compute__remat": "attention"},
    ),
}


def test_every_remat_policy_is_tried():
    tried = {changes.get("compute__remat", "full") for _, changes in CUTS.values()}
    assert {*tried, "none"} == {*REMAT_POLICIES}


def apart(told: Any, expected: Any) -> float:
    """The largest relative difference; a source without tokens in a step has a loss of 0."""
    told, expected = np.asarray(told), np.asarray(expected)
    return np.max(np.abs(told - expected) / np.where(expected == 0, 1, expected))


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_changes_no_loss(file, batches, whole, cut):
    devices, changes = CUTS[cut]
    run = Run(file, devices, **changes)
    told = [run(batch) for batch in batches]
    print(f"{cut}: {apart(told, whole):.1e}")
    np.testing.assert_allclose(told, whole, rtol=1e-5)


def test_packed_or_a_conversation_a_row(file, whole):
    rows = 32
    run = Run(file, 1, rows)
    told = []
    for packed in steps_of(file):
        examples = [[example] for row in packed for example in row]
        assert len(examples) <= rows
        told.append(run(batch_of(run.config, examples, rows)))
    print(f"unpacked: {apart(told, whole):.1e}")
    np.testing.assert_allclose(told, whole, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_mean_of_groups_means(file, batches, devices):
    """loss_groups: each so many rows count alike, however much they have to learn from."""
    run = Run(file, devices, batch__loss_groups="4")
    alone = Run(file, 1, compute__gather="gspmd")  # its model is called outside of a program
    params = optim.join(alone.state.trainable, alone.frozen)
    loss_RT = np.asarray(jax.jit(alone.program.model.token_losses)(params, batches[0]), np.float64)
    weight_RT = batches[0].loss_weight_RT
    means = [
        np.sum(loss_RT[rows] * weight_RT[rows]) / np.sum(weight_RT[rows])
        for rows in np.split(np.arange(ROWS), 4)
    ]
    total = np.sum(loss_RT * weight_RT) / np.sum(weight_RT)
    assert abs(np.mean(means) / total - 1) > 1e-5  # else it would prove nothing
    np.testing.assert_allclose(run(batches[0])[0], np.mean(means), rtol=1e-6)


# --- on a TPU ---


class Chip(NamedTuple):
    coords: tuple[int, ...]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


@pytest.mark.parametrize(
    ("grid", "slices", "expected"),
    [
        ((4, 2, 1), 1, MeshShape(1, (4, 2))),
        ((2, 4), 1, MeshShape(1, (4, 2))),
        ((4, 4, 4), 1, MeshShape(1, (4, 4, 4))),
        ((2, 2, 1), 3, MeshShape(3, (2, 2))),
        ((1, 1, 1), 1, MeshShape(1, (1,))),
    ],
)
def test_the_torus_is_seen(grid, slices, expected):
    chips: list[Any] = [
        Chip(place, number) for number in range(slices) for place in np.ndindex(grid)
    ]
    assert program.torus_of(chips) == expected
    assert len(chips) == 1 or program.torus_of(chips[1:]) is None
    two_cores = [chip for chip in chips for _ in range(2)]
    assert program.torus_of(two_cores) is None
    assert program.torus_of(jax.devices()) is None


def test_how_weights_are_gathered():
    compute, v5e = config.Compute(), Chip((0, 0, 0))
    assert program.gather_of(compute, v5e) == "explicit by axis"
    assert program.gather_of(compute, v5e._replace(device_kind="TPU v5")) == "explicit"
    assert program.gather_of(dataclasses.replace(compute, gather="gspmd"), v5e) == "gspmd"


def test_which_chips_use_weights_as_they_lie():
    v5e = Chip((0, 0, 0))
    v6e = v5e._replace(device_kind="TPU v6 lite")
    assert program.uses_row_major([v5e])  # there is nothing to gather
    assert not program.uses_row_major([v5e, v5e])
    assert program.uses_row_major([v6e, v6e])
    assert not program.uses_row_major(jax.devices()[:1])


def test_what_the_compiler_is_told():
    compute, chip = config.Compute(), Chip((0, 0, 0))
    assert program.compiler_options(compute, chip) == {"xla_tpu_scoped_vmem_limit_kib": "49152"}
    assert program.compiler_options(compute, jax.devices()[0]) == {}
    v5p = program.compiler_options(compute, chip._replace(device_kind="TPU v5"))
    assert v5p["xla_tpu_enable_sparse_core_collective_offload_all_gather"] == "true"
    own = dataclasses.replace(compute, compiler="a=1,b=x y")
    assert program.compiler_options(own, chip) == {"a": "1", "b": "x y"}
    assert program.compiler_options(dataclasses.replace(compute, compiler=""), chip) == {}
    with pytest.raises(ValueError, match=r"config\.compute\.compiler = 'fast', expected 'auto'"):
        program.compiler_options(dataclasses.replace(compute, compiler="fast"), chip)


# --- what is frozen costs nothing ---


@pytest.mark.parametrize("name", ["v1-13b", "v1.5-13b"])
def test_stage_1_of_13b_keeps_moments_of_the_projector_alone(name):
    """By shapes: its optimizer's state, and the size of a checkpoint."""
    architecture = llava.released(name)
    made = programs_of(architecture, STAGE_1)
    projector = 1024 * 5120 + 5120 + (5120 * 5120 + 5120 if name == "v1.5-13b" else 0)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(made.like.opt)
    ]
    assert all("/projector/" in path or path.endswith("count") for path in paths), paths
    moments = sum(leaf.size for leaf in jax.tree.leaves(made.like.opt) if leaf.ndim)
    assert moments == 2 * projector
    assert checkpoint.bytes_of(made.like) == 12 * projector + 4
    assert sum(leaf.size for leaf in jax.tree.leaves(made.frozen_like)) > 13e9


def programs_of(architecture: Any, trains: tuple[str, ...]) -> Program:
    settings = Config(optim=dataclasses.replace(Config().optim, trains=trains))
    layout = Layout(make_mesh(MeshShape(), jax.devices()[:1]))
    return program.program(settings, architecture, layout, steps=10, rows=1)


def test_the_compiled_step_has_no_gradient_of_what_is_frozen(file, batches):
    """No product of two matrices has the shape of a frozen one; of what trains, each has its."""
    one: Any = {"compute__remat": "none", "compute__scan": "False", "epochs": "4"}
    products = {
        stage: products_of(Run(file, 1, **one, optim__trains=trains), batches[0])
        for stage, trains in (("1", "projector/.*,"), ("2", "projector/.*,language/.*"))
    }
    language = training.ARCHITECTURE.language
    frozen = {
        (language.hidden_size, language.intermediate_size),
        (language.hidden_size, 640),  # the head, its vocabulary padded
    }
    for shape in frozen:
        assert products["1"].isdisjoint({shape, shape[::-1]}), shape
        assert not products["2"].isdisjoint({shape, shape[::-1]}), shape
    width = training.ARCHITECTURE.vision.hidden_size
    projector = {(width, language.hidden_size), (language.hidden_size, width)}
    assert products["1"] & projector
    patch = 3 * training.ARCHITECTURE.vision.patch_size**2
    for stage in products:
        assert products[stage].isdisjoint({(patch, width), (width, patch)})


def products_of(run: Run, batch: Batch) -> set[tuple[int, ...]]:
    """The shapes of all matrix products in the compiled step, dims of 1 left out."""
    placed = run.program.layout.placed(batch, range(ROWS), ROWS)
    step = run.program.step.lower(run.state, run.frozen, placed, jax.random.key(0)).compile()
    lines = re.findall(r"= f32\[([\d,]*)\]\S* (?:dot|convolution|custom-call)\(", step.as_text())
    shapes = (tuple(map(int, filter(None, line.split(",")))) for line in lines)
    return {tuple(size for size in shape if size > 1) for shape in shapes}
