"""A data set that TFDS built, as a source: ArrayRecord files, read at random, without TensorFlow.

Each record is a tf.train.Example. What cannot be kept in its fields as it was (turns with more
than two keys, half a character, what is no entry at all) is kept in `exact`, as JSON; a picture
that could not be read when the set was built has the reason in `error`.
"""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.conversation import Refused
from llava_jax.data import json_index, science_qa, storage
from llava_jax.data.entry import Entry, Picture

INSTALL = "built data sets need an extra: pip install 'llava-jax[data]'"


class BuiltPicture(NamedTuple):
    """A picture whose bytes are at hand. error: why there are none; missing: as there was none.
    beside: what lay there instead, by another extension."""

    name: str
    data: bytes
    error: str
    missing: bool
    beside: str

    def read(self) -> bytes:
        if not self.error:
            return self.data
        raise FileNotFoundError(self.error) if self.missing else ValueError(self.error)

    def exists(self) -> bool:
        return not self.missing

    def nearest(self) -> str | None:
        return self.beside or None


class BuiltSource:
    """A split of a built set. prompt: for ScienceQA, whose problems are kept as they are."""

    def __init__(
        self, folder: str | os.PathLike[str], split: str = "train", prompt: str = "QCM-LEPA"
    ):
        place = files.path(folder)
        if storage.is_remote(str(place)):
            raise ValueError(
                f"got {place}; a built set is read from a disk: copy it to one, or mount the bucket"
            )
        try:
            import tensorflow_datasets as tfds
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise ValueError(INSTALL) from error
        science_qa.check_prompt(prompt)
        built = read_metadata(folder)
        try:
            splits = tfds.builder_from_directory(place).info.splits
        except Exception as error:  # of files that are not its own it dies in many ways
            raise ValueError(f"got {place}, a data set that cannot be read: {error}") from error
        _check_whole(place, built["bytes"])
        if split not in splits:
            raise ValueError(f"got split {split!r} of {place}, expected one of {', '.join(splits)}")
        self._folder, self._prompt = str(place), prompt
        self._holds_problems = built["holds"] == "problems"
        self.fingerprint: str = built["fingerprint"][split]
        if self._holds_problems:
            self.fingerprint = science_qa.fingerprint(self.fingerprint, split, prompt)
        instructions: Any = splits[split].file_instructions
        self._records = ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Entry:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        try:
            record = self._records[index]
        except Exception as error:  # the reader's are of any kind, and name no entry
            raise ValueError(f"got entry {index} of {self._folder}, unreadable: {error}") from error
        fields = _fields(record)
        exact = json.loads(fields["exact"][0] or b"{}")
        if "refused" in exact:
            raise Refused(*exact["refused"])
        if self._holds_problems:
            return science_qa.entry_of(_problem(fields, exact), self._prompt, _pictures(fields))
        turns = [
            {"from": role.decode(), "value": value.decode()}
            for role, value in zip(
                fields["conversations/from"], fields["conversations/value"], strict=True
            )
        ]
        return Entry(
            fields["id"][0].decode(),
            exact.get("conversations", turns),
            _pictures(fields),
        )


def read_metadata(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What was noted when the set was built: what it holds, fingerprints, the report, and how many
    bytes each file has."""
    place = files.path(folder) / "metadata.json"
    expected = {"holds", "fingerprint", "report", "bytes"}
    built: Any = json_index.load(str(place))[0] if place.exists() else {}
    if not expected <= built.keys():
        raise ValueError(
            f"got {folder}, a data set of others; expected one that llava_jax built: its "
            f"metadata.json has {', '.join(sorted(expected))}"
        )
    return built


def _check_whole(folder: epath.Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().length if file.exists() else 0
        if found != size:
            raise ValueError(
                f"got {file} with {found} bytes, expected {size}: was the set copied whole?"
            )


def _fields(record: bytes) -> Mapping[str, Sequence[Any]]:
    from tensorflow_datasets.proto import tf_example_pb2

    example: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]

    return {
        name: feature.int64_list.value
        if feature.HasField("int64_list")
        else feature.bytes_list.value
        for name, feature in example.FromString(record).features.feature.items()
    }


def _pictures(fields: Mapping[str, Sequence[Any]]) -> tuple[Picture, ...]:
    names = ("name", "bytes", "error", "missing", "beside")
    columns = [fields[f"pictures/{name}"] for name in names]
    return tuple(
        BuiltPicture(name.decode(), data, error.decode(), bool(missing), beside.decode())
        for name, data, error, missing, beside in zip(*columns, strict=True)
    )


def _problem(fields: Mapping[str, Sequence[Any]], exact: Mapping[str, Any]) -> science_qa.Problem:
    if "problem" in exact:
        pid, texts, choices, answer, image = exact["problem"]
        return science_qa.Problem(pid, texts, tuple(choices), answer, image)
    return science_qa.Problem(
        fields["id"][0].decode(),
        {name: fields[name][0].decode() for name in science_qa.TEXTS},
        tuple(choice.decode() for choice in fields["choices"]),
        fields["answer"][0],
        fields["image"][0].decode(),
    )
