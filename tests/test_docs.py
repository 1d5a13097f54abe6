"""Documents that cannot drift: the README's examples run, its tree is the real one."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_jax.config import typed
from llava_jax.models.llava import released
from llava_jax.planner import plan as plans
from llava_jax.planner.compiling import DoesNotFit
from llava_jax.planner.memory import Held
from llava_jax.planner.topology import topology
from tests.conftest import CHECKOUT, import_torch
from tests.weights import checkpoints

README = (CHECKOUT / "README.md").read_text()


@pytest.fixture(scope="module")
def folder_of_a_reader(tmp_path_factory) -> Path:
    """What the README's examples name: checkpoints, tiny here, and a photograph."""
    folder = tmp_path_factory.mktemp("reader")
    checkpoints.hugging_face(folder / "llava-1.5-7b-hf")
    checkpoints.original(folder / "llava-v1.5-7b", with_tower=False)
    checkpoints.clip(folder / "clip-vit-large-patch14-336")
    checkpoints.llama(folder / "vicuna-7b-v1.5")
    Image.new("RGB", (90, 60), "orange").save(folder / "photo.jpg")
    for name in ("configs", "llava_jax"):
        (folder / name).symlink_to(CHECKOUT / name)
    return folder


def test_the_readmes_examples_run(folder_of_a_reader, monkeypatch):
    monkeypatch.chdir(folder_of_a_reader)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:  # one after another, as a reader would paste them
        exec(compile(block, "README.md", "exec"), names)
    config = typed(names["get_config"]())
    assert config.name == "stage2-v1.5-7b"
    assert config.data.sources["llava"].take == "fraction:0.1"


def compile_nothing(config, slice_name: str, **options: Any) -> None:
    """In place of minutes: the question is understood, and the answer no."""
    assert (config.name, topology(slice_name).chips) == ("stage2-v1.5-7b", 16)
    held = Held(2**38, 2**38, released("v1.5-7b").language, 4096)
    raise plans.TooLarge(DoesNotFit(2**40, 2**34, ()), held, rows=2, conversations=80)


def test_the_readmes_commands_run(folder_of_a_reader, monkeypatch):
    import_torch()  # --verify compares with it
    monkeypatch.chdir(folder_of_a_reader)
    monkeypatch.setattr(plans, "plan", compile_nothing)
    commands = re.findall(r"^python (-m \S+|launch/\w+\.py) (.*)$", README, re.MULTILINE)
    assert len(commands) >= 7
    for verb, arguments in commands:
        verb = verb.removeprefix("-m ").removesuffix(".py").replace("/", ".")
        if not verb.startswith("launch."):
            verb, arguments = f"{verb}.__main__", f"{arguments} --scenes 40"
        if verb == "launch.train":
            arguments = f"{arguments} --config.held_out.every=0 --config.compute.cache="
        monkeypatch.setattr(sys, "argv", [verb, *shlex.split(arguments)])
        ended = importlib.import_module(verb).main()
        assert (ended or 0) == (3 if verb == "launch.plan" else 0)
    assert Path("rows.html").stat().st_size > 10_000
    assert Path("runs/stage2-tiny/model/llava.json").exists()


def test_the_readmes_tree_is_the_real_one():
    tree = README.split("## The house\n```\n")[1].split("```")[0]
    told = set(re.findall(r"(?<![\w/])(\w+\.py|\w+/)", tree))
    real = {
        path.name + ("/" if path.is_dir() else "")
        for folder in ("llava_jax", "llava_jax/models")
        for path in (CHECKOUT / folder).iterdir()
        if not path.name.startswith("_")
    }
    top = {"llava_jax/", "configs/", "launch/", "benchmarks/", "tests/", "docs/"}
    assert told - {"layers.py"} == real - {"layers.py"} | top, "the README's tree has drifted"


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{p.name}" for p in (CHECKOUT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(document):
    path = CHECKOUT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{document} links to {target}"


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets
