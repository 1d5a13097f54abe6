"""A random transformers model beside ours: its config from ours, our parameter tree from its.

Small on purpose: the tables for released weights, in both directions, are not here.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.projector import ResamplerConfig
from tests.conftest import import_torch

State = Mapping[str, np.ndarray]
EAGER: dict[str, Any] = {"attn_implementation": "eager"}  # plain matmuls and a softmax


def apart(ours, theirs) -> float:
    """The largest difference, relative to the largest value of the reference."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def torch_pixels(pixel_IHW3: np.ndarray, config: ClipConfig) -> Any:
    """What an image processor makes of pixels that need no resizing."""
    mean, std = (np.array(x, np.float32) for x in (config.image_mean, config.image_std))
    normal_IHW3 = (pixel_IHW3.astype(np.float32) / np.float32(255) - mean) / std
    return import_torch().from_numpy(normal_IHW3.transpose(0, 3, 1, 2).copy())


def clip_config(c: ClipConfig) -> Any:
    import_torch()
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        image_size=c.image_size,
        patch_size=c.patch_size,
        hidden_act=c.hidden_act,
        layer_norm_eps=c.layer_norm_eps,
        **EAGER,
    )


def llama_config(c: LlamaConfig) -> Any:
    import_torch()
    from transformers import LlamaConfig as TheirLlamaConfig

    rope: dict[str, Any] = {"rope_type": c.rope.kind, "rope_theta": c.rope.theta}
    if c.rope.kind != "default":
        rope["factor"] = c.rope.factor
    if c.rope.kind == "llama3":
        rope["low_freq_factor"] = c.rope.low_freq_factor
        rope["high_freq_factor"] = c.rope.high_freq_factor
        rope["original_max_position_embeddings"] = c.rope.original_max_position
    return TheirLlamaConfig(
        vocab_size=c.num_ids,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.size_of_head,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=131072,  # no part of the function; room for every scaling
        hidden_act=c.hidden_act,
        tie_word_embeddings=c.tie_embeddings,
        **EAGER,
    )


def randomise(model: Any, seed: int = 0) -> None:
    """Draws every parameter so that none can go missing unseen: norms' scales are not 1, biases
    not 0, and matrices keep activations near 1, where attention and activations bend."""
    torch, rng = import_torch(), np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            std = 0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            is_scale = len(shape) == 1 and name.endswith("weight")
            # Large ones repeat after a prime number of draws, so that no two rows are alike.
            draws = rng.standard_normal(min(parameter.numel(), 100_003), np.float32)
            draws = std * draws + np.float32(is_scale)
            parameter.copy_(torch.from_numpy(np.resize(draws, shape)))
    model.eval()


def state_of(model: Any) -> State:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def gradients_of(model: Any) -> State:
    """By the names of the state, so that they map onto our tree as the weights do; zero where a
    parameter took no part. A tied head's gradient is in the embedding's."""
    gradients = {
        name: np.zeros_like(parameter.detach().numpy())
        if parameter.grad is None
        else parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }
    gradients.setdefault("lm_head.weight", gradients["model.language_model.embed_tokens.weight"])
    return gradients


def inside(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def dense(state: State, name: str, output_first: bool = False) -> dict[str, np.ndarray]:
    kernel = state[f"{name}.weight"]
    bias = {"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {}
    return {"kernel": kernel if output_first else kernel.T, **bias}


def norm(state: State, name: str) -> dict[str, np.ndarray]:
    bias = {"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {}
    return {"scale": state[f"{name}.weight"], **bias}


def stacked(blocks: list[dict], count: int) -> dict:
    """The first `count` of the blocks, as one; it may be none of them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves)[:count], *blocks)


def clip_params(state: State, config: ClipConfig) -> dict:
    def block(state: State) -> dict:
        return {
            "attention_norm": norm(state, "layer_norm1"),
            **{name: dense(state, f"self_attn.{name}_proj") for name in "qkv"},
            "o": dense(state, "self_attn.out_proj", output_first=True),
            "mlp_norm": norm(state, "layer_norm2"),
            "fc1": dense(state, "mlp.fc1"),
            "fc2": dense(state, "mlp.fc2", output_first=True),
        }

    kernel_D3pp = state["embeddings.patch_embedding.weight"]
    blocks = [block(inside(state, f"encoder.layers.{i}.")) for i in range(config.num_layers)]
    return {
        "patch_kernel": kernel_D3pp.transpose(0, 2, 3, 1).reshape(config.hidden_size, -1),
        "class_token": state["embeddings.class_embedding"],
        "position": state["embeddings.position_embedding.weight"],
        "pre_norm": norm(state, "pre_layrnorm"),
        "layers": stacked(blocks, config.num_blocks),
    }


def llama_params(state: State, config: LlamaConfig, head_VD: np.ndarray) -> dict:
    """state: of the model without its head."""

    def block(state: State) -> dict:
        return {
            "attention_norm": norm(state, "input_layernorm"),
            **{name: dense(state, f"self_attn.{name}_proj") for name in "qkv"},
            "o": dense(state, "self_attn.o_proj", output_first=True),
            "mlp_norm": norm(state, "post_attention_layernorm"),
            "gate": dense(state, "mlp.gate_proj"),
            "up": dense(state, "mlp.up_proj"),
            "down": dense(state, "mlp.down_proj", output_first=True),
        }

    def split(table_VD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the original vocabulary with zeros behind it, the added rows)"""
        padded_VD = np.zeros((config.padded_vocab, config.hidden_size), np.float32)
        padded_VD[: config.vocab_size] = table_VD[: config.vocab_size]
        return padded_VD, table_VD[config.vocab_size :]

    blocks = [block(inside(state, f"layers.{i}.")) for i in range(config.num_layers)]
    table_VD, added_AD = split(state["embed_tokens.weight"])
    kernel_VD, added_head_AD = split(head_VD)
    has_added = config.added_vocab > 0
    params = {
        "embed": {"table": table_VD, **({"added": added_AD} if has_added else {})},
        "decoder": {"layers": stacked(blocks, config.num_layers), "norm": norm(state, "norm")},
    }
    if not config.tie_embeddings:
        added_head = {"added": added_head_AD.T} if has_added else {}
        params["head"] = {"kernel": kernel_VD.T, **added_head}
    return params


def mlp_params(state: State, *names: str) -> dict:
    """names: of the projector's matrices, in order."""
    return {f"linear_{i}": dense(state, name) for i, name in enumerate(names)}


def resampler_params(state: State, config: ResamplerConfig) -> dict:
    """state: of a module with `query`, `qformer` (Blip2QFormerModel) and `linear`."""

    def attend(state: State, ours: str, theirs: str) -> dict:
        parts = {"q": "query", "k": "key", "v": "value"}
        return {
            **{f"{ours}_{p}": dense(state, f"{theirs}.attention.{parts[p]}") for p in parts},
            f"{ours}_o": dense(state, f"{theirs}.output.dense", output_first=True),
            f"{ours}_norm": norm(state, f"{theirs}.output.LayerNorm"),
        }

    def block(state: State) -> dict:
        return {
            **attend(state, "self", "attention"),
            **attend(state, "cross", "crossattention"),
            "fc1": dense(state, "intermediate_query.dense"),
            "fc2": dense(state, "output_query.dense", output_first=True),
            "mlp_norm": norm(state, "output_query.LayerNorm"),
        }

    names = [f"qformer.encoder.layer.{i}." for i in range(config.num_layers)]
    return {
        "query": state["query"],
        "query_norm": norm(state, "qformer.layernorm"),
        "layers": stacked([block(inside(state, name)) for name in names], len(names)),
        **mlp_params(state, "linear"),
    }
