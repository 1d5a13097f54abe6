"""TFDS builders of what LLaVA is trained on, and `build`, which runs one.

A built set holds conversations and pictures in a few large files (ArrayRecord) that are read at
random: for buckets, network disks and pods, where a million small files are slow. Pictures' bytes,
names, ids and turns are what they were, in the order in which they were; nothing is left out.

The builders are TFDS's own kind, so that `tfds.builder_from_directory` reads their sets too:

    LlavaInstruct(config=Recipe(name="mix665k", source="llava_v1_5_mix665k.json",
                                images=("data",)), data_dir="built").download_and_prepare()
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llava_jax import files
from llava_jax.conversation import Refused
from llava_jax.data import science_qa, storage
from llava_jax.data.built_source import INSTALL, read_metadata
from llava_jax.data.entry import Picture, Source
from llava_jax.data.pictures import Images, is_text, root_paths
from llava_jax.data.science_qa import ScienceQaSource
from llava_jax.data.source import open_source

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ValueError(INSTALL) from error

_SHARD_BYTES = 2**28
_SAMPLE = 256  # entries whose size tells that of all
_FIRST = 5  # of each kind, named in the report
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")

Progress = Callable[[int, int], None]


@dataclasses.dataclass
class Recipe(tfds.core.BuilderConfig):
    """What a set is built from. shards: how many files, instead of one for each 256 MiB.

    split: of ScienceQA; several become splits of one set, as in "train+val+test". progress: called
    with how many entries of how many are written.
    """

    source: str = ""
    images: tuple[str, ...] = ()
    split: str = "train"
    shards: int | None = None
    progress: Progress | None = None


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Not tfds.core.GeneratorBasedBuilder: that one sorts, and what has more than 1 GiB it sorts
    with TensorFlow, all of it in memory where the order must stay."""

    VERSION = tfds.core.Version("1.0.0")
    _HOLDS = "conversations"
    # Where TFDS looks for checksums of downloads, by a package that it does not install.
    code_path = None

    def __init__(self, *, config: Recipe, file_format: str = "array_record", **where: Any):
        self._recipe = config
        super().__init__(config=config, file_format=file_format, **where)

    def _create_builder_config(self, builder_config: Any, version: Any) -> Any:
        return builder_config  # TFDS would warn that it is not one of a list

    def _features(self) -> Mapping[str, Any]:
        text = tfds.features.Text
        return {"conversations": tfds.features.Sequence({"from": text(), "value": text()})}

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        pictures = {
            "name": text(),
            # Not tfds.features.Image(): in a sequence it can only be read decoded.
            "bytes": text(doc="The picture's file as it was; decode it yourself."),
            "error": text(doc="Why the picture could not be read; its bytes are empty then."),
            "missing": np.int64,
            "beside": text(doc="Of a missing one: a file whose name differs in the extension."),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "pictures": tfds.features.Sequence(pictures),
                    "exact": text(doc="JSON of what the other fields cannot hold as it was."),
                    **self._features(),
                }
            ),
            metadata=tfds.core.MetadataDict(holds=self._HOLDS, fingerprint={}, report={}, bytes={}),
            disable_shuffling=True,
        )

    def _sources(self) -> Mapping[str, Source]:
        recipe = self._recipe
        return {"train": open_source(recipe.source, images=recipe.images)}

    def _text_fingerprint(self, source: Any) -> str:
        return source.fingerprint

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Any]]:
        sources = self._sources()
        counter = _Counter(sum(map(len, sources.values())), self._recipe.progress)
        shards: dict[str, list[Any]] = {}
        noted: Any = self.info.metadata
        for split, source in sources.items():
            report = noted["report"][split] = _new_report(len(source))
            noted["fingerprint"][split] = self._text_fingerprint(source)
            count = self._recipe.shards or self._count_shards(source)
            edges = np.linspace(0, len(source), min(count, len(source)) + 1).astype(int)
            shards[split] = [
                functools.partial(self._examples, source, report, counter, start, stop)
                for start, stop in itertools.pairwise(map(int, edges))
            ]
        return shards

    def _download_and_prepare(self, *what: Any, **how: Any) -> None:
        super()._download_and_prepare(*what, **how)
        noted: Any = self.info.metadata
        for shard in files.path(self.data_dir).glob("*.array_record-*"):
            noted["bytes"][shard.name] = shard.stat().length

    def _count_shards(self, source: Source) -> int:
        indices = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int))
        unused = _new_report(0)
        sizes = [_size(self._record(source, index, unused)) for index in map(int, indices)]
        return 1 + int(np.mean(sizes) * len(source)) // _SHARD_BYTES

    def _examples(
        self, source: Source, report: dict[str, Any], counter: "_Counter", start: int, stop: int
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for index in range(start, stop):
            yield index, _Once(self._record(source, index, report))
            counter.advance()

    def _record(self, source: Any, index: int, report: dict[str, Any]) -> dict[str, Any]:
        try:
            entry = source[index]
        except Refused as refused:
            _note(report["refused"], refused.kind, f"entry {index}: {refused}")
            exact = _ascii({"refused": [refused.kind, str(refused)]})
            return {"id": "", "pictures": [], "exact": exact, "conversations": []}
        exact = {}
        if not _is_plain(entry.conversations):
            exact["conversations"] = entry.conversations
        return {
            "id": entry.id,
            "conversations": [] if "conversations" in exact else entry.conversations,
            "pictures": [_picture(picture, report) for picture in entry.pictures],
            "exact": _ascii(exact) if exact else "",
        }


class LlavaPretrain(_Builder):
    """Captions: CC3M-595K, LCS-558K."""


class LlavaInstruct(_Builder):
    """Visual instructions: LLaVA's 80k, 150k, 158k, 665k, and any file in their form."""


class ScienceQa(_Builder):
    """ScienceQA's problems as they are, so that the prompt is chosen when they are read."""

    name = "science_qa"
    _HOLDS = "problems"

    def _features(self) -> Mapping[str, Any]:
        text = tfds.features.Text
        return {
            **{name: text() for name in science_qa.TEXTS},
            "choices": tfds.features.Sequence(text()),
            "answer": np.int64,
            "image": text(),
        }

    def _sources(self) -> Mapping[str, Source]:
        recipe = self._recipe
        return {
            split: ScienceQaSource(recipe.source, recipe.images, split)
            for split in recipe.split.split("+")
        }

    def _text_fingerprint(self, source: Any) -> str:
        return source.text_fingerprint

    def _record(self, source: Any, index: int, report: dict[str, Any]) -> dict[str, Any]:
        empty = {**dict.fromkeys(science_qa.TEXTS, ""), "choices": [], "answer": 0, "image": ""}
        empty |= {"id": "", "pictures": [], "exact": ""}
        try:
            problem = source.problem(index)
            pictures = [_picture(picture, report) for picture in source.pictures(problem)]
        except Refused as refused:
            _note(report["refused"], refused.kind, f"problem {index}: {refused}")
            return {**empty, "exact": _ascii({"refused": [refused.kind, str(refused)]})}
        texts = [problem.id, problem.image, *problem.choices, *problem.texts.values()]
        if not all(map(is_text, texts)):
            return {**empty, "pictures": pictures, "exact": _ascii({"problem": problem})}
        return {
            **problem.texts,
            "id": problem.id,
            "choices": list(problem.choices),
            "answer": problem.answer,
            "image": problem.image,
            "pictures": pictures,
            "exact": "",
        }


BUILDERS: Mapping[str, type[_Builder]] = {
    "llava_pretrain": LlavaPretrain,
    "llava_instruct": LlavaInstruct,
    "science_qa": ScienceQa,
}


@dataclasses.dataclass(frozen=True)
class Built:
    """folder: for open_source. report: by split; what was refused, missing or unreadable is in the
    set all the same, and is met again by whoever reads it. reused: it was there already.
    unfinished: folders that builds which were killed have left, safe to delete when none runs."""

    folder: str
    report: Mapping[str, Mapping[str, Any]]
    reused: bool
    unfinished: tuple[str, ...]


def check_target(names: Iterable[str], data_dir: str | os.PathLike[str]) -> None:
    """Refuses what `build` could not build, without looking at any source."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"got name {name!r} for a data set, expected letters, digits, . _ and -, "
                "a letter first"
            )
    if not os.fspath(data_dir):
        raise ValueError("got '' to build in, expected a folder")
    place = files.path(data_dir)
    if storage.is_remote(str(place)):
        raise ValueError(
            f"got data_dir {place}; expected a local folder: build there, and copy what was built"
        )
    if place.exists() and not place.is_dir():
        raise ValueError(f"got {place}, a file; expected a folder to build in")


def build(
    path: str | os.PathLike[str],
    *,
    builder: str,
    name: str,
    data_dir: str | os.PathLike[str],
    images: Images = (),
    split: str = "train",
    shards: int | None = None,
    progress: Progress | None = None,
) -> Built:
    """Builds DATA_DIR/BUILDER/NAME/1.0.0, whole or not at all, without network.

    What is there already is taken if it was built of the same text, and otherwise refused.
    """
    if builder not in BUILDERS:
        raise ValueError(f"got builder {builder!r}, expected one of {', '.join(BUILDERS)}")
    if shards is not None and shards < 1:
        raise ValueError(f"got shards {shards}, expected 1 or more")
    check_target([name], data_dir)
    recipe = Recipe(
        name=name,
        source=str(files.path(path)),
        images=tuple(root_paths(images)),
        split=split,
        shards=shards,
        progress=progress,
    )
    # TFDS tells of downloads, of which there are none.
    with contextlib.redirect_stdout(io.StringIO()):
        made = BUILDERS[builder](config=recipe, data_dir=str(files.path(data_dir)))
        folder = files.path(made.data_dir)
        reused = folder.exists()
        if reused:
            _check_same(folder, made)
        else:
            with tempfile.TemporaryDirectory() as unused:
                made.download_and_prepare(download_dir=unused)
    left = [str(other) for other in folder.parent.glob(f"incomplete.*_{folder.name}")]
    return Built(str(folder), read_metadata(folder)["report"], reused, tuple(sorted(left)))


def _check_same(folder: Any, made: _Builder) -> None:
    built = read_metadata(folder)["fingerprint"]
    asked = {split: made._text_fingerprint(source) for split, source in made._sources().items()}
    if built != asked:
        raise ValueError(
            f"got {folder}, built of another text (SHA-256 {_starts(built)}, and now "
            f"{_starts(asked)}); expected a new name: choose one, or remove the folder"
        )


def _starts(fingerprints: Mapping[str, str]) -> str:
    return ", ".join(f"{split} {value[:12]}…" for split, value in sorted(fingerprints.items()))


class _Once(Mapping[str, Any]):
    """An example that lets go of each field when it is read.

    TFDS writes all examples of a shard, then counts them: it would hold a shard in memory.
    """

    def __init__(self, fields: dict[str, Any]):
        self._names = tuple(fields)
        self._fields = fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Any:
        return self._fields.pop(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names


class _Counter:
    def __init__(self, total: int, progress: Progress | None):
        self._done, self._total, self._progress = 0, total, progress

    def advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _picture(picture: Picture, report: dict[str, Any]) -> dict[str, Any]:
    report["pictures"] += 1
    found = {"name": picture.name, "bytes": b"", "error": "", "missing": 0, "beside": ""}
    try:
        found["bytes"] = picture.read()
    except FileNotFoundError as error:
        beside = picture.nearest() or ""
        _note(report["broken"], "missing", f"{error}; there is {beside}" if beside else str(error))
        found |= {"error": str(error), "missing": 1, "beside": beside}
    except (OSError, ValueError) as error:
        _note(report["broken"], "unreadable", str(error))
        found["error"] = str(error) or type(error).__name__
    return found


def _new_report(entries: int) -> dict[str, Any]:
    return {"entries": entries, "pictures": 0, "refused": {}, "broken": {}}


def _note(counts: dict[str, Any], kind: str, what: str) -> None:
    noted = counts.setdefault(kind, {"count": 0, "first": []})
    noted["count"] += 1
    if len(noted["first"]) < _FIRST:
        noted["first"].append(what)


def _size(record: Mapping[str, Any]) -> int:
    pictures = sum(len(picture["bytes"]) for picture in record["pictures"])
    texts = {name: value for name, value in record.items() if name != "pictures"}
    return pictures + len(_ascii(texts))


def _is_plain(conversations: object) -> bool:
    """Whether turns are texts under the two names, and nothing else."""
    return isinstance(conversations, list) and all(
        isinstance(turn, dict)
        and turn.keys() == {"from", "value"}
        and all(isinstance(text, str) and is_text(text) for text in turn.values())
        for turn in conversations
    )


def _ascii(value: object) -> str:
    return json.dumps(value)
