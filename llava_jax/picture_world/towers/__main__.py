"""Pre-trains a small tower of the picture world and writes it as a Hugging Face folder."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from llava_jax import allocator, cli, files, tokenizer
from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import ProjectorConfig
from llava_jax.picture_world import towers
from llava_jax.picture_world.towers import (
    folders,
    lessons,
    phrases,
    probe,
    reading,
    seeing,
    settings,
    training,
    vocabulary,
)
from llava_jax.picture_world.towers.settings import Clip, Llama

_SCENES_SEED = 1000  # other scenes than those of a world written with a small seed
_PROBED, _EXAMINED = 1000, 300  # scenes


def main() -> None:
    args = _parse()
    told = settings.load(args.config)
    allocator.keep_memory()
    out = files.path(args.out) / told.kind
    with files.fresh_folder(out) as folder:
        train = _train_clip if isinstance(told, Clip) else _train_llama
        start = time.monotonic()
        figures = train(told, folder)  # pyright: ignore[reportArgumentType]
        _tell(folder, args.config, told, figures, time.monotonic() - start)
    print(f"written to {out}")


def _train_clip(told: Clip, folder: epath.Path) -> dict[str, Any]:
    read = _tokenizer(folder)
    language = LlamaConfig(
        vocab_size=read.vocab_size,
        hidden_size=told.text_width,
        intermediate_size=2 * told.text_width,
        num_layers=told.text_layers,
        num_heads=told.heads,
        num_kv_heads=told.heads,
        tie_embeddings=True,
    )
    config = LlavaConfig(_vision(told), _between(told.width, told.text_width), language)
    fresh = jax.jit(lambda key: seeing.init(config, key))(jax.random.key(told.seed))
    untrained = _probed(config.vision, fresh["vision"], -2)
    params = training.train(
        seeing.loss(config),
        fresh,
        phrases.batches(
            read,
            seed=_SCENES_SEED + told.seed,
            images=told.batch,
            captioned=told.captioned,
            size=told.image_size,
        ),
        label="pictures",
        steps=told.steps,
        lr=told.lr,
        seed=told.seed,
        terms=seeing.TERMS,
    )
    rows = {
        "this tower": _probed(config.vision, params["vision"], -2),
        "its last layer": _probed(config.vision, params["vision"], -1),
        "an untrained one": untrained,
    }
    print(probe.table(rows))
    for name, least in probe.GATE.items():
        if rows["this tower"][name] < least:
            print(f"below its gate: {name}, expected at least {100 * least:.0f}")
    folders.write_clip(folder, config, params["vision"])
    return {"probe": rows}


def _train_llama(told: Llama, folder: epath.Path) -> dict[str, Any]:
    read = _tokenizer(folder)
    language = LlamaConfig(
        vocab_size=read.vocab_size,
        hidden_size=told.width,
        intermediate_size=told.mlp_width,
        num_layers=told.layers,
        num_heads=told.heads,
        num_kv_heads=told.heads,
        # Words said as they are read: what notes hold is then said far sooner (docs/log.md).
        tie_embeddings=True,
    )
    # A vision tower is part of every config; this one is neither drawn nor trained.
    vision = ClipConfig(8, 8, 1, 1, image_size=48, patch_size=8)
    config = LlavaConfig(vision, _between(8, told.width), language)
    reader = lessons.Reader(read, told.tokens)
    params = training.train(
        reading.loss(config, told.noise),
        jax.jit(lambda key: reading.init(config, key))(jax.random.key(told.seed)),
        lessons.batches(reader, seed=_SCENES_SEED + told.seed, rows=told.batch),
        label="texts",
        steps=told.steps,
        lr=told.lr,
        seed=told.seed,
        terms=reading.TERMS,
    )
    scores = reading.exam(config, params, reader, split="dev", seed=1, scenes=_EXAMINED)
    others, two_way = reading.shares(scores)
    print(f"exact answers about notes: {others:.1%}, to two-way questions {two_way:.1%}")
    print("  ".join(f"{name} {score:.0%}" for name, score in scores.items()))
    folders.write_llama(folder, config, params["language"], vocabulary.files())
    return {"exact answers about notes of dev scenes": scores}


def _tokenizer(folder: epath.Path) -> tokenizer.Tokenizer:
    """Trained anew in a moment: the same one each time."""
    own = folder / "vocabulary"
    own.mkdir()
    for name, content in vocabulary.files().items():
        (own / name).write_bytes(content)
    read = tokenizer.load(own)
    own.rmtree()
    return read


def _vision(told: Clip) -> ClipConfig:
    return ClipConfig(
        told.width,
        told.mlp_width,
        told.layers,
        told.heads,
        image_size=told.image_size,
        patch_size=told.patch_size,
        select_layers=(-1,),
        select="cls_patch",
    )


def _between(inputs: int, outputs: int) -> ProjectorConfig:
    return ProjectorConfig("linear", inputs, outputs)


def _probed(config: ClipConfig, vision: Any, layer: int) -> dict[str, float]:
    return probe.probe(config, vision, layer=layer, split="dev", seed=1, scenes=_PROBED)


def _tell(
    folder: epath.Path, config: str, told: Clip | Llama, figures: Mapping[str, Any], seconds: float
) -> None:
    about = {
        "command": f"python -m llava_jax.picture_world.towers --config {config} --out DIR",
        "settings": dataclasses.asdict(told),
        "seconds": round(seconds),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "sha256": {
            file.name: folders.sha256(file)
            for file in sorted(folder.iterdir())
            if file.suffix in (".safetensors", ".model")
        },
        **figures,
    }
    files.write_json(folder / "training.json", about)


def _parse() -> Any:
    parser = cli.parser(
        towers.__doc__,
        "python -m llava_jax.picture_world.towers --config configs/towers.py:clip --out towers",
    )
    parser.prog = "python -m llava_jax.picture_world.towers"
    parser.add_argument(
        "--config", required=True, metavar="FILE:VARIANT", help="configs/towers.py:clip or :llama"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where clip or llama appears")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
