"""Writes the programs of this folder anew: JAX_PLATFORMS=cpu python -m tests.planner.programs.write

A loop of 3 turns over weights that are gathered, multiplied and let go, its gradients scattered
back, and rows looked up in a table: what a training step is made of, for a slice of 4 chips.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.planner.topology import topology

FOLDER = Path(__file__).resolve().parent
LAYERS, TOKENS, WIDTH, WORDS = 3, 256, 1024, 4096


def step(weights_LDF, table_VD, ids_T):
    def loss(weights_LDF, table_VD):
        def layer(x_TD, own_DF):
            full_DF = jax.lax.all_gather(own_DF, "chips", axis=0, tiled=True)
            return jnp.maximum(x_TD @ full_DF, 0), None

        x_TD, _ = jax.lax.scan(layer, table_VD[ids_T], weights_LDF)
        return jnp.sum(x_TD.astype(jnp.float32) ** 2)

    value, gradients = jax.value_and_grad(loss, (0, 1))(weights_LDF, table_VD)
    return jax.lax.psum(value, "chips"), gradients[0], jax.lax.psum(gradients[1], "chips")


def scheduled(slice_name: str) -> str:
    mesh = jax.make_mesh((4,), ("chips",), devices=topology(slice_name).devices())
    specs = (P(None, "chips"), P(), P("chips"))
    shapes = (
        ((LAYERS, WIDTH, WIDTH), "bfloat16"),
        ((WORDS, WIDTH), "bfloat16"),
        ((4 * TOKENS,), "int32"),
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, specs, strict=True)
    ]
    program = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=(P(), specs[0], P()), check_vma=False
    )
    text = jax.jit(program).lower(*arguments).compile().as_text()
    assert text is not None
    # Without the tables of files and frames, which are of the machine that compiled.
    head, _, rest = re.sub(r" stack_frame_id=\d+", "", text).partition("\n")
    first = re.search(r"^(%|ENTRY )", rest, re.MULTILINE)
    assert first
    return f"{head}\n\n{rest[first.start() :]}"


if __name__ == "__main__":
    for name in ("v5e-4", "v5p-8"):
        (FOLDER / f"{name}.txt").write_text(scheduled(name))
