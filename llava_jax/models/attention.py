"""One attention function and its backends; segments never see each other in any of them.

    xla               the reference: plain einsums and an f32 softmax, on any device
    splash            TPU: the Pallas kernel, blocks outside the mask skipped
    splash_interpret  the same kernel interpreted on a CPU: for its numbers, not its speed
    cudnn             GPU: cuDNN's fused kernel, with the whole mask handed to it; where it could
                      not honour the mask, it refuses by name

`attention` is training and prefill: queries and keys are the same tokens. `cached_attention` is
decoding: new queries look back over a cache whose rows hold different numbers of tokens.

Dims: B rows, T query tokens, S key tokens or cache slots, N query heads, K key/value heads
(N = K·G), G queries per key head, H head dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.models import layers
from llava_jax.models.stack import ATTENTION_BACKENDS, Placement, keep

LANES = 128  # splash tiles are multiples of it, and cuDNN's backward pass is safe at them
NAME = "attention"  # what the result goes by in a remat policy (stack.py)
PADDING = -1  # segment of the tokens added here to fill a tile; no caller's segment is negative

# Finite, so that a row with no visible key gives a mean instead of NaN; so far below any logit
# that its exponential is exactly zero, which makes isolation exact to the bit for finite values
# (0 · NaN is NaN: a NaN anywhere in a row reaches all of it).
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    segment_BT=None,
    *,
    causal: bool,
    scale: float | None = None,
    backend: str = "xla",
    block: int = 512,
    placement: Placement = Placement(),
):
    """softmax(scale · q kᵀ) v over the visible keys → [B, T, N, H].

    segment_BT: int32, ≥ 0; a token sees only tokens of its own segment. None: one segment a row.
    causal: a token sees no later token. scale: 1/√H where none is given. block: the largest splash
    tile.
    """
    T, S, N, K = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2], k_BSKH.shape[2]
    if N % K:
        raise ValueError(f"got {N} query heads for {K} key heads: expected a multiple")
    if T != S and (causal or segment_BT is not None or backend != "xla"):
        raise ValueError(
            f"got {T} queries for {S} keys with backend {backend!r}: only plain cross-attention "
            "(not causal, no segments, backend 'xla') takes different numbers of them"
        )
    scale = 1 / math.sqrt(q_BTNH.shape[3]) if scale is None else scale
    if backend == "xla":
        mask_BTS = _mask(T, segment_BT, causal)
        return keep(_xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale), NAME)
    if backend in ("splash", "splash_interpret"):
        interpret = backend == "splash_interpret"
        q_BTNH = (q_BTNH * scale).astype(q_BTNH.dtype) if scale != 1 else q_BTNH
        return _splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal, block, interpret, placement)
    if backend == "cudnn":
        return keep(_cudnn(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal, scale), NAME)
    raise ValueError(f"unknown attention backend {backend!r}: expected one of {ATTENTION_BACKENDS}")


def cached_attention(q_BTNH, k_BSKH, v_BSKH, slot_BT, *, scale: float | None = None):
    """New queries over a cache: the query that stands in slot s sees slots 0..s of its row."""
    slots_S = jnp.arange(k_BSKH.shape[1], dtype=slot_BT.dtype)
    mask_BTS = slots_S[None, None, :] <= slot_BT[:, :, None]
    scale = 1 / math.sqrt(q_BTNH.shape[3]) if scale is None else scale
    return _xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)


def _mask(T: int, segment_BT, causal: bool):
    """Boolean [B or 1, T, T] of visible keys, or None when every key is visible."""
    mask_BTS = None
    if causal:
        mask_BTS = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_BT is not None:
        same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
        mask_BTS = same_BTS if mask_BTS is None else mask_BTS & same_BTS
    return mask_BTS


def _xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    precision = layers.matmul_precision(q_BTNH.dtype)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logit_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        q_BTKGH,
        k_BSKH,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    logit_BKGTS = logit_BKGTS * scale
    if mask_BTS is not None:
        logit_BKGTS = jnp.where(mask_BTS[:, None, None], logit_BKGTS, MASKED)
    weight_BKGTS = jax.nn.softmax(logit_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, precision=precision)
    return out_BTKGH.reshape(B, T, N, H)


def _tile(T: int, largest: int) -> tuple[int, int]:
    """(tile, padded length): the least padding, and among equals the largest tile."""
    candidates = range(LANES, max(largest, LANES) + 1, LANES)
    return min(((tile, -(-T // tile) * tile) for tile in candidates), key=lambda c: (c[1], -c[0]))


def _pad_tokens(x, length: int, value=0):
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths, constant_values=value)


def _splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal, block, interpret, placement):
    # Imported here: Pallas' TPU half is slow to import, and no other backend wants it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    """Queries are scaled already: the kernel does not."""
    B, T = q_BTNH.shape[:2]
    tile, padded = _tile(T, block)
    if padded != T and segment_BT is None:
        segment_BT = jnp.zeros((B, T), jnp.int32)

    def on_shard(q_BTNH, k_BSKH, v_BSKH, *segment):
        head_mask = (
            masks.CausalMask((padded, padded)) if causal else masks.FullMask((padded, padded))
        )
        splash: Any = kernel.make_splash_mha(
            masks.MultiHeadMask([head_mask] * q_BTNH.shape[2]),
            block_sizes=kernel.BlockSizes(
                block_q=tile,
                block_kv=tile,
                block_q_dkv=tile,
                block_kv_dkv=tile,
                block_q_dq=tile,
                block_kv_dq=tile,
            ),
            head_shards=1,
            q_seq_shards=1,
            # Both the output and its log-sum-exp go by this name: a policy that keeps it spares
            # the backward pass a second forward call of the kernel.
            residual_checkpoint_name=NAME,
            interpret=interpret,
        )
        # Splash wants heads before tokens.
        q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        if not segment:
            return jax.vmap(splash)(q_BNTH, k_BKSH, v_BKSH).swapaxes(1, 2)
        ids = kernel.SegmentIds(q=segment[0], kv=segment[0])
        return jax.vmap(splash)(q_BNTH, k_BKSH, v_BKSH, segment_ids=ids).swapaxes(1, 2)

    inputs = [_pad_tokens(x, padded) for x in (q_BTNH, k_BSKH, v_BSKH)]
    names: list[tuple[str | None, ...]] = [("batch", None, "heads", None)] * 3
    if segment_BT is not None:
        inputs.append(_pad_tokens(segment_BT, padded, PADDING))
        names.append(("batch", None))
    out_BTNH = placement.per_shard(on_shard, tuple(names), names[0])(*inputs)
    return out_BTNH[:, :T]


def _cudnn(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal, scale):
    B, T, _, H = q_BTNH.shape
    platform = jax.default_backend()
    problems = []
    if platform != "gpu":
        problems.append(f"it needs an NVIDIA GPU and this process computes on {platform!r}")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        problems.append(f"it computes in bfloat16 or float16 and got {q_BTNH.dtype}")
    if H > 128 or H % 8:
        problems.append(f"it takes head dims up to 128 in multiples of 8 and got {H}")
    if problems:
        raise ValueError(
            "attention backend 'cudnn' refuses: " + "; ".join(problems) + ". Use attention='xla'."
        )
    padded = -(-T // LANES) * LANES
    q_BTNH, k_BSKH, v_BSKH = (_pad_tokens(x, padded) for x in (q_BTNH, k_BSKH, v_BSKH))
    if segment_BT is not None:
        # Handed over whole, as a mask: cuDNN's own causal switch knows nothing of segments.
        mask_BTS: Any = _mask(padded, _pad_tokens(segment_BT, padded, PADDING), causal)
        how: dict[str, Any] = {"mask": mask_BTS[:, None]}
    elif causal:  # the padding stands behind every real token, so nobody sees it
        how = {"is_causal": True}
    else:
        how = {"key_value_seq_lengths": jnp.full((B,), T, jnp.int32)}
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, scale=scale, implementation="cudnn", **how
    )
    return out_BTNH[:, :T]
