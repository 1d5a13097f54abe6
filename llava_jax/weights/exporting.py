"""A stored model as somebody else's folder: llava-hf's or the original LLaVA's.

hf        the hub's key names and file split, which transformers 4 and 5 and vLLM load; every
          setting written out, because readers' defaults differ
original  haotian-liu/LLaVA's keys, the vision tower inside

LoRA factors are merged; the formats of adapter.py keep them, and leave the rest out.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.conversation import template
from llava_jax.model_folder import About, Observer, Report, StoredModel
from llava_jax.weights import adapter, clip, io, llama, torch_files
from llava_jax.weights.adapter import ADAPTER_FORMATS, without_lora
from llava_jax.weights.chat_template import jinja
from llava_jax.weights.deltas import mean_row
from llava_jax.weights.keys import to_theirs
from llava_jax.weights.llava import HUB, ORIGINAL, with_identity
from llava_jax.weights.model_card import adapter_card, model_card
from llava_jax.weights.tensor import Tensor
from llava_jax.weights.tokenizer_files import (
    for_hugging_face,
    prefixes_behind_specials,
    with_added,
)

SHARD_BYTES = 5_000_000_000
FORMATS = ("hf", "original", *ADAPTER_FORMATS)
# Rows come in multiples of this, as in the hub's own folders.
_ROWS_MULTIPLE = 64
# The reference's two towers, by the size of their pictures.
_OPENAI_TOWERS = {
    224: "openai/clip-vit-large-patch14",
    336: "openai/clip-vit-large-patch14-336",
}


def export(
    stored: StoredModel,
    dst: epath.Path,
    format: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    projector_bin: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Report:
    """Writes the folder; it appears when it is complete. projector_bin: also mm_projector.bin."""
    _check(stored.about, format)
    if format in ADAPTER_FORMATS:
        return _export_adapter(stored, dst, format, on_bytes)
    stored = without_lora(stored)
    tensors, texts = (hugging_face if format == "hf" else original)(stored)
    with files.fresh_folder(dst) as folder:
        observer = Observer(on_bytes)
        io.write_safetensors(folder, tensors, shard_bytes=shard_bytes, on_tensor=observer)
        for name, content in texts.items():
            files.write_bytes(folder / name, content)
        if projector_bin:
            own = {k: t for k, t in tensors.items() if k.startswith(ORIGINAL.projector)}
            torch_files.write(folder / "mm_projector.bin", own)
        report = observer.report()
        files.write_text(folder / "README.md", model_card(stored, format, report))
    return report


def _export_adapter(
    stored: StoredModel, dst: epath.Path, format: str, on_bytes: Callable[[int], None]
) -> Report:
    parts = adapter.adapter(stored, format)
    with files.fresh_folder(dst) as folder:
        observer = Observer(on_bytes)
        io.write_file(folder / adapter.WEIGHTS, parts.factors, observer)
        files.write_bytes(folder / adapter.CONFIG, _json(parts.config))
        if parts.beside:
            torch_files.write(folder / adapter.BESIDE, parts.beside, observer)
            files.write_bytes(folder / "config.json", _json(_original_config(stored)))
        files.write_text(folder / "README.md", adapter_card(stored, format))
        return observer.report()


def exported_bytes(stored: StoredModel, format: str) -> int:
    """What an export will write, for a progress bar; refuses what cannot be written."""
    _check(stored.about, format)
    if format in ADAPTER_FORMATS:
        parts = adapter.adapter(stored, format)
        tensors = parts.factors | parts.beside
    else:
        tensors, _ = (hugging_face if format == "hf" else original)(without_lora(stored))
    return sum(tensor.nbytes for tensor in tensors.values())


def _check(about: About, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"got format {format!r}, expected one of {FORMATS}")
    if problem := not_expressible(about, format):
        raise ValueError(f"format {format!r} cannot express {problem}")


def not_expressible(about: About, format: str) -> str | None:
    """What of the model the format has no words for."""
    config = about.config
    depth = config.projector.depth
    problems = []
    hugging_face = format in ("hf", "peft")
    if depth == 0 or (hugging_face and depth > 2):
        problems.append(f"a projector of kind {config.projector.kind!r}")
    if not hugging_face and len(config.vision.select_layers) > 1:
        problems.append(f"features of several layers, {config.vision.select_layers}")
    if hugging_face and (config.row_end or about.image_mode == "anyres"):
        problems.append("tiles of a picture (anyres)")
    return ", nor ".join(problems) or None


# llava-hf.


def hugging_face(stored: StoredModel) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """The tensors under the hub's names, unread, and all other files."""
    about = stored.about
    tensors = to_theirs(HUB.rows(about.config), stored.leaves)
    if about.config.projector.kind == "linear":
        tensors = with_identity(tensors, HUB, about.config.projector.output_size)
    num_ids = about.config.language.num_ids
    image, pad = about.tokens.image, about.tokens.pad
    tokenizer, rows = stored.tokenizer_files(), num_ids
    if image is None:
        image, pad = num_ids, num_ids + 1
        rows = -(-(num_ids + 2) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        tensors = {key: _with_mean_rows(key, tensor, rows) for key, tensor in tensors.items()}
        tokenizer = with_added(tokenizer, {"<image>": image, "<pad>": pad}, pad="<pad>")
    tokenizer = for_hugging_face(tokenizer)
    texts = {
        "config.json": _hugging_face_config(stored, rows=rows, image=image, pad=pad),
        "generation_config.json": {
            "bos_token_id": about.tokens.bos,
            "eos_token_id": about.tokens.eos,
            "pad_token_id": pad,
        },
        **_processor(about),
    }
    conversation = template(
        about.template,
        start_end_tokens=about.start_end_tokens,
        text_restarts=about.text_restarts,
    )
    chat = jinja(conversation, prefixed=prefixes_behind_specials(tokenizer))
    texts["chat_template.json"] = {"chat_template": chat}
    as_bytes = {name: _json(value) for name, value in texts.items()}
    return tensors, {**as_bytes, "chat_template.jinja": chat.encode(), **tokenizer}


def _with_mean_rows(key: str, tensor: Tensor, rows: int) -> Tensor:
    """The embedding or head with rows for ids that are never said: the mean of the others, whose
    logit is the mean logit, so that none of them is ever the largest."""
    if key not in (f"{HUB.decoder}embed_tokens.weight", f"{HUB.head}weight"):
        return tensor

    def read() -> np.ndarray:
        known = tensor.read()
        new = np.broadcast_to(mean_row(known), (rows - len(known), known.shape[1]))
        return np.concatenate([known, new.astype(known.dtype)])

    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, read, tensor.origin)


def _hugging_face_config(
    stored: StoredModel, *, rows: int, image: int, pad: int | None
) -> dict[str, Any]:
    about = stored.about
    config, layers = about.config, about.config.vision.select_layers
    tokens = {
        "bos_token_id": about.tokens.bos,
        "eos_token_id": about.tokens.eos,
        "pad_token_id": pad,
    }
    text = llama.write_config(config.language, vocab_rows=rows, context=about.context)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "image_seq_length": config.tokens_per_image,
        "ignore_index": -100,
        "projector_hidden_act": "linear" if config.projector.kind == "linear" else "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": "default" if config.vision.select == "patch" else "full",
        "tie_word_embeddings": config.language.tie_embeddings,
        "torch_dtype": _main_dtype(stored),
        **tokens,
        "text_config": {**text, **tokens, "torch_dtype": _main_dtype(stored)},
        "vision_config": clip.write_config(config.vision),
    }


def _processor(about: About) -> dict[str, Any]:
    """Both files of the old split, which every version reads."""
    vision = about.config.vision
    return {
        "preprocessor_config.json": {
            # Its do_pad is what LLaVA-1.5 was trained with; CLIP's own processor has none.
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_pad": about.image_mode == "pad",
            **clip.write_preprocessor(vision),
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "default" if vision.select == "patch" else "full",
            # The class token: without it a processor counts one placeholder too few.
            "num_additional_image_tokens": 1,
        },
    }


# The original LLaVA.


def original(stored: StoredModel) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """The tensors under the original's names, unread, and all other files."""
    tensors = to_theirs(ORIGINAL.rows(stored.about.config), stored.leaves)
    texts = {
        "config.json": _json(_original_config(stored)),
        "generation_config.json": _json(
            {
                "bos_token_id": stored.about.tokens.bos,
                "eos_token_id": stored.about.tokens.eos,
                "pad_token_id": _original_pad(stored.about),
            }
        ),
    }
    return tensors, {**texts, **stored.tokenizer_files()}


def _original_pad(about: About) -> int:
    return 0 if about.tokens.pad is None else about.tokens.pad  # <unk>, as the reference pads


def _original_config(stored: StoredModel) -> dict[str, Any]:
    about = stored.about
    vision, language = about.config.vision, about.config.language
    modes = {"crop": "square", "pad": "pad", "anyres": "anyres"}
    return {
        **llama.write_config(language, vocab_rows=language.num_ids, context=about.context),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "bos_token_id": about.tokens.bos,
        "eos_token_id": about.tokens.eos,
        "pad_token_id": _original_pad(about),
        "torch_dtype": _main_dtype(stored),
        "image_aspect_ratio": modes[about.image_mode],
        "mm_hidden_size": vision.feature_size,
        "mm_projector_type": about.config.projector.kind,
        "mm_use_im_start_end": about.start_end_tokens,
        "mm_use_im_patch_token": about.tokens.image_patch is not None,
        "mm_vision_select_feature": vision.select,
        "mm_vision_select_layer": vision.select_layers[0],
        "mm_vision_tower": about.tower or _OPENAI_TOWERS.get(vision.image_size, "unknown"),
        # Not read by the reference, which takes the tower's shape from its own repository.
        "mm_vision_config": clip.write_config(vision),
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }


def _main_dtype(stored: StoredModel) -> str:
    """The dtype of most bytes, which loaders take for all."""
    sizes: dict[str, int] = {}
    for tensor in stored.leaves.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
