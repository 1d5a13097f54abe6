"""LLaVA's keys in the layouts that exist, and its config.json both ways.

    hub        what the llava-hf repositories hold, and what we export: transformers 4 and 5, vLLM
    original   haotian-liu/LLaVA's own, v1.0 and v1.5, with or without the vision tower inside

transformers 5 saves what it loaded in other names: with or without a leading `model.`, with or
without `vision_model.`; all four are read, the hub's is written.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import ProjectorConfig
from llava_jax.weights import clip, llama
from llava_jax.weights.keys import TRANSPOSED, Row, table
from llava_jax.weights.tensor import Tensor, in_memory


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a checkpoint keeps each part: prefixes, and one whole key."""

    name: str
    vision: str
    projector: str
    decoder: str
    head: str
    row_end: str

    def rows(self, config: LlavaConfig) -> tuple[Row, ...]:
        row_end = (Row("row_end", self.row_end),) if config.row_end else ()
        return (
            clip.rows(self.vision, config.vision)
            + projector_rows(self, config.projector)
            + row_end
            + llama.rows(self.decoder, self.head, config.language)
        )


HUB = Layout(
    name="llava-hf",
    vision="vision_tower.vision_model.",
    projector="multi_modal_projector.",
    decoder="language_model.model.",
    head="language_model.lm_head.",
    row_end="image_newline",
)
HUB_PLAIN_TOWER = dataclasses.replace(HUB, vision="vision_tower.")
IN_MEMORY = Layout(
    name="llava-hf",
    vision="model.vision_tower.vision_model.",
    projector="model.multi_modal_projector.",
    decoder="model.language_model.",
    head="lm_head.",
    row_end="model.image_newline",
)
IN_MEMORY_PLAIN_TOWER = dataclasses.replace(IN_MEMORY, vision="model.vision_tower.")
ORIGINAL = Layout(
    name="original LLaVA",
    vision="model.vision_tower.vision_tower.vision_model.",
    projector="model.mm_projector.",
    decoder="model.",
    head="lm_head.",
    row_end="model.image_newline",
)
# What PEFT calls the projector where it trains it whole, in llava-hf and in the original.
PROJECTOR_MODULES = ("multi_modal_projector", "mm_projector")
# transformers wraps what it trains; LLaVA's own saves keep some of the wrapping.
_WRAPPED_PROJECTOR = re.compile(r"(?:base_model\.model\.)?(?:model\.)?mm_projector\.")
_WRAPPED_OTHER = re.compile(r"(?:base_model\.model\.)?(?=model\.|lm_head\.)")

# Longer prefixes first: a plain tower's prefix begins those of the others.
LAYOUTS = (HUB, HUB_PLAIN_TOWER, IN_MEMORY, IN_MEMORY_PLAIN_TOWER, ORIGINAL)


def layout_of(keys: Iterable[str]) -> Layout | None:
    """The layout whose projector and tower these keys have; None: this is no LLaVA."""
    keys = list(keys)

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    if has(ORIGINAL.projector):
        return ORIGINAL
    return next((x for x in LAYOUTS if has(x.projector) and has(x.vision)), None)


def renamed(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The same under the hub's names; what the layout does not know keeps its own."""
    renamed = {}
    for key, tensor in tensors.items():
        renamed[_hub_name(key, layout)] = tensor
    return renamed


def _hub_name(key: str, layout: Layout) -> str:
    if key == layout.row_end:
        return HUB.row_end
    parts = [
        (layout.vision, HUB.vision),
        (layout.projector, HUB.projector),
        (layout.head, HUB.head),
        (layout.decoder, HUB.decoder),
    ]
    # A longer prefix first: "model." begins "model.mm_projector." too.
    for theirs, hub in sorted(parts, key=lambda part: -len(part[0])):
        if key.startswith(theirs):
            rest = key.removeprefix(theirs)
            return hub + (_hub_matrix(rest) if theirs == ORIGINAL.projector else rest)
    return key


def _hub_matrix(name: str) -> str:
    """'weight' → 'linear_1.weight' and '2.weight' → 'linear_2.weight'."""
    number, dot, leaf = name.rpartition(".")
    if not dot:
        return f"linear_1.{leaf}"
    return f"linear_{int(number) // 2 + 1}.{leaf}" if number.isdecimal() else name


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What LLaVA saved beside a model, with or without PEFT's and the model's own prefixes."""
    plain = {}
    for key, tensor in tensors.items():
        own = _WRAPPED_PROJECTOR.sub(ORIGINAL.projector, key, count=1)
        plain[own if own != key else _WRAPPED_OTHER.sub("", key, count=1)] = tensor
    return renamed(plain, ORIGINAL)


def unwrapped_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's own file, of whichever class of LLaVA it wrapped; it may name the adapter in keys."""
    plain = {
        key.removeprefix("base_model.model.").replace(".default.", "."): tensor
        for key, tensor in tensors.items()
    }
    # As in LAYOUTS, "model." begins "model.language_model." too.
    layout = next((x for x in LAYOUTS if any(key.startswith(x.decoder) for key in plain)), ORIGINAL)
    return renamed(plain, layout)


def projector_rows(layout: Layout, config: ProjectorConfig) -> tuple[Row, ...]:
    """Hugging Face counts its matrices, the original counts the Sequential's modules, of which
    every second one is the activation."""
    if config.depth == 0:
        return ()
    if layout is not ORIGINAL:
        names = [f"linear_{i + 1}" for i in range(config.depth)]
    else:
        names = [""] if config.kind == "linear" else [f"{2 * i}" for i in range(config.depth)]
    return table(dense_rows(names), ours="projector/", theirs=layout.projector)


def with_identity(tensors: Mapping[str, Tensor], layout: Layout, width: int) -> dict[str, Tensor]:
    """Hugging Face always has two matrices: behind a linear projector, one that changes nothing."""
    first = f"{layout.projector}linear_1."
    dtype = tensors[f"{first}weight"].dtype
    second = {"weight": np.eye(width, dtype=dtype), "bias": np.zeros(width, dtype)}
    out = {}
    for key, tensor in tensors.items():
        out[key] = tensor
        if key == f"{first}bias":
            for leaf, value in second.items():
                out[f"{layout.projector}linear_2.{leaf}"] = in_memory(value, "identity")
    return out


def dense_rows(names: Sequence[str]) -> list[Row]:
    dots = [f"{name}." if name else "" for name in names]
    return [
        row
        for i, name in enumerate(dots)
        for row in (
            Row(f"linear_{i}/kernel", f"{name}weight", TRANSPOSED),
            Row(f"linear_{i}/bias", f"{name}bias"),
        )
    ]
