"""Verbs run as their users run them."""

import sys
from types import ModuleType
from typing import Any

import pytest

from llava_jax import cli
from tests.data import small

CONFIG = """
from llava_jax import config as c

VARIANTS = {{"": ""}}

def get_config(variant=""):
    config = c.defaults()
    config.data.sources = c.sources(
        chats=c.Source("{folder}/chat.json", images=("{folder}/images",)),
        captions=c.Source("{folder}/chat.json", images=("{folder}/images",), take="random:8"),
    )
    config.data.tokenizer = "{folder}/tokenizer"
    config.data.image_size, config.data.patch_size = 28, 14
    config.data.conversation_tokens = config.batch.tokens = 320
    config.batch.conversations, config.batch.images = 8, 6
    config.data.prepared = "{folder}/prepared"
    return config
"""


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


@pytest.fixture
def config(tmp_path):
    """A config file over the small data set, two sources of it."""
    small.write(tmp_path)
    (tmp_path / "run.py").write_text(CONFIG.format(folder=tmp_path))
    return str(tmp_path / "run.py")
