"""Tiny random checkpoints in other people's layouts, their keys spelled out here by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from llava_jax.weights import io
from llava_jax.weights.tensor import in_memory
from tests.tiny_tokenizer import write_tokenizer

State = dict[str, np.ndarray]

WIDTH, MLP, LAYERS, VOCAB = 48, 96, 2, 512
TOWER, TOWER_MLP, BLOCKS, SIDE, PATCH = 32, 64, 3, 56, 14
PATCHES = (SIDE // PATCH) ** 2
DTYPES = {
    "float32": (np.float32,),
    "float16": (np.float16,),
    "bfloat16": (ml_dtypes.bfloat16,),
    "mixed": (np.float16, np.float32, ml_dtypes.bfloat16),
}

VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": TOWER,
    "intermediate_size": TOWER_MLP,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 24,
}
TEXT_CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}


def tower(prefix: str) -> dict[str, tuple[int, ...]]:
    shapes = {
        "embeddings.class_embedding": (TOWER,),
        "embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (PATCHES + 1, TOWER),
        "pre_layrnorm.weight": (TOWER,),
        "pre_layrnorm.bias": (TOWER,),
        "post_layernorm.weight": (TOWER,),
        "post_layernorm.bias": (TOWER,),
    }
    for i in range(BLOCKS):
        block = f"encoder.layers.{i}."
        for name in ("q", "k", "v", "out"):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (TOWER, TOWER)
            shapes[f"{block}self_attn.{name}_proj.bias"] = (TOWER,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{block}{name}.weight"] = shapes[f"{block}{name}.bias"] = (TOWER,)
        shapes[f"{block}mlp.fc1.weight"] = (TOWER_MLP, TOWER)
        shapes[f"{block}mlp.fc1.bias"] = (TOWER_MLP,)
        shapes[f"{block}mlp.fc2.weight"] = (TOWER, TOWER_MLP)
        shapes[f"{block}mlp.fc2.bias"] = (TOWER,)
    return {prefix + name: shape for name, shape in shapes.items()}


def decoder(prefix: str, rows: int) -> dict[str, tuple[int, ...]]:
    shapes = {"embed_tokens.weight": (rows, WIDTH), "norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"layers.{i}."
        shapes[f"{layer}self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}self_attn.k_proj.weight"] = (WIDTH // 2, WIDTH)
        shapes[f"{layer}self_attn.v_proj.weight"] = (WIDTH // 2, WIDTH)
        shapes[f"{layer}self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}mlp.gate_proj.weight"] = (MLP, WIDTH)
        shapes[f"{layer}mlp.up_proj.weight"] = (MLP, WIDTH)
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, MLP)
        shapes[f"{layer}input_layernorm.weight"] = (WIDTH,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (WIDTH,)
    return {prefix + name: shape for name, shape in shapes.items()}


def matrices(*names: str) -> dict[str, tuple[int, ...]]:
    """A projector's, the first from the tower's width."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, name in enumerate(names):
        shapes[f"{name}.weight"] = (WIDTH, WIDTH if i else TOWER)
        shapes[f"{name}.bias"] = (WIDTH,)
    return shapes


# The four layouts of llava-hf: what its repositories hold, and what transformers 5 saves.
HUGGING_FACE = {
    "hub": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.",
            "language_model.lm_head.weight"),
    "hub, plain tower": ("vision_tower.", "multi_modal_projector.", "language_model.model.",
                         "language_model.lm_head.weight"),
    "in memory": ("model.vision_tower.vision_model.", "model.multi_modal_projector.",
                  "model.language_model.", "lm_head.weight"),
    "in memory, plain tower": ("model.vision_tower.", "model.multi_modal_projector.",
                               "model.language_model.", "lm_head.weight"),
}  # fmt: skip
ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."


def hugging_face_shapes(layout: str, rows: int) -> dict[str, tuple[int, ...]]:
    vision, projector, language, head = HUGGING_FACE[layout]
    return {
        **tower(vision),
        **matrices(f"{projector}linear_1", f"{projector}linear_2"),
        **decoder(language, rows),
        head: (rows, WIDTH),
    }


def original_shapes(
    rows: int, *, linear: bool = False, with_tower: bool = True
) -> dict[str, tuple[int, ...]]:
    names = ["model.mm_projector"] if linear else ["model.mm_projector.0", "model.mm_projector.2"]
    return {
        **(tower(ORIGINAL_TOWER) if with_tower else {}),
        **matrices(*names),
        **decoder("model.", rows),
        "lm_head.weight": (rows, WIDTH),
    }


def draw(shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32", seed: int = 0) -> State:
    """Random values; norms' scales around 1, as in a model that works."""
    rng, kinds = np.random.default_rng(seed), DTYPES[dtype]
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        values = around + 0.2 * rng.standard_normal(shape)
        state[name] = values.astype(kinds[i % len(kinds)])
    return state


def write(
    folder: Path,
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    added: Sequence[str] = (),
    tokenizer: bool = True,
    shard_bytes: int = 10**9,
) -> Path:
    """A folder of these weights; `added`: tokens behind the tiny tokenizer's vocabulary."""
    folder.mkdir(parents=True)
    tensors = {name: in_memory(array, name) for name, array in state.items()}
    io.write_safetensors(epath.Path(folder), tensors, shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder, added, vocab_size=VOCAB)
    return folder


def hugging_face(
    folder: Path, layout: str = "hub", dtype: str = "float32", **options: Any
) -> tuple[Path, State]:
    """A llava-hf folder of 64 more rows than its tokenizer has ids, as the hub's are."""
    rows = VOCAB + 64
    state = draw(hugging_face_shapes(layout, rows), dtype)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": VOCAB,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {**TEXT_CONFIG, "vocab_size": rows},
        "vision_config": VISION_CONFIG,
        "pad_token_id": VOCAB + 1,
    }
    return write(folder, state, config, added=("<image>", "<pad>"), **options), state


def original(
    folder: Path,
    dtype: str = "float32",
    *,
    linear: bool = False,
    with_tower: bool = True,
    added: Sequence[str] = (),
    **options: Any,
) -> tuple[Path, State]:
    rows = VOCAB + len(added)
    state = draw(original_shapes(rows, linear=linear, with_tower=with_tower), dtype)
    config = {**original_config(rows, linear), "mm_use_im_start_end": "<im_start>" in added}
    return write(folder, state, config, added=added, **options), state


def original_config(rows: int, linear: bool = False) -> dict[str, Any]:
    return {
        **TEXT_CONFIG,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": rows,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_hidden_size": TOWER,
        "mm_projector_type": "linear" if linear else "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_use_im_start_end": linear,
        "image_aspect_ratio": "square" if linear else "pad",
        # What the tensors of a tower inside cannot say of so narrow a one.
        "mm_vision_config": {"num_attention_heads": 4},
    }


def clip(folder: Path, dtype: str = "float32") -> tuple[Path, State]:
    """A whole CLIP, with a text side of its own."""
    text = {"text_model.final_layer_norm.weight": (8,), "logit_scale": ()}
    state = draw({**tower("vision_model."), **text}, dtype, seed=1)
    config = {"model_type": "clip", "vision_config": VISION_CONFIG}
    return write(folder, state, config, tokenizer=False), state


def llama(folder: Path, dtype: str = "float32") -> tuple[Path, State]:
    state = draw({**decoder("model.", VOCAB), "lm_head.weight": (VOCAB, WIDTH)}, dtype, seed=2)
    return write(folder, state, {**TEXT_CONFIG, "vocab_size": VOCAB}), state


def same(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    """Equal names, shapes, dtypes and bits."""
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        assert got[name].tobytes() == array.tobytes(), name
    return True


def read(folder: Path) -> State:
    return {name: tensor.read() for name, tensor in io.read_weights(folder).items()}


def read_file(file: Path) -> State:
    return {name: tensor.read() for name, tensor in io.read_file(file).items()}


def write_file(file: Path, state: Mapping[str, np.ndarray]) -> None:
    io.write_file(epath.Path(file), {name: in_memory(x, name) for name, x in state.items()})
