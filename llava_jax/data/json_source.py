"""LLaVA's own files as a source: a JSON list, or JSON Lines, read as they are."""

import array
import operator
import os
from collections.abc import Mapping, Sequence

import numpy as np

from llava_jax import files
from llava_jax.conversation import Refused
from llava_jax.data import json_index
from llava_jax.data.entry import Entry
from llava_jax.data.pictures import Images, Roots, is_text
from llava_jax.data.storage import RandomAccessFile


class JsonSource:
    """Entries of a JSON list or of JSON Lines: {"id": …, "image": …, "conversations": […]}.

    image: a name, a list of names, or nothing at all; `images` is another word for it. Without an
    id, an entry's number, counted from 0, is its id. Other keys are not looked at.
    """

    def __init__(self, path: str | os.PathLike[str], images: Images = ()):
        self._file = RandomAccessFile(str(files.path(path)))
        self._roots = Roots(images)
        scan = json_index.Scan(self._file.path)
        spans = array.array("q")
        first: object = None
        for start, stop, value in scan:
            spans.extend((start, stop))
            first = value if len(spans) == 2 else first
            if not self._roots and isinstance(value, Mapping):
                self._check_no_picture(len(spans) // 2 - 1, value)
        self._span_N2 = np.frombuffer(spans, np.int64).reshape(-1, 2)
        self.fingerprint = scan.sha256
        if not spans:
            raise ValueError(f"got {self._file.path} without an entry, expected at least one")
        alone = len(self) == 1 and not scan.is_list
        if alone and isinstance(first, Mapping) and "conversations" not in first:
            raise ValueError(
                f"got {self._file.path}, one object with the keys {_some(list(first))}; expected a "
                'list of entries {"id": …, "image": …, "conversations": […]}, or one on each line'
            )

    def _check_no_picture(self, number: int, value: Mapping[str, object]) -> None:
        if named := value.get("image") or value.get("images"):
            raise ValueError(
                f"got {self._file.path} with pictures (entry {number} has {_short(named)}) and no "
                "place to look for them; expected images= with folders or zip files"
            )

    def __len__(self) -> int:
        return len(self._span_N2)

    def __getitem__(self, index: int) -> Entry:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        start, stop = map(int, self._span_N2[index])
        data = self._file.read(start, stop)
        try:
            value = json_index.parse(data.decode())
        except ValueError as error:
            raise self._file.changed() from error
        return parse_entry(value, index, self._roots)


def parse_entry(value: object, number: int, roots: Roots) -> Entry:
    """The entry that an object of LLaVA's JSON is. number: counted from 0."""
    if not isinstance(value, Mapping):
        raise Refused(
            "entry is not an object",
            f'got {_short(value)}, expected {{"id": …, "conversations": […]}}',
        )
    name = value.get("id")
    if name is None:
        name = number
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise Refused("id is not a text", f"got id {_short(name)}, expected a text")
    if not is_text(str(name)):
        raise Refused(
            "id is not a text", f"got id {_short(name)} with half a character, expected a text"
        )
    names = _picture_names(value)
    return Entry(str(name), value.get("conversations"), tuple(map(roots.picture, names)))


def _picture_names(value: Mapping[str, object]) -> Sequence[str]:
    given = [
        named for key in ("image", "images") if (named := value.get(key)) not in (None, "", [])
    ]
    if len(given) > 1:
        raise Refused("image and images", "got both image and images, expected one of them")
    if not given:
        return ()
    names = [given[0]] if isinstance(given[0], str) else given[0]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise Refused(
            "image is not a name",
            f"got image {_short(given[0])}, expected a name or a list of them",
        )
    return names


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (", …" if len(keys) > 3 else "")
