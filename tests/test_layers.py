"""Imports go one way, the core imports without its extras, and files stay short."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT
from tests.layers import problems

FOLDERS = ("llava_jax", "launch", "configs")
SOURCES = [file for folder in FOLDERS for file in sorted((CHECKOUT / folder).rglob("*.py"))]
MOST_LINES = 600  # and 400 is the aim


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(CHECKOUT)))
def test_imports_go_one_way(file: Path):
    assert problems(str(file.relative_to(CHECKOUT)), file.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("llava_jax/novelty.py", "", "give it a layer"),
        ("llava_jax/novelty/deep/inside.py", "", "give it a layer"),
        ("llava_jax/image.py", "import jax.numpy", "jax"),
        ("llava_jax/image.py", "import etils", "etils"),
        ("llava_jax/image.py", "def load():\n    import torch", "torch"),
        ("llava_jax/files.py", "import ml_collections", "ml_collections"),
        ("llava_jax/image.py", "from llava_jax import tokenizer", "higher layer"),
        ("llava_jax/picture_world/scene.py", "import jax", "jax"),
        ("llava_jax/tokenizer.py", "import llava_jax.models.llama", "higher layer"),
        ("llava_jax/data/pipeline.py", "from ..sharding import local_rows", "higher layer"),
        ("llava_jax/data/pipeline.py", "from .. import sharding", "higher layer"),
        ("llava_jax/datagen/teacher.py", "import jax", "jax"),
        ("llava_jax/models/llama.py", "from llava_jax.files import path", "files"),
        ("llava_jax/models/llama.py", "import ml_collections", "ml_collections"),
        ("llava_jax/models/llama.py", "import pathlib", "pathlib"),
        ("llava_jax/models/llama.py", "from llava_jax.sharding import mesh", "higher layer"),
        ("llava_jax/models/llama.py", "import jax.sharding", "sharding"),
        ("llava_jax/models/llama.py", "from jax.sharding import Mesh", "sharding"),
        ("llava_jax/models/llama.py", "import jax\njax.sharding.Mesh(1, 2)", "sharding"),
        ("llava_jax/models/llama.py", "import jax\njax.make_mesh((1,), ('a',))", "make_mesh"),
        ("llava_jax/optim.py", "from llava_jax.data import packing", "data"),
        ("llava_jax/weights/io.py", "from llava_jax import engine", "higher layer"),
        ("llava_jax/step.py", "from llava_jax.data import packing", "data"),
        ("llava_jax/planner/plan.py", "from jax.sharding import PartitionSpec", "PartitionSpec"),
        ("llava_jax/engine.py", "import jax\njax.sharding.PartitionSpec()", "PartitionSpec"),
        ("llava_jax/engine.py", "import jax\njax.P('data')", "PartitionSpec"),
        ("llava_jax/engine.py", "from jax import P", "PartitionSpec"),
        ("llava_jax/evals/pope.py", "from llava_jax import engine", "evals"),
        ("llava_jax/evals/pope.py", "from llava_jax.tokenizer import load", "evals"),
        ("llava_jax/server/app.py", "from llava_jax import step", "server"),
        ("llava_jax/engine.py", "from llava_jax import load", "__init__"),
        ("llava_jax/engine.py", "from configs import stage1", "configs"),
        ("llava_jax/engine.py", "import launch.train", "launch"),
        ("llava_jax/engine.py", "from tests import conftest", "tests"),
        ("launch/train.py", "from launch import plan", "launch"),
        ("launch/train.py", "import configs.stage1", "configs"),
        ("configs/stage1.py", "from llava_jax import optim", "config"),
        ("configs/stage1.py", "import jax", "jax"),
    ],
)
def test_checker_sees(path: str, source: str, says: str):
    found = problems(path, source)
    assert len(found) == 1
    assert path in found[0]
    assert says in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("llava_jax/image.py", "import io\nimport numpy as np\nfrom PIL import Image"),
        ("llava_jax/config.py", "import ml_collections"),
        ("llava_jax/llm_client.py", "import openai"),
        ("llava_jax/picture_world/towers.py", "import jax\nfrom llava_jax import step"),
        ("llava_jax/data/pipeline.py", "import grain\nfrom llava_jax import tokenizer, image"),
        ("llava_jax/models/llama.py", "import jax\nfrom . import attention"),
        ("llava_jax/sharding.py", "from jax.sharding import PartitionSpec as P"),
        ("llava_jax/planner/plan.py", "from llava_jax import __version__, sharding, step"),
        ("llava_jax/evals/pope.py", "from llava_jax.evals import judge\nimport llava_jax.image"),
        ("llava_jax/server/app.py", "from llava_jax import engine, conversation"),
        ("llava_jax/__init__.py", "from llava_jax import engine"),
        ("launch/train.py", "import orbax\nfrom llava_jax import load, data, step"),
        ("launch/demo.py", "from launch import train"),
        ("configs/stage1.py", "import math\nfrom llava_jax.config import Config"),
    ],
)
def test_checker_lets_pass(path: str, source: str):
    assert problems(path, source) == []


BLOCKED = "grain tensorflow_datasets tensorflow transformers torch ml_collections orbax"
IMPORT_WITHOUT_EXTRAS = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED.split()}:
            raise ModuleNotFoundError("blocked by the test: " + name, name=name)

sys.meta_path.insert(0, Blocker())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def import_without_extras(modules: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPORT_WITHOUT_EXTRAS, *modules]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("room", ["models", "step", "engine"])
def test_imports_without_extras(room: str):
    files = [file for file in SOURCES if file.parts[len(CHECKOUT.parts) + 1].split(".")[0] == room]
    if not files:
        pytest.skip(f"there is no llava_jax.{room} yet")
    modules = [".".join(file.relative_to(CHECKOUT).with_suffix("").parts) for file in files]
    done = import_without_extras(modules, CHECKOUT)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks(tmp_path: Path):
    (tmp_path / "sneaky.py").write_text("def lazy():\n    pass\nimport orbax.checkpoint\n")
    done = import_without_extras(["sneaky"], tmp_path)
    assert done.returncode == 1
    assert "blocked by the test: orbax" in done.stderr


def too_long(files: list[Path]) -> list[str]:
    lengths = [(len(file.read_text().splitlines()), file.name) for file in files]
    return [f"{name}: {lines} lines" for lines, name in lengths if lines > MOST_LINES]


def test_files_stay_short(tmp_path: Path):
    tests = sorted((CHECKOUT / "tests").rglob("*.py"))
    assert too_long(SOURCES + tests) == []
    (tmp_path / "long.py").write_text("pass\n" * 601)
    assert too_long([tmp_path / "long.py"]) == ["long.py: 601 lines"]
