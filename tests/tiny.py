"""A tiny LLaVA that still has every kind of part, and batches for it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from llava_jax import batch as batches
from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import Llava, LlavaConfig
from llava_jax.models.projector import ProjectorConfig

# Grouped heads, an MLP projector, added vocabulary; every width divides by 8 devices.
CONFIG = LlavaConfig(
    vision=ClipConfig(32, 64, 2, 4, image_size=28, patch_size=14),
    projector=ProjectorConfig("mlp2x_gelu", 32, 64),
    language=LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        added_vocab=2,
    ),
)


def with_language(**changes: Any) -> LlavaConfig:
    return dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, **changes))


def draw_params(config: LlavaConfig = CONFIG, seed: int = 0) -> Any:
    """A fresh tree with every leaf random: no zeros or ones that would hide a leaf's effect."""
    shapes = jax.eval_shape(Llava(config).init, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    drawn = [(0.1 * rng.standard_normal(leaf.shape)).astype(np.float32) for leaf in leaves]
    return jax.tree.map_with_path(
        lambda path, leaf: leaf + ("scale" in str(path[-1])), jax.tree.unflatten(treedef, drawn)
    )


def draw_batch(
    config: LlavaConfig = CONFIG, *, rows: int = 8, tokens: int = 40, images: int = 2, seed: int = 0
) -> batches.Batch:
    """A valid packed batch that uses the added ids too."""
    return batches.fake_batch(
        rows=rows,
        tokens=tokens,
        images=images,
        tokens_per_image=config.tokens_per_image,
        image_size=config.vision.image_size,
        vocab_size=config.language.num_ids,
        seed=seed,
    )
