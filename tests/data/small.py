"""A small data set on disk with every kind of conversation, and configs that read it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_jax.config import Batch, Config, Data, Source
from tests import tiny_tokenizer

SIZE, PATCH = 28, 14  # 4 tokens an image
TOKENS, IMAGES = 320, 6


def conversation(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "gpt" if number % 2 else "human", "value": text}
        for number, text in enumerate(texts)
    ]


def entries(count: int = 60) -> list[dict[str, Any]]:
    """Texts of many lengths: without an image, with one, two in a turn, two in two turns."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        words = " ".join(["boat", "lantern", "goose", "red", "two"][: 1 + number % 5])
        kind = number % 4
        names = [f"{number % 7}.png", f"sub/{number % 5}.jpg"][: (0, 1, 2, 2)[kind]]
        turns = [f"What is {words}?", f"The {words}.", "how many?", "two " * (1 + number % 6)]
        if kind in (1, 2):
            turns[0] = "<image>\n" * len(names) + turns[0]
        elif kind == 3:
            turns = [f"<image>\n{turns[0]}", turns[1], f"<image>\n{turns[2]}", turns[3]]
        entry = {"id": f"e{number}", "conversations": conversation(*turns)}
        if names:
            entry["image"] = names[0] if len(names) == 1 else names
        made.append(entry)
    return made


def write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for number in range(7):
        pixels = rng.integers(0, 256, (20 + number, 40 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(pixels).save(folder / f"sub/{number}.jpg")


def write(folder: Path, made: list[dict[str, Any]] | None = None) -> Config:
    """The data, its pictures and a tokenizer in `folder`; the config that reads them."""
    write_pictures(folder / "images")
    (folder / "chat.json").write_text(json.dumps(entries() if made is None else made))
    tiny_tokenizer.write_tokenizer(folder / "tokenizer", ["<im_start>", "<im_end>"])
    return Config(
        seed=7,
        data=Data(
            sources={"small": Source(str(folder / "chat.json"), images=(str(folder / "images"),))},
            tokenizer=str(folder / "tokenizer"),
            image_size=SIZE,
            patch_size=PATCH,
            conversation_tokens=TOKENS,
            prepared=str(folder / "prepared"),
            threads=2,
        ),
        batch=Batch(conversations=8, tokens=TOKENS, images=IMAGES),
    )


def changed(config: Config, **changes: Any) -> Config:
    """changed(config, data={"workers": 2}, epochs=2): sections take dicts of their fields."""
    for name, value in changes.items():
        if isinstance(value, dict):
            changes[name] = dataclasses.replace(getattr(config, name), **value)
    return dataclasses.replace(config, **changes)
