"""Decoding with a cache is the uncached forward, whatever the chunks and the rows' lengths."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.llava import Llava
from llava_jax.models.stack import Compute
from llava_jax.sharding import Layout, MeshShape, make_mesh
from tests import tiny

SLOTS = 32


class Jitted:
    """A model with its functions compiled once for all tests."""

    def __init__(self, scan: bool):
        model = Llava(tiny.CONFIG, Compute(scan=scan))
        self.decode, self.embed = jax.jit(model.decode), jax.jit(model.embed)
        self.encode_images, self.empty_cache = jax.jit(model.encode_images), model.empty_cache


@pytest.fixture(scope="module")
def scanned():
    return Jitted(scan=True)


@pytest.fixture(scope="module")
def unrolled():
    return Jitted(scan=False)


@pytest.fixture(scope="module")
def params():
    return tiny.draw_params()


@pytest.fixture(scope="module")
def rows():
    """Three rows of one conversation each, of 17, 24 and 9 tokens, an image at their front."""
    batch = tiny.draw_batch(rows=3, tokens=26, images=1)
    lengths = np.array([17, 24, 9])
    one = np.where(np.arange(26)[None] < lengths[:, None], 1, 0).astype(np.int32)
    position = np.broadcast_to(np.arange(26, dtype=np.int32), (3, 26))
    return batch._replace(segment_RT=one, position_RT=position), lengths


def embeddings(model, params, batch):
    features = model.encode_images(params, batch.pixel_RKHW3)
    return model.embed(params, batch.token_RT, features, batch.image_index_RT)


@pytest.mark.parametrize("stack", ["scanned", "unrolled"])
@pytest.mark.parametrize("chunks", [(1,) * 24, (24,), (7, 1, 1, 15)], ids=str)
def test_chunks_equal_the_whole(stack, params, rows, chunks, request):
    model = request.getfixturevalue(stack)
    batch, lengths = rows
    x_RTD = embeddings(model, params, batch)
    want, none = model.decode(params, x_RTD, batch.position_RT, batch.segment_RT)
    assert none is None

    cache = model.empty_cache(3, SLOTS)
    # A row that has had its tokens sends padding until the longest is done.
    start, got = 0, np.zeros(want.shape, np.float32)
    for size in chunks:
        at = slice(start, start + size)
        hidden, cache = model.decode(
            params, x_RTD[:, at], batch.position_RT[:, at], batch.segment_RT[:, at], cache
        )
        got[:, at], start = hidden, start + size
    np.testing.assert_array_equal(cache.length_B, lengths)
    real = batch.segment_RT > 0
    # Measured worst 2.4e-6 (values up to 3): sums over 32 slots instead of 26 tokens.
    np.testing.assert_allclose(got[real], np.asarray(want)[real], atol=1e-5)


def test_rows_at_different_lengths_go_on_together(scanned, params, rows):
    """Prefill rows of 17, 24 and 9 tokens at once, then one more token each: as if alone."""
    model = scanned
    batch, lengths = rows
    x_RTD = embeddings(model, params, batch)
    cache = model.empty_cache(3, SLOTS)
    _, cache = model.decode(params, x_RTD, batch.position_RT, batch.segment_RT, cache)
    next_token = jnp.asarray([[5], [300], [17]], jnp.int32)  # 300: an added id
    no_image = jnp.full((3, 1), -1, jnp.int32)
    features = jnp.zeros((3, 0, 4, 64))
    step = model.embed(params, next_token, features, no_image)
    ones = jnp.ones((3, 1), jnp.int32)
    got, cache = model.decode(params, step, jnp.asarray(lengths)[:, None], ones, cache)
    np.testing.assert_array_equal(cache.length_B, lengths + 1)
    for row, length in enumerate(lengths):
        alone = jnp.concatenate([x_RTD[row, :length], step[row]])[None]
        position = jnp.arange(length + 1)[None]
        want, _ = model.decode(params, alone, position, jnp.ones_like(position))
        # Measured worst 1.5e-6, for the same reason.
        np.testing.assert_allclose(got[row, 0], want[0, -1], atol=1e-5)


@pytest.mark.parametrize("explicit", [False, True], ids=["gspmd", "explicit"])
def test_a_mesh_changes_nothing(scanned, params, explicit):
    """A prefill and one more token, rows and heads cut over the mesh."""
    layout = Layout(make_mesh(MeshShape(fsdp=(2, 2), tensor=2)), explicit)
    model = Llava(tiny.CONFIG, placement=layout.placement("float32"))
    batch = tiny.draw_batch(rows=4, tokens=26, images=1)
    x_RTD = embeddings(scanned, params, batch)

    def program(params, x_RTD, position_RT, segment_RT, cache):
        return model.decode(params, x_RTD, position_RT, segment_RT, cache)

    chunk = (x_RTD, batch.position_RT, np.sign(batch.segment_RT))
    cache = scanned.empty_cache(4, SLOTS)
    cache_shardings = layout.cache_shardings(cache)
    ins = (layout.param_shardings(params), *layout.batch_shardings(chunk), cache_shardings)
    outs = (ins[1], cache_shardings)
    decode = jax.jit(layout.program(program, ins, outs), in_shardings=ins, out_shardings=outs)
    mesh_cache = jax.jit(
        functools.partial(model.empty_cache, 4, SLOTS), out_shardings=cache_shardings
    )()
    assert mesh_cache.k_LBSKH.addressable_shards[0].data.shape == (2, 1, SLOTS, 1, 16)
    one = (x_RTD[:, :1], np.full((4, 1), 24, np.int32), np.ones((4, 1), np.int32))
    for piece in (chunk, one):
        want, cache = scanned.decode(params, *piece, cache)
        got, mesh_cache = decode(params, *piece, mesh_cache)
        np.testing.assert_allclose(got, want, atol=1e-5)
    # A row's keys and values stay where the row is.
    text = decode.lower(params, *one, mesh_cache).compile().as_text()
    assert text is not None
    assert "all-reduce" in text or "all-gather" in text  # weights do travel
    assert not re.search(r"f32\[4,1,\d,16\]\S* all-gather", text)


def test_padding_and_what_does_not_fit_never_overwrite_a_slot(scanned, params, rows):
    model = scanned
    batch, lengths = rows
    x_RTD = embeddings(model, params, batch)
    _, cache = model.decode(
        params, x_RTD, batch.position_RT, batch.segment_RT, model.empty_cache(3, 24)
    )
    # Row 1 fills all 24 slots; rows 0 and 2 hold zeros behind their tokens.
    for row, length in enumerate(lengths):
        assert np.all(np.any(cache.k_LBSKH[:, row, :length], axis=(2, 3)))
        assert not np.any(cache.k_LBSKH[:, row, length:])
    one = jnp.ones((3, 1), jnp.int32)
    _, after = model.decode(params, x_RTD[:, :1], jnp.asarray(lengths)[:, None], one, cache)
    np.testing.assert_array_equal(after.k_LBSKH[:, 1], cache.k_LBSKH[:, 1])
