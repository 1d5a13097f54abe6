"""The released LLaVAs as they lie on the hub: every name, shape and dtype, and their JSON.

Spelt out here apart from the package's own key tables, which are judged by it. `lay_out` makes the
folders with holes for values: names and sizes of 26 GB take no room on a disk, and tests can open
them as they are; benchmarks/convert.py fills them.

    hf         llava-hf/llava-1.5-7b-hf and -13b-hf
    original   liuhaotian/llava-v1.5-7b and -13b, and the merged checkpoints of 2023 (v1-…); all
               without the vision tower, which is in openai's CLIP folder
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_tokenizer import model_bytes

LAYOUTS = ("hf", "original")
V1_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a file says of a tensor before its values."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


Specs = dict[str, Spec]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of the hub. texts: its JSON by name. added: tokens behind the 32000 of LLaMA's
    tokenizer; None: a folder without a tokenizer."""

    specs: Specs
    shard_bytes: int
    texts: Mapping[str, Any]
    vocab_size: int = 32000
    added: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Release:
    """model, and the CLIP folder to give as base, where the tower is not inside.

    comes_back: for each tensor of an export in the same layout, the key it is released under.
    """

    model: Folder
    clip: Folder | None
    comes_back: Mapping[str, str]

    @property
    def folders(self) -> dict[str, Folder]:
        return {"model": self.model} | ({"clip": self.clip} if self.clip else {})

    @property
    def exported(self) -> Specs:
        """What an export has to hold."""
        specs = {**self.model.specs, **(self.clip.specs if self.clip else {})}
        return {key: specs[released] for key, released in self.comes_back.items()}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.exported.values())


@dataclasses.dataclass(frozen=True)
class _Sizes:
    width: int = 4096
    mlp: int = 11008
    layers: int = 32
    heads: int = 32
    vocab_size: int = 32000
    clip_width: int = 1024
    clip_mlp: int = 4096
    clip_layers: int = 24
    clip_heads: int = 16
    side: int = 336
    v1: bool = False
    shard: float = 1.0  # of the usual size of files


VARIANTS = {
    "v1.5-7b": _Sizes(),
    "v1.5-13b": _Sizes(5120, 13824, 40, 40),
    "v1-7b": _Sizes(side=224, v1=True),
    "v1-13b": _Sizes(5120, 13824, 40, 40, side=224, v1=True),
    # Released by nobody: the same shapes in a few hundred kB.
    "tiny": _Sizes(64, 160, 2, 4, 512, 128, 256, 3, 2, side=28, shard=1e-4),
}


def release(variant: str, layout: str, added: tuple[str, ...] = V1_TOKENS) -> Release:
    """added: rows of a v1 checkpoint beyond LLaMA's, by the names of their tokens."""
    if variant not in VARIANTS or layout not in LAYOUTS:
        raise ValueError(f"got {variant!r} as {layout!r}, expected {[*VARIANTS]} as {LAYOUTS}")
    sizes = VARIANTS[variant]
    if sizes.v1 and layout == "hf":
        raise ValueError(f"{variant} was never released as 'hf'; expected 'original'")
    return _hf(sizes) if layout == "hf" else _original(sizes, added if sizes.v1 else ())


# llava-hf.


def _hf(s: _Sizes) -> Release:
    rows = s.vocab_size + 64
    specs = _tower("vision_tower.vision_model.", s, "float16")
    for number, inputs in (("1", s.clip_width), ("2", s.width)):
        specs[f"multi_modal_projector.linear_{number}.weight"] = Spec("float16", (s.width, inputs))
        specs[f"multi_modal_projector.linear_{number}.bias"] = Spec("float16", (s.width,))
    specs |= _llama("language_model.model.", "language_model.lm_head.weight", s, rows)
    text = {
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": rows,
    }
    if (s.width, s.layers) != (
        4096,
        32,
    ):  # the 7B's sizes are LlamaConfig's own, so its file leaves them out
        text |= _llama_sizes(s)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": s.vocab_size,
        "model_type": "llava",
        "pad_token_id": s.vocab_size + 1,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": _clip_sizes(s) | {"vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": rows,
    }
    processor = {"image_processor_type": "CLIPImageProcessor"}
    texts = {"config.json": config, "preprocessor_config.json": processor}
    model = Folder(specs, int(5e9 * s.shard), texts, s.vocab_size, ("<image>", "<pad>"))
    return Release(model, None, {key: key for key in specs})


# The original.


def _original(s: _Sizes, added: tuple[str, ...]) -> Release:
    rows = s.vocab_size + len(added)
    specs = _llama("model.", "lm_head.weight", s, rows)
    learned = list(specs)
    # Buffers that transformers saved until 4.32.
    for i in range(s.layers):
        key = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        specs[key] = Spec("float32", (s.width // s.heads // 2,))
    names = {"": s.clip_width} if s.v1 else {"0.": s.clip_width, "2.": s.width}
    for name, inputs in names.items():
        for leaf, shape in (("weight", (s.width, inputs)), ("bias", (s.width,))):
            specs[f"model.mm_projector.{name}{leaf}"] = Spec("float16", shape)
            learned.append(f"model.mm_projector.{name}{leaf}")
    tower = "openai/clip-vit-large-patch14" + ("" if s.side == 224 else f"-{s.side}")
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 2048 if s.v1 else 4096,
        "mm_hidden_size": s.clip_width,
        "mm_use_im_start_end": "<im_start>" in added,
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
        "model_type": "llava",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06 if s.v1 else 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_mm_proj": True,
        "vocab_size": rows,
        **_llama_sizes(s),
    }
    if not s.v1:  # settings that came with v1.5
        config |= {
            "image_aspect_ratio": "pad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_vision_select_feature": "patch",
            "num_key_value_heads": s.heads,
            "rope_scaling": None,
        }
    model = Folder(specs, int(10e9 * s.shard), {"config.json": config}, s.vocab_size, added)
    if s.layers == 32 and not s.v1:
        total = sum(spec.nbytes for spec in specs.values())
        assert total == 13_518_798_848, total  # as liuhaotian/llava-v1.5-7b's own index has it
    back = {key: key for key in learned}
    for key in _tower("vision_model.", s, "float32"):
        back[f"model.vision_tower.vision_tower.{key}"] = key
    return Release(model, _clip(s), back)


def _clip(s: _Sizes) -> Folder:
    """The whole of it: what reads texts too, in float32, with its buffers."""
    specs = {
        "logit_scale": Spec("float32", ()),
        "text_model.embeddings.position_ids": Spec("int64", (1, 77)),
        "text_model.embeddings.token_embedding.weight": Spec("float32", (s.vocab_size, 768)),
        "text_model.embeddings.position_embedding.weight": Spec("float32", (77, 768)),
    }
    for i in range(12 if s.clip_layers == 24 else 1):
        specs |= _clip_block(f"text_model.encoder.layers.{i}.", 768, 3072, "float32")
    for leaf in ("weight", "bias"):
        specs[f"text_model.final_layer_norm.{leaf}"] = Spec("float32", (768,))
    positions = (s.side // 14) ** 2 + 1
    specs["vision_model.embeddings.position_ids"] = Spec("int64", (1, positions))
    specs |= _tower("vision_model.", s, "float32")
    specs["visual_projection.weight"] = Spec("float32", (768, s.clip_width))
    specs["text_projection.weight"] = Spec("float32", (768, 768))
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "model_type": "clip_text_model"},
        "torch_dtype": "float32",
        "vision_config": _clip_sizes(s),
    }
    return Folder(specs, int(10e9 * s.shard), {"config.json": config})


# Parts.


def _llama(prefix: str, head: str, s: _Sizes, rows: int) -> Specs:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (rows, s.width)}
    for i in range(s.layers):
        layer = f"{prefix}layers.{i}."
        for name in "qkvo":
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (s.width, s.width)
        shapes[f"{layer}mlp.gate_proj.weight"] = (s.mlp, s.width)
        shapes[f"{layer}mlp.up_proj.weight"] = (s.mlp, s.width)
        shapes[f"{layer}mlp.down_proj.weight"] = (s.width, s.mlp)
        shapes[f"{layer}input_layernorm.weight"] = (s.width,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (s.width,)
    shapes |= {f"{prefix}norm.weight": (s.width,), head: (rows, s.width)}
    return {key: Spec("float16", shape) for key, shape in shapes.items()}


def _tower(prefix: str, s: _Sizes, dtype: str) -> Specs:
    width, positions = s.clip_width, (s.side // 14) ** 2 + 1
    specs = {
        f"{prefix}embeddings.class_embedding": Spec(dtype, (width,)),
        f"{prefix}embeddings.patch_embedding.weight": Spec(dtype, (width, 3, 14, 14)),
        f"{prefix}embeddings.position_embedding.weight": Spec(dtype, (positions, width)),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        specs |= {f"{prefix}{name}.{leaf}": Spec(dtype, (width,)) for leaf in ("weight", "bias")}
    for i in range(s.clip_layers):
        specs |= _clip_block(f"{prefix}encoder.layers.{i}.", width, s.clip_mlp, dtype)
    return specs


def _clip_block(prefix: str, width: int, mlp: int, dtype: str) -> Specs:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"self_attn.{name}.weight": (width, width), f"self_attn.{name}.bias": (width,)}
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    shapes |= {"mlp.fc1.weight": (mlp, width), "mlp.fc1.bias": (mlp,)}
    shapes |= {"mlp.fc2.weight": (width, mlp), "mlp.fc2.bias": (width,)}
    return {prefix + name: Spec(dtype, shape) for name, shape in shapes.items()}


def _llama_sizes(s: _Sizes) -> dict[str, int]:
    return {
        "hidden_size": s.width,
        "intermediate_size": s.mlp,
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
    }


def _clip_sizes(s: _Sizes) -> dict[str, Any]:
    return {
        "hidden_size": s.clip_width,
        "image_size": s.side,
        "intermediate_size": s.clip_mlp,
        "model_type": "clip_vision_model",
        "num_attention_heads": s.clip_heads,
        "num_hidden_layers": s.clip_layers,
        "patch_size": 14,
        "projection_dim": 768,
    }


# Files.


@dataclasses.dataclass(frozen=True)
class Hole:
    """Where the values of a tensor belong."""

    key: str
    spec: Spec
    file: Path
    begin: int


def lay_out(release: Release, place: Path, *, pickle: bool = False) -> list[Hole]:
    """Makes place/model and, where there is one, place/clip, whole but for the values.

    pickle: .bin, as the originals came (by torch), instead of safetensors.
    """
    return [
        hole
        for name, folder in release.folders.items()
        for hole in _lay_out(folder, place / name, pickle)
    ]


def _lay_out(folder: Folder, place: Path, pickle: bool) -> Iterator[Hole]:
    place.mkdir(parents=True)
    for name, value in folder.texts.items():
        (place / name).write_text(json.dumps(value, indent=2))
    if folder.added is not None:
        (place / "tokenizer.model").write_bytes(_tokenizer_model(folder.vocab_size))
        ids = {name: folder.vocab_size + i for i, name in enumerate(folder.added)}
        (place / "added_tokens.json").write_text(json.dumps(ids))
    shards: list[Specs] = []
    room = 0
    for key, spec in folder.specs.items():
        if not shards or spec.nbytes > room:
            shards.append({})
            room = folder.shard_bytes
        shards[-1][key] = spec
        room -= spec.nbytes
    stem, suffix = ("pytorch_model", ".bin") if pickle else ("model", ".safetensors")
    names = [stem + suffix]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}{suffix}" for i in range(len(shards))]
        size = sum(spec.nbytes for spec in folder.specs.values())
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (place / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))
    for name, shard in zip(names, shards, strict=True):
        make = _torch_holes if pickle else _safetensors_holes
        yield from make(place / name, shard)


def _safetensors_holes(file: Path, specs: Specs) -> Iterator[Hole]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, spec in specs.items():
        kind = {"float16": "F16", "float32": "F32", "int64": "I64"}[spec.dtype]
        begin, end = end, end + spec.nbytes
        header[key] = {"dtype": kind, "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    data = 8 + len(text)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, data + end)
    for key, spec in specs.items():
        yield Hole(key, spec, file, data + header[key]["data_offsets"][0])


def _torch_holes(file: Path, specs: Specs) -> Iterator[Hole]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = {k: torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for k, s in specs.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fake, file)
    with FakeTensorMode():
        saved = torch.load(file, weights_only=True)
    for key, spec in specs.items():
        yield Hole(key, spec, file, saved[key].untyped_storage()._checkpoint_offset)


def _tokenizer_model(vocab_size: int) -> bytes:
    """A tokenizer with as many ids as LLaMA's: a small one, and pieces that no text has.

    Messages of protobuf are joined by writing one behind the other.
    """
    small = 512

    def field(content: bytes) -> bytes:
        return b"\x0a" + bytes([len(content)]) + content

    names = (f"<unused {i}>".encode() for i in range(small, vocab_size))
    return model_bytes(small) + b"".join(field(field(name)) for name in names)
