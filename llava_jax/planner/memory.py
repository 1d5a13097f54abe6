"""What a chip must hold through a step, by arithmetic on shapes: the terms that settings change.

The compiler tells how much a program needs, and of one that it refuses little more than that. What
is not here is smaller: a layer's gathered weights and what it works on, a piece of the logits.
"""

import dataclasses

import jax.numpy as jnp

from llava_jax.config import Compute
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.stack import REMAT_POLICIES


@dataclasses.dataclass(frozen=True)
class Held:
    """weights, moments: bytes of a chip. row: tokens of one."""

    weights: int
    moments: int
    language: LlamaConfig
    row: int

    @property
    def lasting(self) -> int:
        return self.weights + self.moments

    def terms(self, compute: Compute, rows: int) -> dict[str, int]:
        """Bytes by what takes them, with so many rows a chip and step."""
        # Of two moments in f32: a gradient as the backward pass gives it, and the sum over parts.
        gradients = self.moments // 8 * (2 if compute.parts == 1 else 2 + 4)
        tokens = rows // compute.parts * self.row
        return {
            "weights": self.weights,
            "the optimizer's moments": self.moments,
            "gradients": gradients,
            f"what remat {compute.remat!r} keeps for the backward pass": kept(
                compute, self.language, tokens
            ),
        }

    def total(self, compute: Compute, rows: int) -> int:
        return sum(self.terms(compute, rows).values())

    def leaner(self, compute: Compute, rows: int) -> dict[tuple[str, int], int]:
        """The same step in less memory, by what it recomputes and by parts: bytes that it saves."""
        now = self.total(compute, rows)
        tries = {
            (remat, parts): now
            - self.total(dataclasses.replace(compute, remat=remat, parts=parts), rows)
            for remat in dict.fromkeys([compute.remat, "full"])
            for parts in range(compute.parts, rows + 1)
            if rows % parts == 0
        }
        return {each: saved for each, saved in tries.items() if saved > 0}


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
