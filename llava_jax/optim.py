"""What trains and how: the trainable part of a tree, the schedule, AdamW. All by parameter path.

The frozen part never reaches the optimizer: it has no gradient, no state, and enters no norm, no
clipping and no decay.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llava_jax.sharding import leaf_paths

Params = Mapping[str, Any]


def trains(path: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def split(params: Params, trainable: Sequence[str]) -> tuple[Params, Params]:
    """The trainable and the frozen leaves, each a tree of its own. A pattern that fits no leaf is
    refused: it would train less than was asked for."""
    paths = jax.tree.leaves(leaf_paths(params))
    for pattern in trainable:
        if not any(trains(path, [pattern]) for path in paths):
            raise ValueError(
                f"got {pattern!r} of what trains (config.optim.trains), which fits no parameter of "
                "this model"
            )

    def part(tree: Params, prefix: str, wanted: bool) -> Params:
        kept = {}
        for name, child in tree.items():
            path = f"{prefix}{name}"
            if isinstance(child, Mapping):
                inside = part(child, f"{path}/", wanted)
                if inside or not (child or wanted):  # an identity projector has no leaves
                    kept[name] = inside
            elif trains(path, trainable) is wanted:
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


class Part(NamedTuple):
    """Parameters of one part of the model that train, or that do not. bytes: on each device;
    moments: what the optimizer keeps of them."""

    name: str
    parameters: int
    trains: bool
    dtype: str
    weight_bytes: int
    moment_bytes: int


def parts(trainable: Params, frozen: Params) -> list[Part]:
    """What lies where: one line for what trains of each part, one for what does not."""
    found: dict[tuple[str, bool], list[Any]] = {}
    for tree, learns in ((trainable, True), (frozen, False)):
        for path, leaf in zip(
            jax.tree.leaves(leaf_paths(tree)), jax.tree.leaves(tree), strict=True
        ):
            found.setdefault((_part_of(path), learns), []).append(leaf)
    return [
        Part(
            name=name,
            parameters=sum(leaf.size for leaf in leaves),
            trains=learns,
            dtype=" + ".join(sorted({leaf.dtype.name for leaf in leaves})),
            weight_bytes=sum(_held(leaf) * leaf.dtype.itemsize for leaf in leaves),
            moment_bytes=sum(2 * 4 * _held(leaf) for leaf in leaves) * learns,
        )
        for (name, learns), leaves in sorted(found.items(), key=lambda item: _place(item[0]))
    ]


_ORDER = ("vision", "projector", "row_end", "language/embed", "language/decoder", "language/head")


def _place(part: tuple[str, bool]) -> tuple[int, bool]:
    return _ORDER.index(part[0]), part[1]


def _part_of(path: str) -> str:
    return next(name for name in _ORDER if path == name or path.startswith(f"{name}/"))


def _held(leaf: jax.Array) -> int:
    """How many of a leaf's values one device has."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


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
