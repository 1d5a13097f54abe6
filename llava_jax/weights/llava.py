"""LLaVA's keys in the layouts that exist, and its config.json both ways.

    hub        what the llava-hf repositories hold, and what we export: transformers 4 and 5, vLLM
    original   haotian-liu/LLaVA's own, v1.0 and v1.5, with or without the vision tower inside

transformers 5 saves what it loaded in other names: with or without a leading `model.`, with or
without `vision_model.`; all four are read, the hub's is written.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import ProjectorConfig
from llava_jax.weights import clip, llama
from llava_jax.weights.keys import TRANSPOSED, Row, table


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
