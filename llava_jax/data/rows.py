"""A row of the plan to one row of a Batch: the ids, the pixels, and what stands where.

A picture that cannot be read is replaced by its background and nothing is learned from its
conversation; the row says so. Whatever happens to a file, a row has the same shape and the same
neighbours.

Dims: T tokens of a row, K picture slots, S the tower's image size.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_jax import tokenizer
from llava_jax.batch import PADDING, TEXT, Batch
from llava_jax.data.dataset import Dataset
from llava_jax.data.entry import Entry
from llava_jax.data.examples import Example


@dataclasses.dataclass(frozen=True)
class Segment:
    """A conversation of a row. skipped: why nothing is learned from it, naming the file."""

    source: str
    id: str
    entry: int
    tokens: int
    pictures: tuple[str, ...]
    notes: tuple[str, ...] = ()
    skipped: str | None = None


class Row(NamedTuple):
    """One row of each of a Batch's arrays, in its order, and what is in them."""

    arrays: Batch
    segments: tuple[Segment, ...]


def read_row(dataset: Dataset, examples: Sequence[int] | np.ndarray) -> Row:
    """The row that holds these examples. None at all: padding, behind an epoch's last row."""
    row = empty_row(dataset)
    segments, start, slot = [], 0, 0
    for number, index in enumerate(examples, 1):
        entry, example = _render(dataset, int(index))
        skipped = None
        for k, picture in enumerate(entry.pictures[: example.pictures]):
            try:
                row.pixel_RKHW3[slot + k] = dataset.image.process(picture.read())[0]
            except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                row.pixel_RKHW3[slot + k] = dataset.image.background
                skipped = skipped or f"{picture.name}: {error}"
            except OSError as error:  # a disk or a network that fails is no broken picture
                raise OSError(f"cannot read {picture.name} of {entry.id}: {error}") from error
        source = int(dataset.source_N[index])
        _write(row, start, number, slot, source, example, dataset, learns=skipped is None)
        segments.append(
            Segment(
                source=dataset.names[source],
                id=entry.id,
                entry=int(dataset.entry_N[index]),
                tokens=example.tokens,
                pictures=tuple(picture.name for picture in entry.pictures[: example.pictures]),
                notes=example.notes,
                skipped=skipped,
            )
        )
        start += example.tokens
        slot += example.pictures
    return Row(row, tuple(segments))


def empty_row(dataset: Dataset) -> Batch:
    T, K = dataset.config.batch.tokens, dataset.config.batch.images
    size = dataset.image.size
    return Batch(
        token_RT=np.zeros(T, np.int32),
        target_RT=np.zeros(T, np.int32),
        segment_RT=np.full(T, PADDING, np.int32),
        position_RT=np.zeros(T, np.int32),
        source_RT=np.zeros(T, np.int32),
        loss_weight_RT=np.zeros(T, np.float32),
        pixel_RKHW3=np.zeros((K, size, size, 3), np.uint8),
        image_index_RT=np.full(T, TEXT, np.int32),
    )


def _render(dataset: Dataset, index: int) -> tuple[Entry, Example]:
    name = dataset.names[dataset.source_N[index]]
    entry_number = int(dataset.entry_N[index])
    entry = dataset.sources[name][entry_number]
    example = dataset.renderer(entry)
    if example.tokens != dataset.tokens_N[index] or example.pictures != dataset.pictures_N[index]:
        raise ValueError(
            f"source {name}, entry {entry_number} ({entry.id}): got {example.tokens} tokens and "
            f"{example.pictures} images, expected {dataset.tokens_N[index]} and "
            f"{dataset.pictures_N[index]} as prepared: the data changed since this run began; "
            "start it again"
        )
    return entry, example


def _write(
    row: Batch,
    start: int,
    segment: int,
    slot: int,
    source: int,
    example: Example,
    dataset: Dataset,
    *,
    learns: bool,
) -> None:
    token_T, mask_T, index_T = tokenizer.expand(
        example.ids, example.mask, dataset.renderer.tokens_per_image
    )
    stop = start + len(token_T)
    row.token_RT[start:stop] = token_T
    row.target_RT[start : stop - 1] = token_T[1:]
    row.segment_RT[start:stop] = segment
    row.position_RT[start:stop] = np.arange(stop - start)
    row.source_RT[start:stop] = source
    if learns:
        row.loss_weight_RT[start : stop - 1] = mask_T[1:]
    shifted = index_T + slot * dataset.renderer.tokens_per_image
    row.image_index_RT[start:stop] = np.where(index_T == TEXT, TEXT, shifted)
