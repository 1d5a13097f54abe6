"""What a run learns from: sources, their lengths, the mixture of an epoch and its fingerprint.

>>> dataset = open_dataset(config)            # prepares what was not prepared before
>>> plan = dataset.plan(epoch=0)              # which conversations share a row
>>> row = read_row(dataset, plan[0])          # see rows.py

Dims: N examples of an epoch.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llava_jax import config as configs
from llava_jax import conversation, files, tokenizer
from llava_jax.cli import Progress
from llava_jax.data import mixture, packing, picture_check, preparation
from llava_jax.data.entry import Source
from llava_jax.data.examples import Renderer
from llava_jax.data.findings import Findings
from llava_jax.data.packing import Plan
from llava_jax.data.picture_check import Checked, Depth
from llava_jax.data.preparation import Lengths
from llava_jax.data.source import open_source
from llava_jax.image import ImageProcessing

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything rows are made from. It pickles, for the workers that read them.

    source_N, entry_N, tokens_N, pictures_N: the examples of an epoch; refused ones are not among
    them. lengths, checked: of each source, by name, in the order source_N counts; checked has those
    whose pictures were looked for.
    """

    config: configs.Config
    sources: Mapping[str, Source]
    renderer: Renderer
    image: ImageProcessing
    lengths: Mapping[str, Lengths]
    checked: Mapping[str, Checked]
    source_N: np.ndarray
    entry_N: np.ndarray
    tokens_N: np.ndarray
    pictures_N: np.ndarray

    def __len__(self) -> int:
        return len(self.source_N)

    @functools.cached_property
    def names(self) -> list[str]:
        return list(self.sources)

    def plan(self, epoch: int) -> Plan:
        """Which examples share a row: of the lengths, the seed and the epoch alone."""
        batch = self.config.batch
        if batch.pack:
            return packing.pack(
                self.tokens_N,
                self.pictures_N,
                row_tokens=batch.tokens,
                row_images=batch.images,
                seed=self.config.seed,
                epoch=epoch,
            )
        return packing.one_a_row(
            self.tokens_N,
            self.pictures_N,
            group_of=batch.conversations,
            grouped=batch.by_length,
            seed=self.config.seed,
            epoch=epoch,
        )

    @functools.cached_property
    def fingerprint(self) -> Mapping[str, Any]:
        """All that batches depend on, by name, so that another one can be told what differs."""
        batch, data = self.config.batch, self.config.data
        return {
            **{
                f"source {name}": [source.fingerprint, data.sources[name].take, epochs]
                for name, source in self.sources.items()
                for epochs in [data.sources[name].epochs]
            },
            **self.renderer.settings(),
            "image": dataclasses.asdict(self.image),
            "tokens of a row": batch.tokens,
            "packed": batch.pack,
            "grouped by length": batch.by_length and not batch.pack,
            "conversations of a step": batch.conversations,
            "seed": self.config.seed,
            "version of the plan": packing.PACKER,
        }

    @property
    def digest(self) -> str:
        said = json.dumps(self.fingerprint, sort_keys=True, default=str)
        return hashlib.sha256(said.encode()).hexdigest()


def open_dataset(
    config: configs.Config,
    *,
    check: Depth | None = "exist",
    progress: Callable[..., Progress] = Progress,
) -> Dataset:
    """The dataset of a run. Lengths that were not counted before are counted now, and kept.

    check: of the pictures, whether they exist, or also whether they begin as pictures do; None:
    they are not looked for.
    """
    data = config.data
    check_settings(config)
    renderer = _renderer(config)
    sources = {
        name: open_source(
            source.path, images=source.images, split=source.split, prompt=source.prompt
        )
        for name, source in data.sources.items()
    }
    lengths = {
        name: _lengths(config, name, source, renderer, progress) for name, source in sources.items()
    }
    checked = {
        name: _look(name, source, lengths[name], check, progress)
        for name, source in sources.items()
        if check and lengths[name].pictures_N.any()
    }
    for name in sources:
        _check_bad(config, name, lengths[name], checked.get(name))
    usable = [mine.usable for mine in lengths.values()]
    epochs = [data.sources[name].epochs for name in sources]
    columns = {
        column: mixture.repeated(
            [
                getattr(mine, column)[use]
                for mine, use in zip(lengths.values(), usable, strict=True)
            ],
            epochs,
        )
        for column in ("entry_N", "tokens_N", "pictures_N")
    }
    return Dataset(
        config=config,
        sources=sources,
        renderer=renderer,
        image=ImageProcessing(data.image_mode, data.image_size),
        lengths=lengths,
        checked=checked,
        source_N=columns["entry_N"][0],
        entry_N=columns["entry_N"][1],
        tokens_N=columns["tokens_N"][1].astype(np.int32),
        pictures_N=columns["pictures_N"][1].astype(np.int32),
    )


def check_settings(config: configs.Config) -> None:
    data, batch = config.data, config.batch
    if not data.sources:
        raise ValueError("got no config.data.sources, expected at least one")
    if not data.tokenizer:
        raise ValueError(
            "got no config.data.tokenizer, expected the folder of the language model: its "
            "tokenizer files are enough"
        )
    if data.conversation_tokens > batch.tokens:
        raise ValueError(
            f"got config.data.conversation_tokens = {data.conversation_tokens} for rows of "
            f"config.batch.tokens = {batch.tokens}, expected at most as many"
        )
    if not data.prepared:
        raise ValueError("got no config.data.prepared, expected a folder to keep lengths in")
    at_least_one = {
        "batch.conversations": batch.conversations,
        "batch.images": batch.images,
        "batch.tokens": batch.tokens,
        "data.conversation_tokens": data.conversation_tokens,
        "data.image_size": data.image_size,
        "data.patch_size": data.patch_size,
        "data.threads": data.threads,
        "epochs": config.epochs,
        **{f"data.sources.{name}.epochs": source.epochs for name, source in data.sources.items()},
    }
    for path, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"got config.{path} = {value}, expected 1 or more")
    if data.workers < 0:
        raise ValueError(f"got config.data.workers = {data.workers}, expected 0 or more")
    if data.image_size % data.patch_size:
        raise ValueError(
            f"got config.data.image_size = {data.image_size}, expected a multiple of "
            f"config.data.patch_size = {data.patch_size}"
        )
    if not 0 <= data.max_bad_fraction <= 1:
        raise ValueError(
            f"got config.data.max_bad_fraction = {data.max_bad_fraction}, expected 0 to 1"
        )


def _renderer(config: configs.Config) -> Renderer:
    data = config.data
    read = tokenizer.load(data.tokenizer)
    if data.start_end_tokens:
        for name in (conversation.IM_START, conversation.IM_END):
            read.id(name)
    return Renderer(
        tokenizer=read,
        tokenizer_digest=_tokenizer_digest(data.tokenizer, read),
        template=conversation.template(
            data.template,
            start_end_tokens=data.start_end_tokens,
            text_restarts=data.text_restarts,
            image_at=data.image_at,
        ),
        tokens_per_image=(data.image_size // data.patch_size) ** 2,
        max_tokens=data.conversation_tokens,
        max_images=config.batch.images,
        too_long=data.too_long,
        seed=config.seed,
    )


def _tokenizer_digest(folder: str, read: tokenizer.Tokenizer) -> str:
    """Of what makes ids of text; the folder may hold a model as well."""
    digest = hashlib.sha256(
        repr((sorted(read.specials.items()), read.legacy, read.adds_bos)).encode()
    )
    for name in _TOKENIZER_FILES:
        if (file := files.path(folder) / name).exists():
            digest.update(file.read_bytes())
            break  # as tokenizer.load: the second counts only without the first
    return digest.hexdigest()


def _lengths(
    config: configs.Config,
    name: str,
    source: Source,
    renderer: Renderer,
    progress: Callable[..., Progress],
) -> Lengths:
    entry_N = mixture.taken(config.data.sources[name].take, len(source), name, config.seed)
    key = preparation.key(source, entry_N, renderer)
    folder = files.path(config.data.prepared) / f"{name}-{key}"
    if (lengths := preparation.load(folder)) is not None:
        return lengths
    with progress(len(entry_N), f"preparing {name}", "conversations") as bar:
        lengths = preparation.measure(source, entry_N, renderer, advance=bar.advance)
    preparation.save(lengths, folder)
    return lengths


def _look(
    name: str, source: Source, lengths: Lengths, depth: Depth, progress: Callable[..., Progress]
) -> Checked:
    entry_N, pictures_N = lengths.entry_N[lengths.usable], lengths.pictures_N[lengths.usable]
    with progress(len(entry_N), f"pictures of {name}", "conversations") as bar:
        return picture_check.check(source, entry_N, pictures_N, depth, advance=bar.advance)


def _check_bad(
    config: configs.Config, name: str, lengths: Lengths, checked: Checked | None
) -> None:
    allowed, total = config.data.max_bad_fraction, len(lengths.entry_N)
    pictures = checked.findings if checked else Findings()
    if not lengths.usable.any():
        raise ValueError(
            f"source {name}: got nothing to learn from in {total} conversations, expected at "
            f"least one{_listed(lengths.refused)}"
        )
    bad = lengths.refused.count.total() + pictures.count.total()
    if bad > allowed * total:
        raise ValueError(
            f"source {name}: got {bad} of {total} conversations refused or without their picture, "
            f"expected at most {allowed:.2%} (config.data.max_bad_fraction)"
            f"{_listed(lengths.refused, pictures)}"
        )


def _listed(*findings: Findings) -> str:
    lines = [
        f"\n  {count} × {kind}, as {found.first[kind][0]}"
        for found in findings
        for kind, count in found.count.most_common()
    ]
    return ":" + "".join(lines) if lines else ""
