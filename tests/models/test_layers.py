"""Dense, whose other dim may be heads: the same function and gradients as flat."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.layers import Dense
from llava_jax.models.lora import LoraConfig
from llava_jax.models.stack import Compute

ROWS, TOKENS, WIDTH, HEADS, SIZE = 2, 5, 24, 3, 4


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def flat_and_by_head(output_first: bool, **how: Any) -> tuple[Any, Any, Any]:
    """The same product twice, as functions of (params, flat x), and params."""
    features = WIDTH if output_first else HEADS * SIZE
    inputs = HEADS * SIZE if output_first else WIDTH
    how = {"compute": Compute(), "output_first": output_first, "name": "q", **how}
    flat = Dense(features, **how)
    by_head: Any = Dense(features, heads=HEADS, **how)

    def heads(x):
        return x.reshape(*x.shape[:-1], HEADS, SIZE)

    def seen_by_head(params, x):
        y = by_head.apply({"params": params}, heads(x) if output_first else x)
        return y if output_first else y.reshape(*y.shape[:-2], -1)

    shapes = jax.eval_shape(flat.init, jax.random.key(0), draw(1, 1, inputs))["params"]
    params = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=leaf.ndim + leaf.size), shapes)
    return lambda params, x: flat.apply({"params": params}, x), seen_by_head, params


@pytest.mark.parametrize("output_first", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"use_bias": True}, {"lora": LoraConfig(rank=2)}], ids=["plain", "bias", "LoRA"]
)
def test_heads_change_nothing(output_first, how):
    flat, by_head, params = flat_and_by_head(output_first, **how)
    x = draw(ROWS, TOKENS, HEADS * SIZE if output_first else WIDTH)

    def out_and_gradients(product):
        def loss(params, x):
            y = product(params, x)
            return jnp.sum(y * draw(*y.shape, seed=9)), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, gradients

    for ours, expected in zip(
        jax.tree.leaves(out_and_gradients(by_head)),
        jax.tree.leaves(out_and_gradients(flat)),
        strict=True,
    ):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_kernel_by_head_has_no_gradient():
    _, by_head, params = flat_and_by_head(output_first=False)

    def loss(x):
        return jnp.sum(jnp.square(by_head(params, x)))

    x = draw(ROWS, TOKENS, WIDTH)
    text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    assert text is not None
    assert text.count("dot(") == 2  # forward, and the gradient of x
