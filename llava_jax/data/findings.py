"""What a look at all the data found: counted by kind, the first few of each by name."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

_NAMED = 5  # examples of each kind


@dataclasses.dataclass
class Findings:
    """How often each kind of thing was found, and the first few of them."""

    count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.count[kind] += 1
        named = self.first.setdefault(kind, [])
        if len(named) < _NAMED:
            named.append(example)

    def merge(self, other: "Findings") -> None:
        self.count += other.count
        for kind, named in other.first.items():
            mine = self.first.setdefault(kind, [])
            mine += named[: _NAMED - len(mine)]

    def to_json(self) -> dict:
        return {
            kind: {"count": count, "first": self.first[kind]}
            for kind, count in self.count.most_common()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Findings":
        count = collections.Counter({kind: found["count"] for kind, found in value.items()})
        return cls(count, {kind: found["first"] for kind, found in value.items()})
