"""What a folder says of its vision tower, and of how pictures come to it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from llava_jax.image import Mode
from llava_jax.models.clip_vit import ClipConfig
from llava_jax.weights import clip
from llava_jax.weights.llava import HUB
from llava_jax.weights.settings import Settings
from llava_jax.weights.tensor import Tensor

# What transformers takes for a LLaVA whose config has no tower.
VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def tower_inside(settings: Settings, hub: Mapping[str, Tensor]) -> ClipConfig | None:
    """The original's config does not describe a tower that is inside: its tensors do, but for the
    number of heads, 64 wide in every CLIP, and the activation, which OpenAI's share."""
    patches = hub.get(f"{HUB.vision}embeddings.patch_embedding.weight")
    position = hub.get(f"{HUB.vision}embeddings.position_embedding.weight")
    fc1 = hub.get(f"{HUB.vision}encoder.layers.0.mlp.fc1.weight")
    if patches is None or position is None or fc1 is None or len(patches.shape) != 4:
        return None
    blocks = [
        int(found[1])
        for key in hub
        if (found := re.match(rf"{re.escape(HUB.vision)}encoder\.layers\.(\d+)\.", key))
    ]
    width, patch = patches.shape[0], patches.shape[-1]
    grid = int((position.shape[0] - 1) ** 0.5)
    described = {
        "hidden_size": width,
        "intermediate_size": fc1.shape[0],
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": max(width // 64, 1),
        "image_size": grid * patch,
        "patch_size": patch,
        **settings.get("mm_vision_config", dict, {}),
    }
    folder = epath.Path(settings.where).parent
    return read_tower(
        Settings(described, f"{settings.where}, the vision tower's shapes"), hub, folder
    )


def read_tower(settings: Settings, hub: Mapping[str, Tensor], folder: epath.Path) -> ClipConfig:
    """The tower's config, with the colours its folder's own processor subtracts."""
    check_layers(settings, hub, f"{HUB.vision}encoder.layers.", 12)
    colours = {}
    pictures = _picture_settings(folder)
    for ours in ("image_mean", "image_std"):
        values = pictures.get(ours, list, None)
        if values is None:
            continue
        if len(values) != 3 or not all(isinstance(v, float | int) for v in values):
            raise ValueError(f"{pictures.where}: {ours!r} is {values}, expected three numbers")
        if ours == "image_std" and min(values) <= 0:
            raise ValueError(f"{pictures.where}: {ours!r} is {values}, expected positive numbers")
        colours[ours] = tuple(float(v) for v in values)
    config = complete(lambda: clip.read_config(settings, **colours), settings)
    for name in ("size", "crop_size"):
        sides = pictures.values.get(name)
        given = sides.values() if isinstance(sides, dict) else [sides]
        if wrong := [side for side in given if side not in (None, config.image_size)]:
            raise ValueError(
                f"{pictures.where}: {name!r} is {wrong[0]}, and the tower sees {config.image_size}"
            )
    return config


def image_mode_of(folder: epath.Path) -> Mode | None:
    settings = _picture_settings(folder)
    if not settings.values:
        return None
    return "pad" if settings.get("do_pad", bool, False) else "crop"


def _picture_settings(folder: epath.Path) -> Settings:
    """What a processor does to pictures: transformers 5 has it in one file, earlier ones in two."""
    inside = Settings.read_if_there(folder / "processor_config.json").inner("image_processor")
    return inside if inside.values else Settings.read_if_there(folder / "preprocessor_config.json")


def check_layers(settings: Settings, hub: Mapping[str, Tensor], prefix: str, default: int) -> None:
    """Before a table of all layers is made: a config may say anything."""
    found = {key.removeprefix(prefix).partition(".")[0] for key in hub if key.startswith(prefix)}
    told = settings.size("num_hidden_layers", default)
    if told != len(found):
        raise ValueError(
            f"{settings.where}: 'num_hidden_layers' is {told}, and the tensors are of {len(found)}"
        )


def complete(read: Callable[[], Any], settings: Settings) -> Any:
    """What `read` returns; a complaint of the model's own config gets the file's name."""
    try:
        return read()
    except ValueError as error:
        if str(error).startswith(settings.where):
            raise
        raise ValueError(f"{settings.where}: {error}") from error
