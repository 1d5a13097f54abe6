"""A small LLaVA's training step through the real TPU compiler: what must not be in its program."""

import dataclasses
import math
from pathlib import Path

import pytest
from etils import epath

from llava_jax import config as configs
from llava_jax.models.llava import LlavaConfig, released
from llava_jax.planner import plan as plans
from llava_jax.planner import scheduled
from llava_jax.planner.plan import Plan
from llava_jax.planner.scheduled import Scheduled

pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'llava-jax[tpu]'")

SLICE, CHIPS, TOKENS, VOCABULARY = "v5e-4", 4, 1024, 8192


def small() -> LlavaConfig:
    """LLaVA-1.5 in every part, 4 layers of 512 features and heads of 128."""
    full = released("v1.5-7b")
    return LlavaConfig(
        dataclasses.replace(
            full.vision, hidden_size=256, intermediate_size=1024, num_layers=3, num_heads=4
        ),
        dataclasses.replace(full.projector, input_size=256, output_size=512),
        dataclasses.replace(
            full.language,
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1408,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
        ),
    )


def planned_small(slice_name: str, folder: Path, **changes: str) -> tuple[Plan, Scheduled]:
    settings = {
        "batch.tokens": str(TOKENS),
        "data.conversation_tokens": str(TOKENS),
        "batch.images": "1",
        "compute.remat": "attention_residual",
        "compute.compiler": "",  # of its own accord it compiles in half the time
        **changes,
    }
    config = configs.load("configs/stage2.py:v1.5-7b", settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "released", lambda name: small())
        plan, text = plans.plan(config, slice_name, rows_per_chip=2, folder=epath.Path(folder))
    return plan, scheduled.read(text)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> tuple[Plan, Scheduled]:
    return planned_small(SLICE, tmp_path_factory.mktemp("planned"))


@pytest.mark.tpu_compile
def test_a_step_in_parts_compiles_where_axes_are_no_rings(tmp_path):
    """The compiler fails at moving the gradients' sum over chips out of the loop over parts."""
    plan, _ = planned_small("v5p-8", tmp_path, **{"compute.parts": "2"})
    assert 0 < plan.peak_hbm_bytes < plan.hbm_bytes


def test_the_plan_adds_up(planned):
    plan, _ = planned
    assert 0 < plan.peak_hbm_bytes < plan.hbm_bytes
    assert sum(plan.seconds_by_part.values()) == pytest.approx(plan.step_seconds)
    language = small().language
    layer = 4 * language.hidden_size**2 + 3 * language.hidden_size * language.intermediate_size
    layers = 2 * language.num_layers * layer  # bytes of bf16
    table = 2 * VOCABULARY * language.hidden_size
    # Each layer twice, the embedding and the head once; the rest is the tower and the projector.
    gathered = sum(plan.collective_bytes.get(f"all-gather{kind}", 0) for kind in KINDS)
    assert 1.0 <= gathered / (2 * layers + 2 * table) < 1.8
    # Splash forward once a block and layer (its output is kept), dq and dkv in the language model.
    assert sum(plan.kernel_calls.values()) == 3 * language.num_layers + 2


KINDS = ("", ", asynchronous")


def test_the_figures_are_as_they_were(planned):
    """Of jax 0.10.2 and 0.12.0, a step's on each of four chips. The first four follow from shapes;
    the others are the compiler's, which may change a little between versions."""
    plan, _ = planned
    assert plan.weight_bytes == 24_090_624
    assert plan.optimizer_bytes == 44_085_248
    assert plan.model_flops == 243_208_032_256
    assert sum(plan.kernel_flops.values()) == 59_659_780_096
    assert plan.compiled_flops == pytest.approx(260.9e9, rel=0.02)
    assert plan.cycles == pytest.approx(6.68e6, rel=0.1)
    assert plan.peak_hbm_bytes == pytest.approx(161e6, rel=0.1)
    moved = {
        kind: sum(plan.collective_bytes.get(f"{kind}{how}", 0) for how in KINDS)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    expected = {"all-gather": 106.5e6, "reduce-scatter": 59.2e6, "all-reduce": 5.7e6}
    assert moved == pytest.approx(expected, rel=0.05)


def test_no_parameter_lies_whole_on_every_chip(planned):
    """What the step is handed: no array as large as a matrix of the model."""
    plan, program = planned
    entry = program.computations[program.entry].values()
    sizes = [
        math.prod(shape.dims) for each in entry if each.kind == "parameter" for shape in each.shapes
    ]
    assert max(sizes) < plan.parameters / CHIPS
    language = small().language
    matrix = language.num_layers * language.hidden_size * language.intermediate_size
    assert matrix // CHIPS in sizes
    assert matrix not in sizes


def test_whole_logits_never_exist(planned):
    _, program = planned
    largest = max(
        math.prod(shape.dims)
        for computation in program.computations.values()
        for each in computation.values()
        for shape in each.shapes
    )
    assert largest < 2 * TOKENS * VOCABULARY


def test_nothing_is_gathered_by_an_all_reduce(planned):
    """An all-reduce of zeros and one's own part is a gather, at twice the bytes."""
    _, program = planned
    sums = [
        each
        for computation in program.computations.values()
        for each in computation.values()
        if each.kind.startswith("all-reduce")
    ]
    assert sums
    assert not [each.source for each in sums if "all_gather" in each.source]
