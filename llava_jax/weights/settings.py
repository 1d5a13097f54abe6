"""JSON as settings: somebody's config.json, and our own dataclasses. Typed, with the file and the
name in every complaint."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from etils import epath

T = typing.TypeVar("T")


class Settings:
    """A JSON object. `default`s are those of the class that wrote it: released files leave out
    whatever equals them."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    @classmethod
    def read(cls, file: epath.Path) -> "Settings":
        def refuse(constant: str) -> None:
            raise ValueError(f"it holds {constant}")

        try:
            values = json.loads(file.read_bytes(), parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: got {type(values).__name__}, expected a JSON object")
        return cls(values, str(file))

    @classmethod
    def read_if_there(cls, file: epath.Path) -> "Settings":
        return cls.read(file) if file.exists() else cls({}, str(file))

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value, or the default where it is absent or null."""
        if name not in self:
            if default is ...:
                raise ValueError(f"{self.where}: {name!r} is missing")
            return default
        value = self.values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds:
            kinds += (int,)
        # JSON's true is an int to Python, and would pass for one.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"{self.where}: {name!r} is {value!r}, expected {expected}")
        return value

    def size(self, name: str, default: Any = ...) -> int:
        value = self.get(name, int, default)
        if value < 1:
            raise ValueError(f"{self.where}: {name!r} is {value}, expected 1 or more")
        return value

    def inner(self, name: str) -> "Settings":
        return Settings(self.get(name, dict, {}), f"{self.where}, {name!r}")

    def only(self, name: str, supported: Any, default: Any) -> None:
        """Refuses a setting that changes the function in a way this system does not have."""
        value = self.values[name] if name in self else default
        if value != supported:
            raise ValueError(
                f"{self.where}: {name!r} is {value!r}, only {supported!r} is supported"
            )


def to_json(value: Any) -> Any:
    """A dataclass of dataclasses, tuples and plain values, in full."""
    return dataclasses.asdict(value)


def from_json(cls: type[T], values: Any, where: str) -> T:
    """The dataclass that `to_json` wrote. Absent fields take their defaults, so that older files
    stay readable; unknown ones are refused, for they would have meant something."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: got {values!r}, expected an object")
    kinds = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(f"{where}: unknown {unknown}, expected names among {sorted(kinds)}")
    settings = Settings(values, where)
    read = {name: _read_field(settings, name, kinds[name]) for name in values}
    required = {
        field.name
        for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        if field.default is field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - read.keys()):
        raise ValueError(f"{where}: {missing[0]!r} is missing")
    return cls(**read)


def _read_field(settings: Settings, name: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):  # X | None
        if settings.values[name] is None:
            return None
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        value, known = settings.values[name], typing.get_args(kind)
        if value not in known:
            raise ValueError(f"{settings.where}: {name!r} is {value!r}, expected one of {known}")
        return value
    if dataclasses.is_dataclass(kind):
        return from_json(kind, settings.values[name], f"{settings.where}, {name!r}")  # pyright: ignore
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        values = settings.get(name, list)
        each = Settings(dict(enumerate(values)), f"{settings.where}, {name!r}")  # pyright: ignore
        return tuple(each.get(i, element) for i in range(len(values)))  # pyright: ignore
    return settings.get(name, kind)
