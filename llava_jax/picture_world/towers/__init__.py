"""Pre-trains the small towers of the picture world: what CLIP and Vicuna are to LLaVA.

`python -m llava_jax.picture_world.towers --config configs/towers.py:clip --out DIR` trains the
vision tower, contrastively, on pictures, captions and phrases about regions, and writes DIR/clip;
`--config configs/towers.py:llama` trains the language model, on text alone, and writes DIR/llama.
Both are folders as Hugging Face has them, which `launch/convert.py import` reads, with a
training.json beside the weights: settings, time, figures, and the weights' SHA-256.

What they gave is shipped beside this file: path("clip"), path("llama").
"""

from pathlib import Path


def path(name: str) -> Path:
    """The folder of a shipped tower, "clip" or "llama"."""
    return Path(__file__).parent / name
