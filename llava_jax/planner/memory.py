"""What a chip must hold through a step, by arithmetic on shapes: the terms that settings change.

The compiler tells how much a program needs, and of one that it refuses little more than that. What
is not here is smaller: a layer's gathered weights and what it works on, a piece of the logits.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from llava_jax.config import Compute
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.optim import Part

WEIGHTS, MOMENTS = "weights", "the optimizer's moments"


def terms(
    table: Sequence[Part], compute: Compute, language: LlamaConfig, tokens: int
) -> dict[str, int]:
    """Bytes of a chip. table: of optim.parts. tokens: of a chip that are worked on at once."""
    moments = sum(part.moment_bytes for part in table)
    # Of two moments in f32: a gradient as the backward pass gives it, and the sum over parts.
    gradients = moments // 8 * (2 if compute.parts == 1 else 2 + 4)
    return {
        WEIGHTS: sum(part.weight_bytes for part in table),
        MOMENTS: moments,
        "gradients": gradients,
        f"what remat {compute.remat!r} keeps for the backward pass": kept(
            compute, language, tokens
        ),
    }


def kept(compute: Compute, language: LlamaConfig, tokens: int) -> int:
    """By the language model's blocks, of their inputs and of what the remat policy names; with
    'none', of no less than all that has a name."""
    heads, width = language.size_of_head, language.hidden_size
    widths = {
        "norm": 0,  # a number a token
        "q": language.num_heads * heads,
        "k": language.num_kv_heads * heads,
        "v": language.num_kv_heads * heads,
        "attention": language.num_heads * heads,
        "residual": width,
        "gate": language.intermediate_size,
        "up": language.intermediate_size,
    }
    names = REMAT_POLICIES[compute.remat]
    of_token = width + sum(widths[name] for name in (widths if names is None else names))
    return language.num_layers * tokens * of_token * jnp.dtype(compute.dtype).itemsize
