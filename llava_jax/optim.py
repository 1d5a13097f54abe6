"""What trains and how: the trainable part of a tree, the schedule, AdamW. All by parameter path.

The frozen part never reaches the optimizer: it has no gradient, no state, and enters no norm, no
clipping and no decay.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llava_jax.sharding import leaf_paths

Params = Mapping[str, Any]

def split(params: Params, trainable: Sequence[str]) -> tuple[Params, Params]:
    """The trainable and the frozen leaves, each a tree of its own. A pattern that fits no leaf is
    refused: it would train less than was asked for."""
    patterns = {pattern: re.compile(pattern) for pattern in trainable}
    paths = jax.tree.leaves(leaf_paths(params))
    for pattern, compiled in patterns.items():
        if not any(map(compiled.fullmatch, paths)):
            raise ValueError(f"got trainable {pattern!r}, which fits no parameter of this model")

    def part(tree: Params, prefix: str, wanted: bool) -> Params:
        kept = {}
        for name, child in tree.items():
            path = f"{prefix}{name}"
            if isinstance(child, Mapping):
                inside = part(child, f"{path}/", wanted)
                if inside or not (child or wanted):  # an identity projector has no leaves
                    kept[name] = inside
            elif any(compiled.fullmatch(path) for compiled in patterns.values()) is wanted:
                kept[name] = child
        return kept

    return part(params, "", True), part(params, "", False)


def join(trainable: Params, frozen: Params) -> Params:
    """The tree that `split` took apart."""
    joined = dict(frozen)
    for name, child in trainable.items():
        both = isinstance(child, Mapping) and name in joined
        joined[name] = join(child, joined[name]) if both else child
    return joined


def schedule(lr: float, *, steps: int, warmup_ratio: float) -> Callable[[Any], jax.Array]:
    """Linear warm-up, then a cosine to 0: as transformers computes it, whose first step is at 0."""
    warmup = -int(-steps * warmup_ratio // 1)  # rounded up

    def at(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(1, warmup)
        left = jnp.clip((steps - step) / max(1, steps - warmup), 0.0, 1.0)
        # (1 + cos πx) / 2 for x = 1 − left, in a form that keeps its digits near the end.
        cosine = jnp.sin(0.5 * jnp.pi * left) ** 2
        return lr * jnp.where(step < warmup, rising, cosine)

    return at


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW as PyTorch has it. clip: the gradients' largest norm, None = any.

    lr_of: factors on the learning rate, by pattern of path; the first that fits counts.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    lr_of: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"got clip {self.clip}, expected a norm above 0, or none")

    def transformation(self, trainable: Params) -> optax.GradientTransformation:
        """Gradients to what is subtracted, at a learning rate of 1. trainable: arrays or shapes."""
        steps = [optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=jnp.float32)]
        if self.weight_decay:
            decays = jax.tree.map(_decays, leaf_paths(trainable))
            steps.append(optax.masked(optax.add_decayed_weights(self.weight_decay), decays))
        factor = jax.tree.map(self._factor, leaf_paths(trainable))
        for value in sorted({*jax.tree.leaves(factor)} - {1.0}):
            mine = jax.tree.map(lambda leaf, value=value: leaf == value, factor)
            steps.append(optax.masked(optax.scale(value), mine))
        return optax.chain(*steps)

    def _factor(self, path: str) -> float:
        fits = (factor for pattern, factor in self.lr_of if re.fullmatch(pattern, path))
        return float(next(fits, 1.0))

    def clipped(self, gradients: Params, norm: jax.Array) -> Params:
        """Scaled down to the clip, as torch.nn.utils.clip_grad_norm_ does."""
        if self.clip is None:
            return gradients
        factor = jnp.minimum(1.0, self.clip / (norm + 1e-6))
        return jax.tree.map(lambda leaf: leaf * factor, gradients)


def _decays(path: str) -> bool:
    """Matrices and embeddings; not biases, norms or positions of their kind."""
    return not re.search(r"(^|/)(bias|scale)$", path)
