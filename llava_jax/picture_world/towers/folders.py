"""The trained towers as Hugging Face's own folders: a CLIP's vision model, and a LLaMA.

`launch/convert.py import` reads them as it reads those that are downloaded.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from llava_jax.conversation import template
from llava_jax.models.llava import LlavaConfig
from llava_jax.optim import Params
from llava_jax.sharding import leaf_paths
from llava_jax.weights import clip, io, llama
from llava_jax.weights.chat_template import jinja
from llava_jax.weights.keys import Row, to_theirs
from llava_jax.weights.memory import stored_from_memory
from llava_jax.weights.tensor import Tensor, in_memory

CONTEXT = 2048


def write_clip(folder: epath.Path, config: LlavaConfig, vision: Params) -> None:
    """config.json, the pictures' preprocessing, and the weights, all blocks of them."""
    every = dataclasses.replace(config.vision, select_layers=(-1,), select="patch")
    config = dataclasses.replace(config, vision=every)
    leaves = _stored(config, {"vision": vision})
    # Behind the last block, for the class token alone: our loss took it as it was.
    width = np.ones(every.hidden_size, np.float32)
    leaves["vision/post_norm/scale"] = in_memory(width, "post_norm")
    leaves["vision/post_norm/bias"] = in_memory(0 * width, "post_norm")
    texts = {
        "config.json": {
            "architectures": ["CLIPVisionModel"],
            **clip.write_config(every),
            "torch_dtype": "float32",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            **clip.write_preprocessor(every),
        },
    }
    _write(folder, clip.rows("vision_model.", every), leaves, texts)


def write_llama(
    folder: epath.Path, config: LlavaConfig, language: Params, tokenizer: Mapping[str, bytes]
) -> None:
    """config.json, the weights, the tokenizer's files, and the chat template v1.

    A tied table is written as two, as LLaMA's are: what fine-tunes them may take them apart.
    """
    if config.language.tie_embeddings:
        untied = dataclasses.replace(config.language, tie_embeddings=False)
        config = dataclasses.replace(config, language=untied)
        language = {**language, "head": {"kernel": language["embed"]["table"].T}}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    own = llama.write_config(config.language, vocab_rows=config.language.num_ids, context=CONTEXT)
    texts = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            **own,
            **ids,
            "torch_dtype": "float32",
        },
        "generation_config.json": ids,
    }
    rows = llama.rows("model.", "lm_head.", config.language)
    _write(folder, rows, _stored(config, {"language": language}), texts)
    (folder / "chat_template.jinja").write_text(jinja(template("v1"), prefixed=False))
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)


def sha256(file: epath.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _stored(config: LlavaConfig, params: Params) -> dict[str, Tensor]:
    paths = jax.tree.leaves(leaf_paths(params))
    arrays = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(params)]
    tree = {path: in_memory(array, path) for path, array in zip(paths, arrays, strict=True)}
    return stored_from_memory(config, tree)


def _write(
    folder: epath.Path,
    rows: tuple[Row, ...],
    leaves: Mapping[str, Tensor],
    texts: Mapping[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    io.write_safetensors(folder, to_theirs(rows, leaves))
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
