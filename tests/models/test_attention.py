"""Attention: every backend that runs here is the same function, isolates segments, is causal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.attention import _tile, attention, cached_attention

RUN_HERE = ("xla", "splash_interpret")


def draw(T, *, N=2, K=1, H=64, B=2, seed=0):
    """Random q, k, v and a cotangent."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def packed(T, *bounds):
    """Segment ids of one row: segment i ends at bounds[i], padding (0) behind the last."""
    segment_T = np.zeros(T, np.int32)
    for number, (start, stop) in enumerate(zip((0, *bounds), bounds, strict=False), 1):
        segment_T[start:stop] = number
    return segment_T


def by_hand(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal):
    """The definition, one query at a time, in f64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        visible = segment_BT[b] == segment_BT[b, t]
        if causal:
            visible &= np.arange(k.shape[1]) <= t
        logits = k[b, visible, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights / weights.sum() @ v[b, visible, n // group]
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_xla_is_the_definition(causal):
    q, k, v, _ = draw(24, N=4, K=2, H=16)
    segment_BT = np.stack([packed(24, 9, 20), packed(24, 24)])
    got = attention(q, k, v, jnp.asarray(segment_BT), causal=causal)
    want = by_hand(q, k, v, segment_BT, causal)
    # Measured worst 3.6e-7: one f32 rounding of sums of a few terms.
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "causal", "bounds"),
    [
        (256, 4, 2, 64, True, ((100, 256), (30, 31, 200))),  # GQA, a segment of one token, padding
        (128, 2, 2, 128, True, ((128,), (64, 128))),
        (200, 2, 1, 64, True, ((77, 190), (200,))),  # not a multiple of a tile
        (145, 2, 2, 64, False, None),  # the vision tower's kind: everything sees everything
        (256, 2, 2, 64, False, None),
        (200, 2, 2, 128, True, None),  # one segment a row
    ],
)
def test_splash_equals_xla_forward_and_backward(T, N, K, H, causal, bounds):
    q, k, v, cotangent = draw(T, N=N, K=K, H=H)
    segment_BT = None if bounds is None else jnp.asarray([packed(T, *b) for b in bounds])

    def run(backend):
        def forward(q, k, v):
            return attention(q, k, v, segment_BT, causal=causal, backend=backend, block=128)

        return jax.jit(lambda *inputs: jax.vjp(forward, *inputs)[1](cotangent))(q, k, v), forward(
            q, k, v
        )

    (gradients, out), (want_gradients, want) = run("splash_interpret"), run("xla")
    # Measured worst 2.1e-6 forward, 5.2e-6 backward: blockwise softmax sums in another order.
    np.testing.assert_allclose(out, want, atol=1e-5)
    for got, expected in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-5)


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize("causal", [True, False])
def test_a_segment_never_feels_another(backend, causal):
    T = 160
    q, k, v, cotangent = draw(T, N=2, K=1)
    segment_BT = jnp.asarray([packed(T, 50, 110, 150), packed(T, 110, 160)])
    mine_BT = segment_BT == 2

    def forward(q, k, v):
        return attention(q, k, v, segment_BT, causal=causal, backend=backend, block=128)

    @jax.jit
    def out_and_gradients(q, k, v):
        out, pullback = jax.vjp(forward, q, k, v)
        return out, pullback(cotangent * mine_BT[:, :, None, None])

    out, gradients = out_and_gradients(q, k, v)
    # Everything outside segment 2 becomes something else, and much larger.
    noise = draw(T, N=2, K=1, seed=1)[:3]
    other = [
        jnp.where(mine_BT[:, :, None, None], x, 100 * y)
        for x, y in zip((q, k, v), noise, strict=True)
    ]
    out_other, gradients_other = out_and_gradients(*other)
    np.testing.assert_array_equal(out[mine_BT], out_other[mine_BT])
    assert not np.array_equal(out[~mine_BT], out_other[~mine_BT])
    for gradient, gradient_other in zip(gradients, gradients_other, strict=True):
        np.testing.assert_array_equal(gradient[mine_BT], gradient_other[mine_BT])
        assert not np.any(gradient[~mine_BT])  # segment 2's outputs depend on nothing else
        assert np.any(gradient[mine_BT])


@pytest.mark.parametrize("backend", RUN_HERE)
def test_no_token_feels_a_later_one(backend):
    T, t = 160, 70
    q, k, v, _ = draw(T)

    def outputs_until_t(k, v):
        out = attention(q, k, v, causal=True, backend=backend, block=128)
        return jnp.sum(jnp.square(out[:, : t + 1]))

    for gradient in jax.jit(jax.grad(outputs_until_t, (0, 1)))(k, v):
        assert not np.any(gradient[:, t + 1 :])
        assert np.all(np.any(gradient[:, : t + 1], axis=(0, 2, 3)))


def test_cached_attention_sees_its_row_up_to_its_slot():
    q, k, v, _ = draw(12, N=4, K=2, H=16)
    want = attention(q, k, v, causal=True)
    stale = jnp.full((2, 4, 2, 16), 1e4)  # what an earlier request left behind
    k, v = jnp.concatenate([k, stale], axis=1), jnp.concatenate([v, stale], axis=1)
    slot_BT = jnp.asarray([[3, 4], [10, 11]])
    chunk = jnp.stack([q[0, 3:5], q[1, 10:12]])
    got = cached_attention(chunk, k, v, slot_BT)
    # Measured worst 2.4e-7: a softmax over more slots.
    np.testing.assert_allclose(got, jnp.stack([want[0, 3:5], want[1, 10:12]]), atol=1e-6)


@pytest.mark.parametrize("backend", RUN_HERE)
def test_queries_may_come_scaled(backend):
    q, k, v, _ = draw(160, H=64)
    want = attention(q, k, v, causal=True, backend=backend, block=128)
    got = attention(q / 8, k, v, causal=True, scale=1.0, backend=backend, block=128)
    np.testing.assert_array_equal(got, want)  # 8 is a power of two: no rounding


def test_tiles_pad_least():
    assert _tile(2048, 512) == (512, 2048)
    assert _tile(577, 512) == (128, 640)  # CLIP at 336 pixels: not 1024
    assert _tile(257, 512) == (384, 384)
    assert _tile(100, 512) == (128, 128)
    assert _tile(4096, 1024) == (1024, 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "flash"}, "unknown attention backend 'flash': expected one of"),
        ({"backend": "cudnn"}, "'cudnn' refuses: it needs an NVIDIA GPU.*'cpu'.*float32.*xla"),
        ({"backend": "cudnn", "H": 12}, "multiples of 8 and got 12"),
        ({"N": 3, "K": 2}, "got 3 query heads for 2 key heads"),
        ({"queries": 4}, "got 4 queries for 16 keys"),
    ],
)
def test_refusals(change, message):
    change = dict(change)
    backend, queries = change.pop("backend", "xla"), change.pop("queries", 16)
    q, k, v, _ = draw(16, **change)
    with pytest.raises(ValueError, match=message):
        attention(q[:, :queries], k, v, causal=True, backend=backend)
