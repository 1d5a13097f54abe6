"""The typed schema of a run: a ConfigDict in, frozen dataclasses out.

A file in configs/ holds `get_config(variant)`, which fills `defaults()` in; the command line changes
fields with --config.SECTION.FIELD=VALUE. What is misspelt or of another type is refused at once.

>>> config = load("configs/stage2.py:v1.5-7b", {"batch.conversations": "64"})
"""

import ast
import dataclasses
import difflib
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from llava_jax import files


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of conversations.

    path: LLaVA's JSON or JSONL, a folder with ScienceQA's problems.json, or one that prepare_data
    built; told apart by content. images: folders or zip files that image names are relative to.
    take: 'all', 'first:N', 'random:N' or 'fraction:0.25', of each epoch the same.
    repeat: how often an epoch shows what was taken. split, prompt: of ScienceQA.
    """

    path: str
    images: tuple[str, ...] = ()
    take: str = "all"
    repeat: int = 1
    split: str = "train"
    prompt: str = "QCM-LEPA"
    builder: Literal["llava_pretrain", "llava_instruct", "science_qa"] = "llava_instruct"


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from, and how it becomes tokens and pixels. See conversation.Template.

    conversation_tokens: the longest one, its images counted; too_long: what becomes of others.
    max_bad_fraction: of refused conversations and broken pictures; more of them stop the run.
    prepared: where lengths are kept, so that a run starts at once.
    """

    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    tokenizer: str = ""
    template: str = "v1"
    start_end_tokens: bool = False
    text_restarts: bool = True
    image_at: Literal["first", "as_written", "random"] = "first"
    image_mode: Literal["crop", "pad"] = "pad"
    image_size: int = 336
    patch_size: int = 14
    conversation_tokens: int = 2048
    too_long: Literal["cut_turns", "cut_tokens", "drop"] = "cut_turns"
    max_bad_fraction: float = 0.01
    prepared: str = "data/prepared"
    threads: int = 8
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """conversations: of a step, on average where rows are packed. tokens, images: of a row.

    pack: several conversations a row, blind to each other. by_length: without packing, steps of
    conversations of like length, with or without pictures, as the reference groups them.
    """

    conversations: int = 128
    pack: bool = True
    tokens: int = 4096
    images: int = 12
    by_length: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. Sections are documented at their classes."""

    name: str = "run"
    seed: int = 42
    epochs: int = 1
    data: Data = Data()
    batch: Batch = Batch()


def defaults() -> ConfigDict:
    """Every field with its default, for a config file to fill in. New keys are refused."""
    return _to_dict(Config())


def sources(**named: Source) -> ConfigDict:
    """For config.data.sources: the name of each is what tables and losses call it."""
    return ConfigDict({name: _to_dict(source) for name, source in named.items()})


def _to_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return ConfigDict(
            {field.name: _to_dict(getattr(value, field.name)) for field in fields},
            convert_dict=False,
        ).lock()
    return ConfigDict(value) if isinstance(value, Mapping) else value


def load(name: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of 'configs/stage2.py' or 'configs/stage2.py:variant', with fields changed."""
    file, _, variant = name.partition(":")
    if not files.path(file).is_file():
        raise ValueError(f"got config {file}, expected a file such as configs/stage2.py")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise ValueError(f"got {file} without get_config(variant), expected a config file")
    tree = get_config(variant) if variant else get_config()
    for key, text in (overrides or {}).items():
        _override(tree, key, text)
    return typed(tree)


def typed(tree: ConfigDict) -> Config:
    """The dataclasses of a filled-in ConfigDict."""
    return _typed(Config, tree, "config")


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """{'optim.lr': '1e-5'} of ['--config.optim.lr=1e-5']."""
    found = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise ValueError(f"got {argument}, expected --config.FIELD=VALUE")
        found[key] = value
    return found


def variants(choices: Mapping[str, Any], variant: str) -> Any:
    """choices[variant], or a sentence naming what there is."""
    if variant not in choices:
        raise ValueError(f"got variant {variant!r}, expected one of {', '.join(choices)}")
    return choices[variant]


def _override(tree: ConfigDict, key: str, text: str) -> None:
    *sections, field = key.split(".")
    place = tree
    for done, section in enumerate([*sections, field]):
        if not isinstance(place, ConfigDict) or section not in place:
            known = list(place) if isinstance(place, ConfigDict) else []
            raise ValueError(_unknown(".".join(["config", *key.split(".")[: done + 1]]), known))
        if done < len(sections):
            place = place[section]
    if isinstance(place[field], ConfigDict):
        raise ValueError(f"got config.{key}={text}, expected a field of it: it is a section")
    place.update({field: text}) if isinstance(place[field], str) else _set(place, field, text)


def _set(place: ConfigDict, field: str, text: str) -> None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(place[field], tuple) and isinstance(value, str):
        value = tuple(value.split(","))
    with place.ignore_type():  # _typed says it better
        place[field] = value


def _unknown(path: str, known: Sequence[str]) -> str:
    *_, name = path.split(".")
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}"
    return f"got unknown field {path}; {hint}"


def _typed(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ConfigDict):
            raise ValueError(f"got {path} = {value!r}, expected a section with fields")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise ValueError(_unknown(f"{path}.{name}", list(hints)))
        fields = {name: _typed(hints[name], value[name], f"{path}.{name}") for name in value}
        missing = [
            field.name
            for field in dataclasses.fields(typing.cast(Any, kind))
            if field.name not in fields
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"got {path} without {missing[0]}, expected it")
        return kind(**fields)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Mapping or isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: _typed(inside[1], value[name], f"{path}.{name}") for name in value}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"got {path} = {value!r}, expected a list")
        return tuple(_typed(inside[0], item, path) for item in value)
    if origin is Literal:
        if value not in inside:
            raise ValueError(
                f"got {path} = {value!r}, expected one of {', '.join(map(repr, inside))}"
            )
        return value
    if origin is types.UnionType:
        if value is None:
            return None
        return _typed(inside[0], value, path)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"got {path} = {value!r}, expected {_NAMES[kind]}")
    return value


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}
