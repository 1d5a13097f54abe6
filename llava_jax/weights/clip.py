"""CLIP's vision tower: its keys, and its config.json both ways.

All blocks are in the table, also those above the selected layer, and the norm behind the last:
the model never runs them, other people's loaders want them.
"""

from typing import Any

from llava_jax.models.clip_vit import ClipConfig
from llava_jax.weights.keys import PATCHES, TRANSPOSED, Row, table
from llava_jax.weights.settings import Settings

_ROWS = (
    Row("patch_kernel", "embeddings.patch_embedding.weight", PATCHES),
    Row("class_token", "embeddings.class_embedding"),
    Row("position", "embeddings.position_embedding.weight"),
    Row("pre_norm/scale", "pre_layrnorm.weight"),  # spelt so in every checkpoint
    Row("pre_norm/bias", "pre_layrnorm.bias"),
    Row("layers/{}/attention_norm/scale", "encoder.layers.{}.layer_norm1.weight"),
    Row("layers/{}/attention_norm/bias", "encoder.layers.{}.layer_norm1.bias"),
    Row("layers/{}/q/kernel", "encoder.layers.{}.self_attn.q_proj.weight", TRANSPOSED),
    Row("layers/{}/q/bias", "encoder.layers.{}.self_attn.q_proj.bias"),
    Row("layers/{}/k/kernel", "encoder.layers.{}.self_attn.k_proj.weight", TRANSPOSED),
    Row("layers/{}/k/bias", "encoder.layers.{}.self_attn.k_proj.bias"),
    Row("layers/{}/v/kernel", "encoder.layers.{}.self_attn.v_proj.weight", TRANSPOSED),
    Row("layers/{}/v/bias", "encoder.layers.{}.self_attn.v_proj.bias"),
    Row("layers/{}/o/kernel", "encoder.layers.{}.self_attn.out_proj.weight"),
    Row("layers/{}/o/bias", "encoder.layers.{}.self_attn.out_proj.bias"),
    Row("layers/{}/mlp_norm/scale", "encoder.layers.{}.layer_norm2.weight"),
    Row("layers/{}/mlp_norm/bias", "encoder.layers.{}.layer_norm2.bias"),
    Row("layers/{}/fc1/kernel", "encoder.layers.{}.mlp.fc1.weight", TRANSPOSED),
    Row("layers/{}/fc1/bias", "encoder.layers.{}.mlp.fc1.bias"),
    Row("layers/{}/fc2/kernel", "encoder.layers.{}.mlp.fc2.weight"),
    Row("layers/{}/fc2/bias", "encoder.layers.{}.mlp.fc2.bias"),
    Row("post_norm/scale", "post_layernorm.weight"),
    Row("post_norm/bias", "post_layernorm.bias"),
)

# Buffers of older checkpoints that are counted, not learned: 0, 1, 2, …
DERIVED = r"embeddings\.position_ids"


def rows(prefix: str, config: ClipConfig) -> tuple[Row, ...]:
    """The tower's keys behind `prefix`, which differs from checkpoint to checkpoint."""
    return table(_ROWS, ours="vision/", theirs=prefix, layers=config.num_layers)


def read_config(settings: Settings, **ours: Any) -> ClipConfig:
    """From a CLIPVisionConfig. ours: what CLIP's own file does not say (select_layers, …)."""
    model_type = settings.get("model_type", str, "clip_vision_model")
    if model_type != "clip_vision_model":
        raise ValueError(
            f"{settings.where}: the vision tower is a {model_type!r}, expected 'clip_vision_model'"
        )
    return ClipConfig(
        hidden_size=settings.size("hidden_size", 768),
        intermediate_size=settings.size("intermediate_size", 3072),
        num_layers=settings.size("num_hidden_layers", 12),
        num_heads=settings.size("num_attention_heads", 12),
        image_size=settings.size("image_size", 224),
        patch_size=settings.size("patch_size", 32),
        hidden_act=settings.get("hidden_act", str, "quick_gelu"),
        layer_norm_eps=settings.get("layer_norm_eps", float, 1e-5),
        **ours,
    )


def write_config(config: ClipConfig) -> dict[str, Any]:
    """In full: readers' defaults differ between their versions."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": 0.0,
        "projection_dim": 768,
    }


def write_preprocessor(config: ClipConfig) -> dict[str, Any]:
    """What CLIP's own processor does to a picture; a kind's name and more come with it."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
