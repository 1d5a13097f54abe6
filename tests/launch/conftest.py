"""Verbs run as their users run them."""

import sys
from types import ModuleType
from typing import Any

import pytest

from llava_jax import cli


class Outcome:
    def __init__(self, code: Any, out: str, err: str):
        self.code, self.out, self.err = code, out, err
        self.errors = [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def run_verb(monkeypatch, capsys):
    """run_verb(launch.convert, "import", SRC, DST): what it printed and how it ended."""

    def run(verb: ModuleType, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{verb.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.run(verb.main)
        captured = capsys.readouterr()
        return Outcome(exit.value.code, captured.out, captured.err)

    return run
