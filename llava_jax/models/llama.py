"""LLaMA: token embedding, decoder, head.

Any Hugging Face `LlamaConfig` without biases whose rotary scaling is none, linear or llama3;
others are refused by name.

Token ids are the tokenizer's own, everywhere. In memory the vocabulary is padded to a multiple of
128 rows so that it shards and tiles; padded columns of the logits are masked. Rows added to the
original vocabulary (LLaVA v1's <im_start> and <im_end>) are leaves of their own, so that they can
train while the rest stays frozen: id `vocab_size + i` is row i of `added`.

Dims: B rows, T tokens, D width, V padded vocabulary, A added rows, N query heads, K key/value
heads, H head dim, F MLP width, L layers, S cache slots.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models import stack
from llava_jax.models.attention import MASKED, attention, cached_attention
from llava_jax.models.layers import ACTIVATIONS, Dense, RmsNorm, check_activation, matmul_precision
from llava_jax.models.lora import LoraConfig
from llava_jax.models.stack import Compute, Placement, keep, row_major

VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary angles. kind: 'default', 'linear' (positions ÷ factor) or 'llama3' (low frequencies
    ÷ factor, high ones kept, a smooth step between)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"unknown rope scaling {self.kind!r}: expected 'default', 'linear' or 'llama3'"
            )
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(
                f"got rope theta {self.theta} and factor {self.factor}: expected positive numbers"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of the language model.

    vocab_size: ids of the original vocabulary; added_vocab: ids behind it, held apart.
    head_dim: None = hidden_size / num_heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    added_vocab: int = 0
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    hidden_act: str = "silu"
    tie_embeddings: bool = False
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        check_activation(self.hidden_act)
        if self.rms_norm_eps < 0:
            raise ValueError(f"got rms_norm_eps {self.rms_norm_eps}: expected 0 or more")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"got {self.num_heads} query heads for {self.num_kv_heads} key heads: "
                "expected a multiple"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"got width {self.hidden_size} for {self.num_heads} heads and no head_dim: "
                "expected a multiple"
            )
        if self.size_of_head % 2:
            raise ValueError(f"got head dim {self.size_of_head}: rotary angles need an even one")

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def num_ids(self) -> int:
        """Ids that mean something: 0 … num_ids − 1."""
        return self.vocab_size + self.added_vocab

    @property
    def padded_vocab(self) -> int:
        return -(-self.num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; row b holds the first length_B[b] slots."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array


def empty_cache(config: LlamaConfig, rows: int, slots: int, dtype: str) -> Cache:
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.size_of_head)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """f32, in the same steps as the reference implementation, so that they agree to the bit."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # NumPy's f32 power is off by up to 2 in the last place; at position 4000 that is seen.
    power = (float(rope.theta) ** exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / power
    if rope.kind == "linear":
        inverse = inverse / np.float32(rope.factor)
    elif rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        between = (1 - smooth) * inverse / rope.factor + smooth * inverse
        inverse = np.where(
            wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, between)
        )
    return inverse.astype(np.float32)


def rotary_angles(rope: RopeConfig, head_dim: int, position_BT):
    """(cos, sin), each f32 [B, T, H]."""
    inverse_H = jnp.asarray(np.tile(inverse_frequencies(rope, head_dim), 2))
    angle_BTH = position_BT.astype(jnp.float32)[..., None] * inverse_H[None, None]
    return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def rotate(x_BTNH, cos_BTH, sin_BTH):
    """Rotary embedding in the half-split convention, computed in f32.

    The turn (x₁, x₂) → (−x₂, x₁) is a matmul with a signed permutation: exact, and on a TPU
    cheaper than splitting and joining across lanes.
    """
    H = x_BTNH.shape[-1]
    turn_HH = np.zeros((H, H), np.float32)
    turn_HH[np.arange(H // 2) + H // 2, np.arange(H // 2)] = -1.0
    turn_HH[np.arange(H // 2), np.arange(H // 2) + H // 2] = 1.0
    turned_BTNH = jnp.matmul(
        x_BTNH,
        jnp.asarray(turn_HH, x_BTNH.dtype),
        precision=matmul_precision(x_BTNH.dtype),
        preferred_element_type=jnp.float32,
    )
    y = x_BTNH.astype(jnp.float32) * cos_BTH[:, :, None] + turned_BTNH * sin_BTH[:, :, None]
    return y.astype(x_BTNH.dtype)


class LlamaBlock(nn.Module):
    """Pre-norm block. The carry is (x, cache or None); a layer writes its slice of the cache."""

    config: LlamaConfig
    compute: Compute
    placement: Placement

    @nn.compact
    def __call__(self, carry, layer_input, cos_BTH, sin_BTH, segment_BT):
        c, compute, placement = self.config, self.compute, self.placement
        x_BTD, cache = carry
        layer, dropout_key_B = layer_input
        keys = iter([None] * 7 if dropout_key_B is None else _split(dropout_key_B, 7))

        def dense(name, features, x, **how):
            return Dense(features, compute, lora=c.lora, name=name, **how)(x, next(keys))

        y_BTD = RmsNorm(c.rms_norm_eps, name="attention_norm")(x_BTD)
        # Queries come out scaled for attention: scaled after they are kept, they are another array.
        scale = 1 / math.sqrt(c.size_of_head)
        angles = {"q": (cos_BTH * scale, sin_BTH * scale), "k": (cos_BTH, sin_BTH)}
        by_head = {}
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            y = dense(name, heads * c.size_of_head, y_BTD, heads=heads)
            y = placement.constrain(y, ("batch", None, "heads", None))
            if name in angles:
                y = rotate(y, *angles[name])
            # Kept by head, as the attention kernels read it: kept by token, a TPU lays it out anew
            # in both passes.
            by_head[name] = keep(y.swapaxes(1, 2), name).swapaxes(1, 2)
        q_BTNH, k_BTKH, v_BTKH = by_head["q"], by_head["k"], by_head["v"]

        if cache is None:
            y_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segment_BT,
                causal=True,
                scale=1.0,
                backend=compute.attention,
                block=compute.attention_block,
                placement=placement,
            )
        else:
            cache, slot_BT = _write(cache, layer, k_BTKH, v_BTKH, segment_BT)
            k_BSKH, v_BSKH = cache.k_LBSKH[layer], cache.v_LBSKH[layer]
            y_BTNH = cached_attention(q_BTNH, k_BSKH, v_BSKH, slot_BT, scale=1.0)
        y_BTD = dense("o", c.hidden_size, y_BTNH, output_first=True, heads=c.num_heads)
        x_BTD = placement.constrain(x_BTD + y_BTD, ("batch", None, None))
        x_BTD = keep(row_major(x_BTD, compute), "residual")

        y_BTD = RmsNorm(c.rms_norm_eps, name="mlp_norm")(x_BTD)
        gate_BTF, up_BTF = (
            keep(row_major(dense(name, c.intermediate_size, y_BTD), compute), name)
            for name in ("gate", "up")
        )
        y_BTF = placement.constrain(
            ACTIVATIONS[c.hidden_act](gate_BTF) * up_BTF, ("batch", None, "heads")
        )
        y_BTD = dense("down", c.hidden_size, y_BTF, output_first=True)
        x_BTD = placement.constrain(x_BTD + y_BTD, ("batch", None, None))
        return row_major(x_BTD, compute), cache


def _write(cache: Cache, layer, k_BTKH, v_BTKH, segment_BT):
    """The cache with this chunk's keys and values in one layer, and each token's slot.

    A chunk is padded on the right (segment 0). Padding, and what lies beyond the last slot, is
    dropped, never written over a live slot; the engine sizes the cache so that nothing real is.
    """
    slots = cache.k_LBSKH.shape[2]
    chunk_T = jnp.arange(k_BTKH.shape[1], dtype=jnp.int32)
    slot_BT = cache.length_B[:, None] + chunk_T[None]
    target_BT = jnp.where(segment_BT > 0, slot_BT, slots)

    # Row by row: an indexed row dim would make the partitioner bring all rows to every device.
    @functools.partial(jax.vmap, in_axes=(1, 0, 0), out_axes=1)
    def put_row(x_LSKH, new_TKH, target_T):
        return x_LSKH.at[layer, target_T].set(new_TKH.astype(x_LSKH.dtype), mode="drop")

    def put(x_LBSKH, new_BTKH):
        return put_row(x_LBSKH, new_BTKH, target_BT)

    k_LBSKH, v_LBSKH = put(cache.k_LBSKH, k_BTKH), put(cache.v_LBSKH, v_BTKH)
    return cache._replace(k_LBSKH=k_LBSKH, v_LBSKH=v_LBSKH), slot_BT


def _split(key_B, count: int):
    """[count, B]: that many independent keys for each row."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(key_B)


@jax.custom_vjp
def _look_up(table_VD, token_BT):
    """table_VD[token_BT], with its gradient summed in f32: a frequent id is added to thousands of
    times, and a bf16 sum of ones stops growing at 256."""
    return jnp.take(table_VD, token_BT, axis=0)


def _look_up_forward(table_VD, token_BT):
    # The empty array carries the table's shape and dtype to the backward pass, and no memory.
    return _look_up(table_VD, token_BT), (token_BT, jnp.zeros((0, *table_VD.shape), table_VD.dtype))


def _look_up_backward(residual, gradient_BTD):
    token_BT, table_0VD = residual
    zeros_VD = jnp.zeros(table_0VD.shape[1:], jnp.float32)
    sum_VD = zeros_VD.at[token_BT].add(gradient_BTD.astype(jnp.float32))
    return sum_VD.astype(table_0VD.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class Embedding(nn.Module):
    """token_BT → [B, T, D]. `table` is [V, D]; its rows from vocab_size on are padding."""

    config: LlamaConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, token_BT):
        c = self.config
        init = nn.initializers.normal(0.02)
        table_VD = self.param("table", init, (c.padded_vocab, c.hidden_size))
        x_BTD = _look_up(table_VD.astype(self.compute.dtype), token_BT)
        if c.added_vocab:
            added_AD = self.param("added", init, (c.added_vocab, c.hidden_size))
            index_BT = jnp.clip(token_BT - c.vocab_size, 0, c.added_vocab - 1)
            added_BTD = _look_up(added_AD.astype(self.compute.dtype), index_BT)
            x_BTD = jnp.where((token_BT >= c.vocab_size)[..., None], added_BTD, x_BTD)
        return x_BTD


class Decoder(nn.Module):
    """All blocks and the final norm."""

    config: LlamaConfig
    compute: Compute = Compute()
    placement: Placement = Placement()

    @nn.compact
    def __call__(
        self, x_BTD, position_BT, segment_BT, cache: Cache | None = None, dropout_key_B=None
    ):
        """→ (hidden states [B, T, D], cache). With a cache, segment 0 marks a chunk's padding."""
        c = self.config
        x_BTD = x_BTD.astype(self.compute.dtype)
        cos_BTH, sin_BTH = rotary_angles(c.rope, c.size_of_head, position_BT)
        constants = (cos_BTH, sin_BTH, segment_BT)
        block = LlamaBlock(c, self.compute, self.placement, parent=None)
        example = [x[:1] for x in constants]
        layers_L = stack.params_of(
            self, block, c.num_layers, (x_BTD[:1], None), (0, None), *example
        )
        keys_LB = None if dropout_key_B is None else _split(dropout_key_B, c.num_layers)
        x_BTD, cache = stack.run(
            block,
            layers_L,
            (x_BTD, cache),
            (stack.layer_numbers(c.num_layers), keys_LB),
            *constants,
            path="language/decoder/layers",
            compute=self.compute,
            placement=self.placement,
        )
        if cache is not None:
            new_B = jnp.sum((segment_BT > 0).astype(jnp.int32), axis=1)
            cache = cache._replace(length_B=cache.length_B + new_B)
        return RmsNorm(c.rms_norm_eps, name="norm")(x_BTD), cache


class Head(nn.Module):
    """Hidden states → f32 logits over the padded vocabulary; ids that mean nothing are masked.

    Tied embeddings pass the embedding's own leaves in; otherwise `kernel` is [D, V].
    """

    config: LlamaConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x_BTD, embedding: dict | None = None):
        c, dtype = self.config, self.compute.dtype
        if c.tie_embeddings:
            assert embedding is not None
            kernel_DV = embedding["table"].T
            added_DA = embedding["added"].T if c.added_vocab else None
        else:
            init = nn.initializers.normal(0.02)
            kernel_DV = self.param("kernel", init, (c.hidden_size, c.padded_vocab))
            shape = (c.hidden_size, c.added_vocab)
            added_DA = self.param("added", init, shape) if c.added_vocab else None

        def project(kernel):
            return jnp.einsum(
                "...D,DV->...V",
                x_BTD.astype(dtype),
                kernel.astype(dtype),
                precision=matmul_precision(dtype),
                preferred_element_type=jnp.float32,
            )

        logits = project(kernel_DV)
        column_V = jnp.expand_dims(jnp.arange(c.padded_vocab), range(logits.ndim - 1))
        if added_DA is not None:
            after = c.padded_vocab - c.num_ids
            widths = [(0, 0)] * (logits.ndim - 1) + [(c.vocab_size, after)]
            logits = jnp.where(column_V < c.vocab_size, logits, jnp.pad(project(added_DA), widths))
        return jnp.where(column_V < c.num_ids, logits, MASKED)
