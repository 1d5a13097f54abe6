"""The small towers of the picture world, pre-trained: what CLIP and Vicuna are to LLaVA.

python -m llava_jax.picture_world.towers --config configs/towers.py:clip --out towers

Variants: clip (the vision tower, contrastive, with phrases about regions) and llama (the language
model, on text alone). llava_jax/picture_world/towers holds what was trained so, with the figures in
training.json.
"""

from llava_jax import config as c

VARIANTS = {
    "clip": {
        "kind": "clip",
        "seed": 0,
        "image_size": 48,
        "patch_size": 8,
        "width": 64,
        "mlp_width": 192,
        "layers": 4,
        "heads": 4,
        "text_width": 64,
        "text_layers": 2,
        "steps": 2400,
        "batch": 48,
        "captioned": 16,
        "lr": 2e-3,
    },
    "llama": {
        "kind": "llama",
        "seed": 0,
        "width": 128,
        "mlp_width": 256,
        "layers": 4,
        "heads": 4,
        "steps": 3000,
        "batch": 8,
        "tokens": 256,
        "lr": 3e-3,
        "noise": 0.3,
    },
}


def get_config(variant: str = "clip"):
    return dict(c.variants(VARIANTS, variant))
