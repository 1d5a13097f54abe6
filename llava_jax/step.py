"""One training step, pure: the package's only value_and_grad.

The loss is the weighted mean of the tokens' cross entropy over the whole global batch, also when it
is summed up in parts. Only trainable leaves are differentiated. A step whose loss or gradient is
not finite changes nothing, on all devices alike, and says so.

Dims: R rows, T tokens, S sources.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llava_jax import optim
from llava_jax.batch import Batch
from llava_jax.models.llava import Llava
from llava_jax.optim import AdamW, Params
from llava_jax.sharding import Layout


class State(NamedTuple):
    """What a step changes. step: of the data and the schedule, skipped ones counted."""

    step: jax.Array
    trainable: Params
    opt: Any


class Sums(NamedTuple):
    """Of a batch or a part of one: enough for the means, whoever adds up what."""

    loss: jax.Array
    weight: jax.Array
    loss_S: jax.Array
    weight_S: jax.Array


class Metrics(NamedTuple):
    """norm: of the gradient of what trains, before clipping. skipped: 1 if nothing was changed."""

    loss: jax.Array
    loss_S: jax.Array
    weight_S: jax.Array
    norm: jax.Array
    lr: jax.Array
    skipped: jax.Array


# trainable, frozen, batch, a key for each row → what the batch's tokens lose. See token_sums.
Loss = Callable[[Params, Params, Batch, jax.Array], Sums]


def init(trainable: Params, adamw: AdamW) -> State:
    """Step 0. Call it under `jit` with out_shardings, or `eval_shape`."""
    return State(
        jnp.zeros((), jnp.int32), trainable, adamw.transformation(trainable).init(trainable)
    )


def shardings(trainable: Params, adamw: AdamW, layout: Layout) -> State:
    """Where a state lies: the moments as their weights, the counts everywhere. Given to `jit` on
    both sides, so that the second step is the program of the first. trainable: arrays or shapes."""
    transformation = adamw.transformation(trainable)
    placed = layout.param_shardings(trainable)
    opt = optax.tree_map_params(
        transformation,
        lambda _, sharding: sharding,
        jax.eval_shape(transformation.init, trainable),
        placed,
        transform_non_params=lambda _: layout.replicated,
    )
    return State(layout.replicated, placed, opt)  # pyright: ignore[reportArgumentType]


def token_sums(model: Llava, num_sources: int, chunks: int = 1, *, dropout: bool = True) -> Loss:
    """The loss of LLaVA's training, LoRA's dropout with it, unless it is only to be measured."""
    lora = model.config.language.lora
    drops = dropout and lora.rank > 0 and lora.dropout > 0

    def sums(trainable: Params, frozen: Params, batch: Batch, key_R: jax.Array) -> Sums:
        loss_RT = model.token_losses(
            optim.join(trainable, frozen),
            batch,
            chunks=chunks,
            dropout_key_R=key_R if drops else None,
        )
        weight_RT = batch.loss_weight_RT
        of_source_SRT = batch.source_RT[None] == jnp.arange(num_sources)[:, None, None]

        def by_source(x_RT):
            return jnp.sum(jnp.where(of_source_SRT, x_RT[None], 0.0), axis=(1, 2))

        weighted_RT = loss_RT * weight_RT
        return Sums(
            loss=jnp.sum(weighted_RT),
            weight=jnp.sum(weight_RT),
            loss_S=by_source(weighted_RT),
            weight_S=by_source(weight_RT),
        )

    return sums


def make_step(
    loss: Loss,
    adamw: AdamW,
    lr: Callable[[jax.Array], jax.Array],
    layout: Layout,
    *,
    parts: int = 1,
    groups: int = 1,
) -> Callable[[State, Params, Batch, jax.Array], tuple[State, Metrics]]:
    """parts: the batch is taken in so many, one after another, for want of memory. groups: the loss
    is the mean of the means over so many groups of rows, each of as many, one after another."""

    def gradients_of(trainable: Params, frozen: Params, rows: tuple[Batch, jax.Array]):
        def sums_of(trainable: Params, rows: tuple[Batch, jax.Array]):
            sums = loss(trainable, frozen, *rows)
            return sums.loss, sums

        def one(rows: tuple[Batch, jax.Array]) -> tuple[Sums, Params]:
            (_, sums), gradients = jax.value_and_grad(sums_of, has_aux=True)(trainable, rows)
            if parts > 1:
                # Else the compiler would move their sum over chips out of the loop over parts, and
                # fails at it on slices without rings (docs/log.md).
                gradients = jax.lax.optimization_barrier(gradients)
            return sums, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)

        def add(total: tuple[Sums, Params], number: jax.Array):
            part = jax.tree.map(lambda leaf: _part(leaf, parts, number), rows)
            return jax.tree.map(jnp.add, total, one(part)), None

        if parts == 1:
            sums, gradients = one(rows)
        else:
            shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: _part(leaf, parts, 0), rows))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (sums, gradients), _ = jax.lax.scan(add, zeros, jnp.arange(parts))
        return jax.tree.map(layout.sum_over_batch, sums), gradients

    def step(state: State, frozen: Params, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        if groups > 1:
            batch = _weighed_by_group(batch, groups)
        # A key for each row of the step, so that what is drawn depends on no mesh and no parts.
        key_R = jax.random.split(jax.random.fold_in(key, state.step), batch.token_RT.shape[0])
        rows = (batch, key_R)
        shardings = layout.param_shardings(state.trainable)
        program = layout.program(
            gradients_of,
            (shardings, layout.param_shardings(frozen), layout.batch_shardings(rows)),
            (Sums._make([layout.replicated] * len(Sums._fields)), shardings),
        )
        sums, gradients = program(state.trainable, frozen, rows)
        weight = jnp.maximum(sums.weight, 1.0)
        gradients = jax.tree.map(lambda leaf: leaf / weight, gradients)
        norm = optax.tree.norm(gradients)
        mean = sums.loss / weight
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        rate = lr(state.step)
        updates, opt = adamw.transformation(state.trainable).update(
            adamw.clipped(gradients, norm), state.opt, state.trainable
        )
        trained = jax.tree.map(
            lambda leaf, update: leaf - (rate * update).astype(leaf.dtype), state.trainable, updates
        )

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        after = State(state.step + 1, kept(trained, state.trainable), kept(opt, state.opt))
        return after, Metrics(
            loss=mean,
            loss_S=sums.loss_S,
            weight_S=sums.weight_S,
            norm=norm,
            lr=rate,
            skipped=1 - finite.astype(jnp.int32),
        )

    return step


def make_eval(loss: Loss, layout: Layout) -> Callable[[Params, Params, Batch], Sums]:
    """What the tokens of a batch lose, for held-out data. loss: one that draws nothing."""

    def measure(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        rows = (batch, jax.random.split(jax.random.key(0), batch.token_RT.shape[0]))
        program = layout.program(
            lambda *given: jax.tree.map(layout.sum_over_batch, loss(given[0], given[1], *given[2])),
            (
                layout.param_shardings(trainable),
                layout.param_shardings(frozen),
                layout.batch_shardings(rows),
            ),
            Sums._make([layout.replicated] * len(Sums._fields)),
        )
        return program(trainable, frozen, rows)

    return measure


def _weighed_by_group(batch: Batch, groups: int) -> Batch:
    """Weights that add up to 1 in each group of rows; a group without any stays without."""
    weight_RT = batch.loss_weight_RT
    if weight_RT.shape[0] % groups:
        raise ValueError(
            f"got {weight_RT.shape[0]} rows a step for {groups} groups, expected a multiple of them"
        )
    weight_GN = jnp.sum(weight_RT, axis=1).reshape(groups, -1)
    total_G1 = jnp.sum(weight_GN, axis=1, keepdims=True)
    total_R1 = jnp.broadcast_to(total_G1, weight_GN.shape).reshape(-1, 1)
    return batch._replace(loss_weight_RT=weight_RT / jnp.maximum(total_R1, 1e-9))


def _part(leaf: jax.Array, parts: int, number: jax.Array | int) -> jax.Array:
    """Every parts-th row from `number` on: so each device's rows are cut, and none travels."""
    rows = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, number, axis=1, keepdims=False)
