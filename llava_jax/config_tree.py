"""A ConfigDict as people fill it in, to dataclasses: fields changed by text, types checked, and
what is misspelt told with what was meant. It knows no field of any run.
"""

import ast
import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict


def override(tree: Any, key: str, text: str) -> None:
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
        numbers = like and isinstance(like[0], int)
        return tuple(_parsed(item, like=0 if numbers else "") for item in text.split(",") if item)
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


def typed(kind: Any, value: Any, path: str) -> Any:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, path)
    if origin is Mapping:
        return {name: typed(inside[1], value[name], f"{path}.{name}") for name in value}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"got {path} = {value!r}, expected a list")
        return tuple(typed(inside[0], item, path) for item in value)
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
    return kind(**{name: typed(hints[name], value[name], f"{path}.{name}") for name in value})
