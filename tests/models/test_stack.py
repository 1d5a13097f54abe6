"""Scanned or unrolled, and whatever is recomputed: the same logits and gradients."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from llava_jax.models import stack
from llava_jax.models.llava import Llava
from llava_jax.models.stack import Compute
from tests import tiny
from tests.models import torch_weights

BATCH = tiny.draw_batch(rows=2)


@functools.cache  # the reference is one of the cases
def logits_and_gradients(compute: Compute) -> tuple[Any, Any]:
    model = Llava(tiny.CONFIG, compute)

    def loss(params):
        logits = model.logits(params, BATCH)
        # Its own weight for every logit, so that none can stand in for another.
        weights = np.random.default_rng(7).standard_normal(logits.shape, np.float32)
        real = (BATCH.segment_RT > 0)[..., None]
        return (logits * weights * real).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(tiny.draw_params())
    return logits, gradients


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """Nothing scanned, nothing recomputed."""
    return logits_and_gradients(Compute(remat="none", scan=False))


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("remat", stack.REMAT_POLICIES)
def test_policies_change_nothing(reference, remat: str, scan: bool):
    logits, gradients = logits_and_gradients(Compute(remat=remat, scan=scan))
    # Measured worst, of logits and gradients, 7.4e-7: XLA fuses each program in its own way.
    assert torch_weights.apart(logits, reference[0]) < 5e-6
    for (path, ours), expected in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(reference[1]), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name == "vision/layers/k/bias":
            # Without rotation it adds the same to a query's every logit, and a softmax does not
            # see that: this gradient is zero but for rounding.
            assert max(np.abs(ours).max(), np.abs(expected).max()) < 1e-5
        else:
            assert np.abs(expected).max() > 1e-2, name
            assert torch_weights.apart(ours, expected) < 5e-6, name


def test_each_policy_recomputes_less_than_the_one_before():
    """By FLOPs of the gradient's matmuls, at LLaMA's proportions; 'none' is autodiff's choice."""
    config = tiny.with_language(intermediate_size=172, num_kv_heads=4)

    def matmul_flops(remat: str) -> int:
        model = Llava(config, Compute(remat=remat, scan=False))
        params = tiny.draw_params(config)  # of which the tower's stay, as in both stages

        def loss(language):
            return model.logits({**params, "language": language}, BATCH).sum()

        program = jax.make_jaxpr(jax.grad(loss))(params["language"]).jaxpr
        total = 0
        for equation in equations(program):
            if equation.primitive.name == "dot_general":
                contracted = equation.params["dimension_numbers"][0][0]
                shape = equation.invars[0].aval.shape
                sizes = [*equation.outvars[0].aval.shape, *(shape[dim] for dim in contracted)]
                total += 2 * math.prod(sizes)
        return total

    names = [name for name, kept in stack.REMAT_POLICIES.items() if kept is not None]
    flops = [matmul_flops(name) for name in names]
    assert len(set(flops)) == len(names)
    assert flops == sorted(flops, reverse=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float16"}, "got compute dtype 'float16': expected 'float32' or 'bfloat16'"),
        ({"attention": "flash"}, "unknown attention backend 'flash': expected one of .*'splash'"),
        ({"remat": "some"}, "unknown remat policy 'some': expected one of .*'attention'"),
        ({"attention_block": 64}, "got attention_block 64: expected a multiple of 128"),
        ({"attention_block": 192}, "got attention_block 192: expected a multiple of 128"),
    ],
    ids=str,
)
def test_impossible_computes_are_refused(change: dict, says: str):
    with pytest.raises(ValueError, match=says):
        Compute(**change)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_parameters_of_another_depth_are_refused(scan: bool):
    params = tiny.draw_params(tiny.with_language(num_layers=3))
    with pytest.raises(ValueError, match=r"got parameters of \[3\] blocks: expected 2"):
        jax.eval_shape(Llava(tiny.CONFIG, Compute(scan=scan)).logits, params, BATCH)


def equations(jaxpr) -> Any:
    """All equations of a program, those of its scans and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


def test_norms_softmax_and_angles_are_f32_in_bf16_compute():
    model = Llava(tiny.CONFIG, Compute(dtype="bfloat16"))
    program = jax.make_jaxpr(model.logits)(tiny.draw_params(), BATCH).jaxpr
    found = {}
    for equation in equations(program):
        name = equation.primitive.name
        if name in ("rsqrt", "exp", "cos", "sin"):
            found.setdefault(name, set()).add(str(equation.invars[0].aval.dtype))
    assert found == {name: {"float32"} for name in ("rsqrt", "exp", "cos", "sin")}


def test_f32_compute_multiplies_in_f32_on_a_tpu_too():
    program = jax.make_jaxpr(Llava(tiny.CONFIG).logits)(tiny.draw_params(), BATCH).jaxpr
    precisions = {
        str(equation.params["precision"])
        for equation in equations(program)
        if equation.primitive.name == "dot_general"
    }
    assert precisions == {"(Precision.HIGHEST, Precision.HIGHEST)"}
