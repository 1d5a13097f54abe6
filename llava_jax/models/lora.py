"""LoRA: a low-rank delta beside a frozen kernel, and the merge that folds it back in.

Every `Dense` of the language model asks this module for its delta, so that scanning, sharding and
freezing know the two factors from the start; rank 0 means they do not exist.

Dims: B rows, I input features, O output features, R rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
OUTPUT_FIRST = ("o", "down")  # kernels stored [output, input]; see layers.py


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections of the language model carry a delta, and how large it is."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown:
            raise ValueError(f"unknown LoRA targets {unknown}: expected names among {TARGETS}")
        if self.rank < 0 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"got LoRA rank {self.rank} and dropout {self.dropout}: "
                "expected rank >= 0 and 0 <= dropout < 1"
            )

    def rank_of(self, name: str) -> int:
        return self.rank if name in self.targets else 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def delta(config: LoraConfig, x, a_IR, b_OR, dropout_key_B, precision):
    """The delta's output for input x[..., I]: scale · (x a) bᵀ.

    dropout_key_B: a key for each row of x, so that what is dropped depends on no layout; None: no
    dropout.
    """
    if dropout_key_B is not None and config.dropout > 0.0:
        keep = kept(dropout_key_B, x.shape, config.dropout)
        x = jnp.where(keep, x / (1.0 - config.dropout), jnp.zeros((), x.dtype))
    low = jnp.einsum("...I,IR->...R", x, a_IR.astype(x.dtype), precision=precision)
    return config.scale * jnp.einsum(
        "...R,OR->...O", low, b_OR.astype(x.dtype), precision=precision
    )


def kept(key_B, shape: tuple[int, ...], dropout: float):
    """Which elements of [B, …] stay: a word for each, mixed from its place in the row and the row's
    key. jax.random's words are better than this needs, and take a TPU ten times as long as the
    product with a (docs/log.md)."""
    words = jax.random.key_data(key_B)
    first, last = (
        jnp.expand_dims(words[:, n], range(1, len(shape))).astype(jnp.uint32) for n in (0, -1)
    )
    place = sum(
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(math.prod(shape[axis + 1 :]))
        for axis in range(1, len(shape))
    )
    word = place ^ first
    # The rounds of the hash "triple32", the key's other half between them.
    word = (word ^ word >> 17) * jnp.uint32(0xED5AD4BB)
    word = ((word ^ word >> 11) + last) * jnp.uint32(0xAC4C1B51)
    word = (word ^ word >> 15) * jnp.uint32(0x31848BAB)
    return (word ^ word >> 14) >= jnp.uint32(dropout * 2**32)


def merge(config: LoraConfig, params: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """The same tree with every delta added into its kernel, and no factors left.

    Kernels keep their dtype; the product is taken in f32, so merging a bf16 base rounds once.
    """
    merged: dict[str, Any] = {
        k: merge(config, v, k) if isinstance(v, Mapping) else v for k, v in params.items()
    }
    if "lora_a" in merged:
        a, b, kernel = merged.pop("lora_a"), merged.pop("lora_b"), merged["kernel"]
        product = jnp.einsum(
            "...IR,...OR->...IO",
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        if name in OUTPUT_FIRST:
            product = jnp.swapaxes(product, -1, -2)
        merged["kernel"] = (kernel.astype(jnp.float32) + config.scale * product).astype(
            kernel.dtype
        )
    return merged
