"""Opens whatever holds conversations. What it is, is told by what is in it, never by its name."""

import os

from etils import epath

from llava_jax import files
from llava_jax.data import json_index
from llava_jax.data.entry import Entry, Picture, Source
from llava_jax.data.json_source import JsonSource
from llava_jax.data.pictures import Images
from llava_jax.data.science_qa import PROBLEMS, SPLITS, ScienceQaSource

__all__ = ["Entry", "Picture", "Source", "open_source"]

_KINDS = (
    "a JSON list of LLaVA's, JSON Lines, a folder of ScienceQA (problems.json, pid_splits.json), "
    "or a data set that was built"
)


def open_source(
    path: str | os.PathLike[str],
    *,
    images: Images = (),
    split: str = "train",
    prompt: str = "QCM-LEPA",
) -> Source:
    """A JSON list, JSON Lines, ScienceQA's folder, or a data set that was built; gs:// too.

    images: folders or zip files, in which pictures are looked up in this order. split: of ScienceQA
    or a built data set. prompt: how ScienceQA's problems are put, 'QCM-LEPA' as in the paper.
    """
    place = files.path(path)
    if place.is_dir():
        return _open_folder(place, images, split, prompt)
    begins = json_index.first_character(str(place))
    if begins not in ("[", "{"):
        what = f"which begins with {begins!r}" if begins else "with nothing in it"
        raise ValueError(f"got {place}, {what}; expected {_KINDS}")
    if split != "train":
        raise ValueError(f"got split {split!r} for {place}; a JSON file has only 'train'")
    return JsonSource(place, images)


def _open_folder(place: epath.Path, images: Images, split: str, prompt: str) -> Source:
    held = {entry.name for entry in place.iterdir()}
    if {PROBLEMS, SPLITS} <= held:
        return ScienceQaSource(place, images, split, prompt)
    if {"dataset_info.json", "features.json"} <= held:
        from llava_jax.data.built_source import BuiltSource  # needs the extra [data]

        return BuiltSource(place, split, prompt)
    hint = ""
    if found := {PROBLEMS, SPLITS} & held:
        hint = f": it has only {found.pop()}"
    elif built := [name for name in sorted(held) if (place / name / "dataset_info.json").exists()]:
        hint = f": give the folder {built[0]} in it"
    raise ValueError(f"got {place}, a folder; expected {_KINDS}{hint}")
