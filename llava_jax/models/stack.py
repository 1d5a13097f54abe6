"""A stack of equal blocks: how it is laid out, placed, scanned and recomputed.

A stack's parameters are one block's, with a leading layer dim on every leaf. `run` walks them by
`lax.scan` (one compiled block, whatever the depth) or unrolled (the same numbers). Each layer's
slice passes through one hook, `Placement.gather`, before the block sees it; sharding.py decides
what that does. The gather stands *inside* the recomputed region, so that the backward pass
gathers the weights again instead of keeping whole layers alive.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

Params = Any  # a nested dict of arrays


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a model asks of the machine it runs on. The defaults ask nothing: one device.

    gather(params, path): parameters as stored → as used (cast, and whole along the FSDP axes).
    constrain(x, names): pins an activation's layout by logical dim names ("batch", "heads", …).
    per_shard(fn, in_names, out_names): runs fn on each device's own shard, for kernels that the
        partitioner cannot see into.
    dtype: what `gather` casts to, if anything; the model must compute in it.
    """

    gather: Callable[[Params, str], Params] = lambda params, path: params
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = lambda x, names: x
    per_shard: Callable[[Callable, tuple, tuple], Callable] = lambda fn, in_names, out_names: fn
    dtype: str | None = None


# What a block may keep for its backward pass, by the names it gives with `keep`. Everything not
# named is recomputed from the block's input; norms' statistics are next to nothing, and kept
# wherever something is. Listed from the leanest to the largest.
_QKV = ("q", "k", "v")
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "residual": ("norm", "attention", "residual"),
    "value": ("norm", "attention", "residual", "v"),
    "attention": ("norm", *_QKV, "attention"),
    "gate": ("norm", "attention", "residual", "gate"),
    "attention_residual": ("norm", *_QKV, "attention", "residual"),
    "attention_gate": ("norm", *_QKV, "attention", "residual", "gate"),
    "all": ("norm", *_QKV, "attention", "residual", "gate", "up"),
    "none": None,  # no recomputation at all: autodiff keeps what it likes
}

keep = checkpoint_name


def row_major(x, compute: "Compute"):
    """Lies in memory with its last dims together. A TPU's compiler would lay some of what is kept
    out by token, and copy it into another layout on both passes. Elsewhere it has its choice."""
    return as_stored(x) if compute.attention.startswith("splash") else x


def as_stored(x):
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


ATTENTION_BACKENDS = ("xla", "splash", "splash_interpret", "cudnn")  # see attention.py


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to run a model. Nothing here changes its function beyond rounding.

    dtype: of matmuls and activations ("float32" or "bfloat16"); norms, softmax and rotary angles
        are f32 always.
    attention: a backend of attention.py.
    attention_block: the largest tile of the splash kernel, a multiple of 128.
    remat: a name of REMAT_POLICIES, for the language model's blocks and the vision tower's.
    scan: one compiled block (True) or all of them in line.
    """

    dtype: str = "float32"
    attention: str = "xla"
    attention_block: int = 512
    remat: str = "full"
    scan: bool = True

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"got compute dtype {self.dtype!r}: expected 'float32' or 'bfloat16'")
        if self.attention not in ATTENTION_BACKENDS:
            raise ValueError(
                f"unknown attention backend {self.attention!r}: expected one of "
                f"{ATTENTION_BACKENDS}"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"unknown remat policy {self.remat!r}: expected one of {tuple(REMAT_POLICIES)}"
            )
        if self.attention_block < 128 or self.attention_block % 128:
            raise ValueError(
                f"got attention_block {self.attention_block}: expected a multiple of 128"
            )


def params_of(owner: nn.Module, block: nn.Module, num_layers: int, *inputs) -> Params:
    """The owner's `layers` parameter: `num_layers` blocks, each drawn from its own key.

    inputs: what the block is called with, as an example. Read without Linen's shape check, which
    would trace the block once more, and which a layer's shard could not pass.
    """
    if not owner.is_initializing():
        params_L = owner.get_variable("params", "layers")
        if params_L is None:
            raise ValueError(f"got no 'layers': expected the parameters of {num_layers} blocks")
        found = {leaf.shape[0] for leaf in jax.tree.leaves(params_L)}
        if found != {num_layers}:
            raise ValueError(f"got parameters of {sorted(found)} blocks: expected {num_layers}")
        return params_L

    def draw(key):
        one = jax.vmap(lambda layer_key: block.init(layer_key, *inputs)["params"])
        return one(jax.random.split(key, num_layers))

    return owner.param("layers", draw)


def run(
    block: nn.Module,
    params_L: Params,
    carry: Any,
    inputs_L: Any = None,
    *constants: Any,
    path: str,
    compute: Compute,
    placement: Placement,
) -> Any:
    """Applies the stacked blocks in turn: carry = block(carry, inputs_L[layer], *constants).

    path: where params_L stands in the parameter tree; the hook looks its layout up by it.
    """

    def layer(carry, params_and_input):
        stored, layer_input = params_and_input
        used = placement.gather(stored, path)
        return block.apply({"params": used}, carry, layer_input, *constants), None

    if placement.dtype:
        # Cast as a stack: cast layer by layer, the gradients' stack would be f32, and twice as
        # large as what is in it.
        params_L = jax.tree.map(
            lambda leaf: leaf.astype(placement.dtype) if leaf.ndim > 2 else leaf, params_L
        )

    kept = REMAT_POLICIES[compute.remat]
    if kept is not None:
        # Inside a scan nothing can be shared between the two passes anyway, and the barrier that
        # prevent_cse puts over all inputs would keep the backward gathers from overlapping.
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not compute.scan)

    if compute.scan:
        return jax.lax.scan(layer, carry, (params_L, inputs_L))[0]
    for number in range(jax.tree.leaves(params_L)[0].shape[0]):
        carry, _ = layer(carry, jax.tree.map(operator.itemgetter(number), (params_L, inputs_L)))
    return carry


def layers(params_L: Params, start: int, stop: int) -> Params:
    """The stacked parameters of layers start..stop-1."""
    return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, start, stop), params_L)


def layer_numbers(num_layers: int) -> jax.Array:
    """The usual inputs_L: each block told its own number."""
    return jnp.arange(num_layers, dtype=jnp.int32)
