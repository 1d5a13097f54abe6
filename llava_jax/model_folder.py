"""A model folder: weights that say what they are.

    llava.json     architecture, conversation, image processing, special tokens; dtype, shape and
                   SHA-256 of every tensor, and the fingerprint of them all
    params/        an Orbax checkpoint, one leaf per layer and tensor, each in the dtype it came in
    tokenizer.*    the tokenizer's files, as they came

Nothing is read from the folder's name. A thin folder holds some leaves (a projector, LoRA factors)
and names the fingerprint of the folder that holds the others.

`StoredModel` is the hub of all conversion: every source of weights is opened as one, its tensors
unread, and everything that is written is written from one.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.image import Mode
from llava_jax.models.llava import LlavaConfig, released
from llava_jax.weights import orbax_io, settings
from llava_jax.weights.io import sha256
from llava_jax.weights.memory import stored_shapes
from llava_jax.weights.tensor import Tensor
from llava_jax.weights.tokenizer_files import with_added

FORMAT = 1
_COUNTED_AT_ONCE = 1 << 18
DESCRIPTION, PARAMS = "llava.json", "params"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Ids the system itself must know. image: the placeholder's own id, where there is one;
    start, end and patch are LLaVA v1's."""

    bos: int = 1
    eos: int = 2
    pad: int | None = None
    image: int | None = None
    image_start: int | None = None
    image_end: int | None = None
    image_patch: int | None = None


@dataclasses.dataclass(frozen=True)
class About:
    """What the weights mean and how they want to be spoken to.

    template, start_end_tokens, text_restarts: of conversation.py. image_mode: of image.py.
    tower: what others call this vision tower. context: positions the language model was trained on.
    """

    config: LlavaConfig
    template: str = "v1"
    start_end_tokens: bool = False
    text_restarts: bool = True
    image_mode: Mode = "pad"
    tower: str | None = None
    context: int = 2048
    tokens: Tokens = Tokens()

    @property
    def variant(self) -> str | None:
        """The released LLaVA of this architecture, if it is one's; added ids do not matter."""
        for name in ("v1-7b", "v1-13b", "v1.5-7b", "v1.5-13b"):
            language = released(name).language
            mine = dataclasses.replace(
                self.config.language,
                vocab_size=language.vocab_size,
                added_vocab=language.added_vocab,
                lora=language.lora,
            )
            if released(name) == dataclasses.replace(self.config, language=mine):
                return name
        return None


@dataclasses.dataclass(frozen=True)
class Base:
    """Where the other leaves of a thin folder are: proven by fingerprint, looked for at path."""

    fingerprint: str
    path: str


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A whole model, unread. leaves: by stored path, 'language/decoder/layers/3/q/kernel'.

    tokenizer: the folder with its files, if there are any. added_tokens: those it does not have
    yet. kind: of the folder it was opened from. digests: of the leaves, where they are known
    without reading. own: the leaves that are not a base's. base: what a thin folder or a run names
    as its. notes: what a user should know of how it was opened.
    """

    about: About
    leaves: Mapping[str, Tensor]
    tokenizer: epath.Path | None = None
    added_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kind: str = "model folder"
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own: frozenset[str] = frozenset()
    base: Base | None = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.leaves.values())

    def tokenizer_files(self) -> dict[str, bytes]:
        read = tokenizer_files(self.tokenizer)
        return with_added(read, self.added_tokens) if self.added_tokens else read


@dataclasses.dataclass(frozen=True)
class Report:
    """What went by while a model was written."""

    digests: Mapping[str, str]
    not_finite: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.digests)


class Observer:
    """Hashes the tensors that pass it, and counts what is not finite: legal, and worth knowing."""

    def __init__(self, on_bytes: Callable[[int], None] = lambda count: None):
        self._digests: dict[str, str] = {}
        self._not_finite: dict[str, int] = {}
        self._on_bytes = on_bytes

    def __call__(self, path: str, array: np.ndarray) -> None:
        self._digests[path] = sha256(array)
        if count := _count_not_finite(array):
            self._not_finite[path] = count
        self._on_bytes(array.nbytes)

    def report(self) -> Report:
        return Report(dict(sorted(self._digests.items())), dict(sorted(self._not_finite.items())))


def is_model_folder(folder: epath.Path) -> bool:
    return (folder / DESCRIPTION).exists()


def is_whole(folder: epath.Path) -> bool:
    """Whether it is a model folder that needs no base."""
    return is_model_folder(folder) and _read_description(folder).base is None


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """Of a set of tensors: it changes with any name and any bit."""
    lines = "".join(f"{path} {digest}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


# Writing.


def save(
    stored: StoredModel,
    dst: epath.Path,
    *,
    base: Base | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Report:
    """Writes the folder; it appears when it is complete. base: the leaves are only some of the
    model's, the rest being there."""
    expected = stored_shapes(stored.about.config)
    check_leaves(stored.leaves, expected, whole=base is None)
    with files.fresh_folder(dst, last=DESCRIPTION) as folder:
        observer = Observer(on_bytes)
        orbax_io.save(folder / PARAMS, stored.leaves, observer)
        report = observer.report()
        for name, content in stored.tokenizer_files().items():
            files.write_bytes(folder / name, content)
        files.write_json(folder / DESCRIPTION, _described(stored, report, base))
    return report


def thin(stored: StoredModel, base: epath.Path, dst: epath.Path) -> tuple[StoredModel, Base]:
    """Only what is the model's own, and where the rest is, as seen from `dst`."""
    if not stored.own or stored.own == stored.leaves.keys():
        raise ValueError(
            f"got a model with {len(stored.own)} of {len(stored.leaves)} leaves of its own; "
            "expected some, and the others from the base"
        )
    leaves = {path: stored.leaves[path] for path in sorted(stored.own)}
    return dataclasses.replace(stored, leaves=leaves, tokenizer=None), base_for(dst, base)


def base_for(dst: epath.Path, base: epath.Path) -> Base:
    """How a folder at `dst` names its base. By a relative path, so that both can move together."""
    remote = "://" in str(base) or "://" in str(dst)
    place = str(base) if remote else os.path.relpath(os.path.realpath(base), os.path.realpath(dst))
    return Base(fingerprint(base), place)


def _described(stored: StoredModel, report: Report, base: Base | None) -> dict[str, Any]:
    return {
        "llava_jax": FORMAT,
        "variant": stored.about.variant,
        **settings.to_json(stored.about),
        "base": None if base is None else settings.to_json(base),
        "fingerprint": report.fingerprint,
        "tensors": {
            path: {
                "dtype": stored.leaves[path].dtype.name,
                "shape": list(stored.leaves[path].shape),
                "sha256": digest,
            }
            for path, digest in report.digests.items()
        },
    }


def check_leaves(
    leaves: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, whole: bool = True
) -> None:
    """Raises ValueError with every leaf that is missing, unknown or of another shape."""
    problems = [
        f"{leaves[path].origin}: got shape {leaves[path].shape}, expected {expected[path]}"
        for path in leaves
        if path in expected and tuple(leaves[path].shape) != tuple(expected[path])
    ]
    problems += [f"{path}: not a leaf of this architecture" for path in leaves.keys() - expected]
    if whole:
        problems += [
            f"{path}: missing, expected shape {expected[path]}" for path in expected.keys() - leaves
        ]
    if problems:
        raise ValueError(
            f"{len(problems)} leaves do not fit the architecture:\n  " + "\n  ".join(problems)
        )


# Reading.


def read(folder: epath.Path, base: epath.Path | None = None) -> StoredModel:
    """Opens a folder, with its base if it is thin. base: where that is, if it was moved."""
    described = _read_description(folder)
    about, tensors = described.about, described.tensors
    depth = max(about.config.vision.num_layers, about.config.language.num_layers)
    if depth > 10_000:  # before a list of all leaves is made
        raise ValueError(f"{folder / DESCRIPTION}: got {depth} layers, expected a real model's")
    leaves = orbax_io.read(folder / PARAMS)
    problems = [f"{path}: in {DESCRIPTION}, not in params/" for path in tensors.keys() - leaves]
    problems += [f"{path}: in params/, not in {DESCRIPTION}" for path in leaves.keys() - tensors]
    for path in leaves.keys() & tensors:
        got = (leaves[path].dtype.name, list(leaves[path].shape))
        expected = (tensors[path]["dtype"], tensors[path]["shape"])
        if got != expected:
            problems.append(f"{path}: got {got[0]} {got[1]}, expected {expected[0]} {expected[1]}")
    if problems:
        raise ValueError(
            f"{folder}: {DESCRIPTION} and params/ disagree:\n  " + "\n  ".join(sorted(problems))
        )
    digests = {path: tensor["sha256"] for path, tensor in tensors.items()}
    tokenizer, own = tokenizer_folder(folder), frozenset(leaves)
    if described.base is None and base is not None:
        raise ValueError(f"got base {base} for {folder}, which holds a whole model: leave it out")
    if described.base is not None:
        under = read_base(folder, described.base, base)
        leaves, digests = {**under.leaves, **leaves}, {**under.digests, **digests}
        tokenizer = tokenizer or under.tokenizer
    check_leaves(leaves, stored_shapes(about.config))
    return StoredModel(
        about,
        leaves,
        tokenizer,
        digests=digests,
        own=frozenset() if described.base is None else own,
        base=described.base,
    )


def fingerprint(folder: epath.Path) -> str:
    return _read_description(folder).fingerprint


def tokenizer_folder(folder: epath.Path) -> epath.Path | None:
    """The folder itself, if there is a tokenizer in it."""
    vocabularies = ("tokenizer.model", "tokenizer.json")
    return folder if any((folder / name).exists() for name in vocabularies) else None


def tokenizer_files(folder: epath.Path | None) -> dict[str, bytes]:
    if folder is None:
        return {}
    return {
        name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()
    }


@dataclasses.dataclass(frozen=True)
class _Description:
    about: About
    base: Base | None
    fingerprint: str
    tensors: Mapping[str, Any]


def _read_description(folder: epath.Path) -> _Description:
    file = folder / DESCRIPTION
    if not file.exists():
        raise ValueError(f"got {folder}, which holds no {DESCRIPTION}: expected a model folder")
    try:
        described = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(described, dict) or described.get("llava_jax") != FORMAT:
        got = described.get("llava_jax") if isinstance(described, dict) else described
        raise ValueError(
            f'{file}: got format {got!r}, expected "llava_jax": {FORMAT}; import the weights '
            "again with launch/convert.py"
        )
    for derived in ("llava_jax", "variant"):
        described.pop(derived, None)
    base = described.pop("base", None)
    tensors, fingerprint = described.pop("tensors", None), described.pop("fingerprint", None)
    if not isinstance(tensors, dict) or not isinstance(fingerprint, str):
        raise ValueError(f"{file}: expected 'tensors' (an object) and 'fingerprint' (a string)")
    for path, tensor in tensors.items():
        if not isinstance(tensor, dict) or {"dtype", "shape", "sha256"} - tensor.keys():
            raise ValueError(f"{file}: tensor {path!r} has no dtype, shape and sha256")
    digests = {path: tensor["sha256"] for path, tensor in tensors.items()}
    if fingerprint_of(digests) != fingerprint:
        raise ValueError(
            f"{file}: the fingerprint is not that of the tensors listed: the file was changed by "
            "hand; import the weights again"
        )
    return _Description(
        about=settings.from_json(About, described, str(file)),
        base=None if base is None else settings.from_json(Base, base, f"{file}, 'base'"),
        fingerprint=fingerprint,
        tensors=tensors,
    )


def read_base(folder: epath.Path, base: Base, given: epath.Path | None) -> StoredModel:
    place = files.path(base.path) if given is None else given
    if given is None and "://" not in base.path and not place.is_absolute():
        place = folder / base.path
    if not is_model_folder(place):
        raise ValueError(
            f"{folder} holds some of a model's weights; the others, of fingerprint "
            f"{base.fingerprint[:12]}…, are not at {place}: name their folder as the base"
        )
    if (found := fingerprint(place)) != base.fingerprint:
        raise ValueError(
            f"{folder} was made for weights of fingerprint {base.fingerprint[:12]}…; got {place} "
            f"of fingerprint {found[:12]}…"
        )
    return read(place)


def _count_not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite. By their bits: a test of bf16 values takes longer than
    reading them."""
    if not np.issubdtype(array.dtype, np.inexact) and array.dtype.name != "bfloat16":
        return 0
    flat = np.ascontiguousarray(array).reshape(-1)
    # In pieces that stay in the cache: a second array of this size costs more than the counting.
    pieces = (flat[i : i + _COUNTED_AT_ONCE] for i in range(0, flat.size, _COUNTED_AT_ONCE))
    if array.dtype.itemsize == 2:
        smallest = np.uint16(0x7F80 if array.dtype.name == "bfloat16" else 0x7C00)
        magnitudes = (piece.view(np.uint16) & np.uint16(0x7FFF) for piece in pieces)
        return sum(int(np.count_nonzero(magnitude >= smallest)) for magnitude in magnitudes)
    return sum(int(piece.size - np.count_nonzero(np.isfinite(piece))) for piece in pieces)
