"""LoRA factors of a stored model: put on, folded in, and as an adapter's folder.

peft           what peft.PeftModel.from_pretrained puts on a llava-hf: the projector is one of
               PEFT's `modules_to_save`
original-peft  what the original LLaVA saves of a LoRA: PEFT's factors, and beside them the
               projector in non_lora_trainables.bin

Dims: I input features, O output features, R rank.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llava_jax.model_folder import StoredModel
from llava_jax.models.lora import LoraConfig
from llava_jax.weights import llama
from llava_jax.weights.deltas import merged
from llava_jax.weights.keys import to_theirs
from llava_jax.weights.llava import (
    IN_MEMORY_PLAIN_TOWER,
    ORIGINAL,
    PROJECTOR_MODULES,
    Layout,
    projector_rows,
    with_identity,
)
from llava_jax.weights.memory import stored_shapes
from llava_jax.weights.tensor import Index, Tensor

ADAPTER_FORMATS = ("peft", "original-peft")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BESIDE = "non_lora_trainables.bin"
# PEFT's own wrapping of whatever it adapts.
_WRAPPED = "base_model.model."
_FACTOR = re.compile(r".*/lora_[ab]")


def with_lora(stored: StoredModel, lora: LoraConfig, seed: int) -> StoredModel:
    """The model with these factors: its own if it has them, else drawn as PEFT draws them, a
    uniform within 1/√inputs and b zero, so that they change nothing yet.

    What is drawn depends on the seed and the leaf's path alone, so that each host may draw its
    shard.
    """
    config = stored.about.config
    own = config.language.lora
    if own.rank and _function(own) != _function(lora):
        raise ValueError(
            f"the model has LoRA factors of {_words(own)}, and the config asks for {_words(lora)}: "
            "set those, or merge them first (launch/convert.py export … --format hf)"
        )
    if seed < 0:
        raise ValueError(f"got seed {seed}, expected 0 or more")
    language = dataclasses.replace(config.language, lora=lora)
    about = dataclasses.replace(stored.about, config=dataclasses.replace(config, language=language))
    drawn = {
        path: _drawn(path, shape, seed)
        for path, shape in stored_shapes(about.config).items()
        if _FACTOR.fullmatch(path) and path not in stored.leaves
    }
    return dataclasses.replace(
        stored, about=about, leaves={**stored.leaves, **drawn}, own=stored.own | drawn.keys()
    )


def without_lora(stored: StoredModel) -> StoredModel:
    """The same function with the factors folded into their kernels."""
    config = stored.about.config
    if not config.language.lora.rank:
        return stored
    leaves = merged(config.language.lora, stored.leaves)
    changed = {f"{path.rpartition('/')[0]}/kernel" for path in stored.leaves.keys() - leaves.keys()}
    language = dataclasses.replace(config.language, lora=LoraConfig())
    return dataclasses.replace(
        stored,
        about=dataclasses.replace(
            stored.about, config=dataclasses.replace(config, language=language)
        ),
        leaves=leaves,
        digests={path: x for path, x in stored.digests.items() if path in leaves.keys() - changed},
        own=(stored.own & leaves.keys()) | changed,
    )


def _function(lora: LoraConfig) -> tuple[Any, ...]:
    return (lora.rank, lora.alpha, frozenset(lora.targets)) if lora.rank else (0,)


def _words(lora: LoraConfig) -> str:
    if not lora.rank:
        return "none"
    return f"rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(sorted(lora.targets))}"


def _drawn(path: str, shape: tuple[int, ...], seed: int) -> Tensor:
    read = _zeros(shape) if path.endswith("lora_b") else _uniform(path, shape, seed)
    whole = tuple(slice(size) for size in shape)
    return Tensor(shape, np.dtype(np.float32), lambda: read(whole), f"fresh {path}", read)


def _zeros(shape: tuple[int, ...]) -> Callable[[Index], np.ndarray]:
    return lambda index: np.zeros(
        [len(range(*s.indices(size))) for s, size in zip(index, shape, strict=True)], np.float32
    )


def _uniform(path: str, shape_IR: tuple[int, ...], seed: int) -> Callable[[Index], np.ndarray]:
    inputs, rank = shape_IR
    name = int.from_bytes(hashlib.sha256(path.encode()).digest()[:16], "little")

    def part(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(inputs)
        # One step of the generator for each number: a shard's rows begin where they would.
        bits = np.random.PCG64([seed, name]).advance(start * rank)
        unit_IR = np.random.Generator(bits).random((stop - start, rank))
        return ((2.0 * unit_IR - 1.0) / math.sqrt(inputs)).astype(np.float32)[:, index[1]]

    return part


# As an adapter's folder.


@dataclasses.dataclass(frozen=True)
class Adapter:
    """factors, beside: the tensors of adapter_model.safetensors, and of non_lora_trainables.bin."""

    factors: dict[str, Tensor]
    beside: dict[str, Tensor]
    config: dict[str, Any]


def adapter(stored: StoredModel, format: str) -> Adapter:
    """What an adapter's folder holds, its tensors unread."""
    config = stored.about.config
    if not config.language.lora.rank:
        raise ValueError(f"format {format!r} is of LoRA factors, and the model has none")
    beyond = sorted(
        path for path in stored.own if not (_FACTOR.fullmatch(path) or path.startswith("projector"))
    )
    if beyond:
        raise ValueError(
            f"format {format!r} holds factors and a projector; {len(beyond)} other tensors trained "
            f"too ({', '.join(beyond[:3])}): expected --format hf or original, which merge them"
        )
    layout = ORIGINAL if format == "original-peft" else IN_MEMORY_PLAIN_TOWER
    factors = to_theirs(llama.lora_rows(layout.decoder, config.language), stored.leaves)
    projector = to_theirs(projector_rows(layout, config.projector), stored.leaves)
    inside = layout is not ORIGINAL
    if inside and config.projector.kind == "linear":
        projector = with_identity(projector, layout, config.projector.output_size)
    return Adapter(
        _wrapped(factors | projector if inside else factors),
        {} if inside else _wrapped(projector),
        llama.write_adapter(
            config.language.lora,
            target_modules=_target_modules(layout, config.language.lora),
            modules_to_save=[PROJECTOR_MODULES[0]] if inside else None,
        ),
    )


def _wrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPED + key: tensor for key, tensor in tensors.items()}


def _target_modules(layout: Layout, lora: LoraConfig) -> Any:
    """In a llava-hf the vision tower has matrices of the same names, so a pattern keeps it out."""
    names = llama.peft_names(lora)
    return names if layout is ORIGINAL else rf".*language_model.*\.(?:{'|'.join(names)})"
