"""The planner's account of memory, against what autodiff keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llava_jax import config as configs
from llava_jax.models import stack
from llava_jax.models.llama import Decoder, LlamaConfig
from llava_jax.planner import memory

LANGUAGE = LlamaConfig(
    vocab_size=64, hidden_size=24, intermediate_size=80, num_layers=3, num_heads=6, num_kv_heads=2
)


@pytest.mark.parametrize("remat", [name for name in stack.REMAT_POLICIES if name != "none"])
def test_what_a_policy_keeps_is_what_autodiff_keeps(remat):
    rows, length = 5, 7
    decoder = Decoder(LANGUAGE, stack.Compute(dtype="bfloat16", remat=remat))
    position_BT = jnp.broadcast_to(jnp.arange(length), (rows, length))
    x_BTD = jnp.zeros((rows, length, LANGUAGE.hidden_size), jnp.bfloat16)
    rest = (position_BT, jnp.ones((rows, length), jnp.int32))
    params = jax.eval_shape(decoder.init, jax.random.key(0), x_BTD, *rest)

    def backward(params, x_BTD):
        return jax.vjp(lambda *given: decoder.apply(*given, *rest)[0], params, x_BTD)[1]

    residuals = jax.tree.leaves(jax.eval_shape(backward, params, x_BTD))
    of_layers_and_tokens = [
        leaf
        for leaf in residuals
        if leaf.shape[0] == LANGUAGE.num_layers
        and {rows, length} <= set(leaf.shape)
        and leaf.dtype == jnp.bfloat16  # norms' statistics are f32, and next to nothing
    ]
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in of_layers_and_tokens)
    compute = configs.Compute(dtype="bfloat16", remat=remat)
    assert memory.kept(compute, LANGUAGE, rows * length) == nbytes


def test_no_policy_keeps_no_less():
    def kept(remat: str) -> int:
        return memory.kept(configs.Compute(remat=remat), LANGUAGE, 100)

    assert kept("none") == kept("all") > kept("full") > 0


HELD = memory.Held(weights=1000, moments=2000, language=LANGUAGE, row=10)  # a quarter of it


def test_gradients_are_as_the_step_has_them():
    """bf16 out of the backward pass; summed up over parts in f32 beside it."""
    terms = HELD.terms(configs.Compute(), 2)
    assert terms["gradients"] == 250 * 2
    in_parts = HELD.terms(configs.Compute(parts=2), 2)
    assert in_parts["gradients"] == 250 * (2 + 4)
    assert (terms["weights"], terms["the optimizer's moments"], HELD.lasting) == (1000, 2000, 3000)
    by_remat = "what remat 'full' keeps for the backward pass"
    assert terms[by_remat] == 2 * in_parts[by_remat] == memory.kept(configs.Compute(), LANGUAGE, 20)


def test_leaner_is_what_saves_and_keeps_the_step():
    compute = configs.Compute(remat="gate")
    saved = HELD.leaner(compute, 6)
    # Nothing but divisors of its rows.
    assert set(saved) <= {(remat, parts) for remat in ("gate", "full") for parts in (1, 2, 3, 6)}
    assert ("gate", 1) not in saved
    assert saved["full", 1] == memory.kept(compute, LANGUAGE, 60) - memory.kept(
        configs.Compute(), LANGUAGE, 60
    )
    # A sum of gradients that is larger than what parts save is no saving.
    heavy = dataclasses.replace(HELD, moments=10**9)
    assert set(heavy.leaner(compute, 6)) == {("full", 1)}
