"""Opens whatever holds conversations. What it is, is told by what is in it, never by its name."""

import os
from collections.abc import Sequence

from llava_jax import files
from llava_jax.data import json_index
from llava_jax.data.entry import Entry, Picture, Source
from llava_jax.data.json_source import JsonSource

__all__ = ["Entry", "Picture", "Source", "open_source"]

_KINDS = (
    "a JSON list of LLaVA's, JSON Lines, a folder of ScienceQA (problems.json, pid_splits.json), "
    "or a data set that was built"
)


def open_source(
    path: str | os.PathLike[str],
    *,
    images: Sequence[str | os.PathLike[str]] = (),
    split: str = "train",
    prompt: str = "QCM-LEPA",
) -> Source:
    """A JSON list, JSON Lines, ScienceQA's folder, or a data set that was built; gs:// too.

    images: folders or zip files, in which pictures are looked up in this order. split: of ScienceQA
    or a built data set. prompt: how ScienceQA's problems are put, 'QCM-LEPA' as in the paper.
    """
    place = files.path(path)
    if place.is_dir():
        raise ValueError(f"got {place}, a folder; expected {_KINDS}")
    begins = json_index.first_character(str(place))
    if begins not in ("[", "{"):
        what = f"which begins with {begins!r}" if begins else "with nothing in it"
        raise ValueError(f"got {place}, {what}; expected {_KINDS}")
    if split != "train":
        raise ValueError(f"got split {split!r} for {place}; a JSON file has only 'train'")
    return JsonSource(place, images)
