"""What configs/towers.py may say of a pre-training run."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from llava_jax import config as configs


@dataclasses.dataclass(frozen=True)
class Tower:
    """Shape and training, of either tower. batch: pictures, or rows of text, of a step."""

    kind: str
    width: int
    mlp_width: int
    layers: int
    heads: int
    steps: int
    batch: int
    lr: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Clip(Tower):
    """captioned: how many of a step's pictures have a caption. text_: the text side's shape."""

    image_size: int
    patch_size: int
    captioned: int
    text_width: int
    text_layers: int


@dataclasses.dataclass(frozen=True)
class Llama(Tower):
    """tokens: of a row. noise: on the notes' embeddings, see reading.loss."""

    tokens: int
    noise: float


_KINDS: Mapping[str, type[Clip] | type[Llama]] = {"clip": Clip, "llama": Llama}


def load(name: str) -> Clip | Llama:
    """The settings of 'configs/towers.py:clip' or 'configs/towers.py:llama'."""
    said: Any = configs.start_from(name)
    kind: Any = said.get("kind") if isinstance(said, Mapping) else None
    if kind not in _KINDS:
        raise ValueError(f"got config {name}, expected configs/towers.py:clip or :llama")
    wanted = typing.get_type_hints(_KINDS[kind])
    if differ := sorted(said.keys() ^ wanted.keys()):
        raise ValueError(
            f"{name}: got fields unlike a tower's, expected {differ[0]} in both or none"
        )
    for field, value in said.items():
        if type(value) is not wanted[field]:
            raise ValueError(f"{name}: got {field} = {value!r}, expected {wanted[field].__name__}")
        if not isinstance(value, str) and field not in ("seed", "noise") and value <= 0:
            raise ValueError(f"{name}: got {field} = {value}, expected more than 0")
    return _KINDS[kind](**said)
