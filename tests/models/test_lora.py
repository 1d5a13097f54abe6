"""LoRA: a fresh delta changes nothing, a merged one is the same function, dropout is dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import lora
from llava_jax.models.llava import Llava
from llava_jax.models.lora import LoraConfig
from llava_jax.models.stack import Compute
from tests import tiny

CONFIG = tiny.with_language(lora=LoraConfig(rank=3, alpha=6.0, targets=("q", "o", "up", "down")))


@functools.cache
def jitted(config, scan):
    return jax.jit(Llava(config, Compute(scan=scan)).logits)


def logits(config, params, batch, scan=True):
    return jitted(config, scan)(params, batch)


def factors(params):
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths if "lora" in str(path[-1])}


def test_factors_stand_where_they_are_asked_for():
    params = jax.eval_shape(Llava(CONFIG).init, jax.random.key(0))
    layers = params["language"]["decoder"]["layers"]
    assert len(factors(params)) == len(factors(layers)) == 8
    assert layers["down"]["lora_a"].shape == (2, 128, 3)
    assert layers["down"]["lora_b"].shape == (2, 64, 3)
    assert "lora_a" not in layers["v"]


def test_a_fresh_delta_changes_nothing():
    params = jax.jit(Llava(CONFIG).init)(jax.random.key(0))
    batch = tiny.draw_batch(rows=2)
    want = logits(tiny.CONFIG, lora.merge(CONFIG.language.lora, params), batch)
    np.testing.assert_array_equal(logits(CONFIG, params, batch), want)


def test_fresh_factors_are_drawn_as_peft_draws_them():
    config = tiny.with_language(lora=LoraConfig(rank=16))
    layers = jax.jit(Llava(config).init)(jax.random.key(0))["language"]["decoder"]["layers"]
    for name in lora.TARGETS:
        a_LIR, b_LOR = (np.asarray(layers[name][leaf]) for leaf in ("lora_a", "lora_b"))
        unit = a_LIR * a_LIR.shape[1] ** 0.5
        # Uniform within 1/√inputs; at least 2,048 draws.
        assert 0.99 < np.abs(unit).max() <= 1.0, name
        assert abs(unit.var() - 1 / 3) < 0.03, name
        assert not b_LOR.any()


@pytest.mark.parametrize("scan", [True, False])
def test_merging_keeps_the_function(scan):
    params, batch = tiny.draw_params(CONFIG), tiny.draw_batch(rows=2)
    merged = lora.merge(CONFIG.language.lora, params)
    assert not factors(merged)
    plain = jax.eval_shape(Llava(tiny.CONFIG).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, plain)
    got, want = logits(CONFIG, params, batch, scan), logits(tiny.CONFIG, merged, batch)
    off = dataclasses.replace(CONFIG.language.lora, alpha=0.0)
    without = logits(tiny.CONFIG, lora.merge(off, params), batch)
    scale = np.abs(want).max()
    assert np.abs(got - without).max() > 0.01 * scale  # the deltas matter
    # Measured worst 8.6e-7 of the largest logit: (W + ab)x against Wx + a(bx).
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)


def test_every_delta_of_every_layer_and_row_drops_by_a_key_of_its_own(monkeypatch):
    config = tiny.with_language(lora=dataclasses.replace(CONFIG.language.lora, dropout=0.5))
    # Nothing traced, so that keys are numbers.
    model = Llava(config, Compute(scan=False, remat="none"))
    params, batch = tiny.draw_params(config), tiny.draw_batch(rows=3, images=0)
    x = model.embed(params, batch.token_RT, jnp.zeros((3, 0, 4, 64)), batch.image_index_RT)
    seen = []

    def spy(config, x, a_IR, b_OR, dropout_key_B, precision, delta=lora.delta):
        seen.append(dropout_key_B)
        return delta(config, x, a_IR, b_OR, dropout_key_B, precision)

    monkeypatch.setattr(lora, "delta", spy)
    rows = (batch.position_RT, batch.segment_RT)
    model.decode(params, x, *rows, dropout_key_R=jax.random.split(jax.random.key(0), 3))
    keys = {tuple(row) for key_B in seen for row in np.asarray(jax.random.key_data(key_B))}
    assert len(keys) == 2 * 4 * 3  # layers, targets, rows
    seen.clear()
    without, _ = model.decode(params, x, *rows)
    assert seen == [None] * 8
    plain, _ = Llava(CONFIG, Compute(scan=False)).decode(params, x, *rows)
    np.testing.assert_allclose(without, plain, atol=1e-5)


def test_dropout_follows_its_key_and_keeps_the_mean():
    config = tiny.with_language(lora=dataclasses.replace(CONFIG.language.lora, dropout=0.5))
    model, params = Llava(config), tiny.draw_params(config)
    batch = tiny.draw_batch(rows=1, images=0)
    x = model.embed(params, batch.token_RT, jnp.zeros((1, 0, 4, 64)), batch.image_index_RT)

    @jax.jit
    def decode(key):
        return model.decode(
            params, x, batch.position_RT, batch.segment_RT, dropout_key_R=key[None]
        )[0]

    with_keys = [decode(jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(with_keys[0], with_keys[1])
    assert not np.array_equal(with_keys[0], with_keys[2])
    x_BI, a, b = jnp.ones((2000, 16)), jnp.ones((16, 2)), jnp.ones((4, 2))
    dropped = lora.delta(
        config.language.lora, x_BI[None], a, b, jax.random.split(jax.random.key(0), 1), None
    )
    plain = lora.delta(config.language.lora, x_BI[None], a, b, None, None)
    assert set(np.unique(dropped)) != set(np.unique(plain))
    np.testing.assert_allclose(np.mean(dropped), np.mean(plain), rtol=0.02)


def test_what_is_dropped_is_as_good_as_chance():
    """Counts and correlations over 4,096 × 88 elements and 16 keys, each within five deviations of
    what independent draws have."""
    rate, keys = 0.05, jax.random.split(jax.random.key(3), 16)
    dropped = ~np.asarray(lora.kept(keys, (16, 4096, 88), rate))
    deviation = np.sqrt(rate * (1 - rate))
    about = (dropped - rate) / deviation  # mean 0, variance 1
    for axes in ((), (0,), (1,), (2,)):  # of all, of each key, token, feature
        means = about.mean(tuple({0, 1, 2} - set(axes)))
        assert np.abs(means).max() < 5 / np.sqrt(about.size / means.size), axes

    def correlation(a, b):
        return abs(np.mean(a * b)) * np.sqrt(a.size)

    for step in (1, 2, 3, 64):
        assert correlation(about[:, step:], about[:, :-step]) < 5
        assert correlation(about[..., step:], about[..., :-step]) < 5
    for number in range(1, 16):
        assert correlation(about[0], about[number]) < 5


def test_a_row_drops_the_same_beside_others():
    keys = jax.random.split(jax.random.key(3), 4)
    together = lora.kept(keys, (4, 7, 24), 0.5)
    np.testing.assert_array_equal(together[2:3], lora.kept(keys[2:3], (1, 7, 24), 0.5))


def test_refusals():
    with pytest.raises(ValueError, match=r"unknown LoRA targets \['lm_head'\]: expected names"):
        LoraConfig(rank=8, targets=("q", "lm_head"))
    with pytest.raises(ValueError, match=r"dropout 1\.0"):
        LoraConfig(rank=8, dropout=1.0)
