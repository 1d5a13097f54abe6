"""The typed schema of a run: a ConfigDict in, frozen dataclasses out.

A file in configs/ holds `get_config(variant)`, which fills `defaults()` in; the command line
changes fields with --config.SECTION.FIELD=VALUE. What is misspelt or of another type is refused at
once.

>>> config = load("configs/stage2.py:v1.5-7b", {"batch.conversations": "64"})
"""

import argparse
import ast
import dataclasses
import difflib
import re
import runpy
import sys
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
    epochs: how often one of the run shows what was taken. split, prompt: of ScienceQA.
    """

    path: str
    images: tuple[str, ...] = ()
    take: str = "all"
    epochs: int = 1
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


def defaults() -> Any:
    """Every field with its default, a ConfigDict for a config file to fill in."""
    return _to_dict(Config())


def sources(**named: Source) -> ConfigDict:
    """For config.data.sources: the name of each is what tables and losses call it."""
    for name in named:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"got source name {name!r}, expected letters, digits and _")
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
    tree = start_from(name)
    for key, text in (overrides or {}).items():
        _override(tree, key, text)
    return typed(tree)


def start_from(name: str) -> Any:
    """What a config file gives, for another one to change: start_from("configs/stage2.py:tiny")."""
    file, _, variant = name.partition(":")
    if not files.path(file).is_file():
        raise ValueError(f"got config {file}, expected a file such as configs/stage2.py")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise ValueError(f"got {file} without get_config(variant), expected a config file")
        return get_config(variant) if variant else get_config()
    except (AttributeError, KeyError, TypeError, ImportError, SyntaxError, NameError) as error:
        # What ml_collections says of a misspelt key goes on for pages; the end of it is this.
        if misspelt := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error)):
            meant, got = misspelt.groups()
            raise ValueError(f"{file}: got unknown field {got}; did you mean {meant}?") from error
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error


def typed(tree: ConfigDict) -> Config:
    """The dataclasses of a filled-in ConfigDict."""
    return _typed(Config, tree, "config")


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """The options of a verb that runs a config: --config FILE[:VARIANT] --config.FIELD=VALUE …"""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT]",
        help="a file of configs/, and one of its variants; --config.SECTION.FIELD=VALUE, as often "
        "as needed, changes a field",
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    changes = [argument for argument in given if argument.startswith("--config.")]
    options = parser.parse_args([argument for argument in given if argument not in changes])
    return options, load(options.config, parse_overrides(changes))


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


def _override(tree: Any, key: str, text: str) -> None:
    *sections, field = key.split(".")
    place, path = tree, "config"
    for name in sections:
        path += f".{name}"
        if not isinstance(place, ConfigDict) or name not in place:
            raise ValueError(_unknown(path, list(place) if isinstance(place, ConfigDict) else []))
        place = place[name]
    path += f".{field}"
    if not isinstance(place, ConfigDict) or field not in place:
        raise ValueError(_unknown(path, list(place) if isinstance(place, ConfigDict) else []))
    if isinstance(place[field], ConfigDict):
        raise ValueError(f"got {path}={text}, expected a field of it: it is a section")
    with place.ignore_type():  # `typed` says it better
        place[field] = _parsed(text, like=place[field])


def _parsed(text: str, like: object) -> object:
    if isinstance(like, str):
        return text
    if isinstance(like, tuple) and text[:1] not in ("(", "["):
        return tuple(filter(None, text.split(",")))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _unknown(path: str, known: Sequence[str]) -> str:
    parent, _, name = path.rpartition(".")
    if not known:
        return f"got unknown field {path}; {parent} has none"
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}"
    return f"got unknown field {path}; {hint}"


def _typed(kind: Any, value: Any, path: str) -> Any:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, path)
    if origin is Mapping:
        return {name: _typed(inside[1], value[name], f"{path}.{name}") for name in value}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"got {path} = {value!r}, expected a list")
        return tuple(_typed(inside[0], item, path) for item in value)
    if origin is Literal:
        if value not in inside:
            known = ", ".join(map(repr, inside))
            raise ValueError(f"got {path} = {value!r}, expected one of {known}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"got {path} = {value!r}, expected {_KINDS[kind]}")
    return value


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _section(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping | ConfigDict):
        raise ValueError(f"got {path} = {value!r}, expected a section with fields")
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise ValueError(_unknown(f"{path}.{name}", list(hints)))
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory and field.name not in value:
            raise ValueError(f"got {path} without {field.name}, expected it")
    return kind(**{name: _typed(hints[name], value[name], f"{path}.{name}") for name in value})
