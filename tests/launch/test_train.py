"""launch/train.py from a config to a model folder, in this process on eight devices."""

import collections
import contextlib
import logging
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

import llava_jax
from launch import train
from llava_jax import config as configs
from llava_jax import metrics, model_folder, optim
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.weights.memory import params_in_memory, stored_shapes
from tests import training

# Steps of 8 rows, of which an epoch has 22.
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run needs, and the programs it compiles: the same for all of them here."""
    folder = tmp_path_factory.mktemp("train")
    training.write(folder)
    return folder


@pytest.fixture(autouse=True)
def own_programs():
    """The cache of programs is this file's, and only while it runs."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@contextlib.contextmanager
def compilations():
    """Counts by name which programs are compiled, or taken from the cache of compiled ones."""
    found, logger = collections.Counter(), logging.getLogger("jax._src.interpreters.pxla")

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("Compiling %s"):
                found[record.args[0]] += 1  # pyright: ignore

    handler = Counting()
    logger.addHandler(handler)
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        logger.removeHandler(handler)


@pytest.fixture
def trained(folder, run_verb):
    """trained(name, options…): a run in the workdir of that name."""

    def run(name: str, *options: str):
        config = ("--config", folder / "small.py", "--config.checkpoints.every=4")
        return run_verb(train, *config, "--workdir", folder / name, *options)

    return run


def test_a_run_from_config_to_model(folder, trained):
    with compilations() as compiled:
        ended = trained("whole")
    assert ended.code == 0, ended.err
    assert compiled["jit(step)"] == compiled["jit(measure)"] == 1, compiled
    workdir = folder / "whole"
    history = metrics.read(workdir)
    assert [step["step"] for step in history.steps] == list(range(STEPS))
    assert history.steps[-1]["loss"] < history.steps[0]["loss"] - 1
    kinds = [(event["step"], event["kind"]) for event in history.events]
    assert kinds == [(3, "saved"), (5, "held_out"), (5, "answers"), (5, "saved")]
    assert 0 < history.events[1]["loss"] < 7
    assert history.events[2]["ids"] == ["e0", "e1"]
    assert len(history.events[2]["answers"]) == 2
    assert "<html" in (workdir / "first_batch.html").read_text()

    # The model is the last checkpoint over the folder it started from.
    stored = model_folder.read(epath.Path(workdir / "model"))
    last, start = training.learned(workdir), model_folder.read(epath.Path(folder / "start"))
    table = stored.leaves["language/embed/table"].read()
    np.testing.assert_array_equal(table, last["trainable/language/embed/table"][: len(table)])
    kernel = stored.leaves["language/decoder/layers/1/q/kernel"].read()
    np.testing.assert_array_equal(kernel, last["trainable/language/decoder/layers/q/kernel"][1])
    for path in stored_shapes(training.ARCHITECTURE):
        same = np.array_equal(stored.leaves[path].read(), start.leaves[path].read())
        # No text of this data has the ids that were added.
        assert same == (path.startswith("vision/") or path == "language/embed/added"), path
    assert llava_jax.load(workdir / "model").about.template == "v1"

    # What it printed goes on with it, and there is nothing to go on with.
    (printed,) = (line for line in ended.out.splitlines() if line.startswith("workdir: "))
    command = shlex.split(printed.split("to go on with it: ")[1])
    assert command[:2] == ["python", "launch.train.py"]
    assert command[-2:] == ["--workdir", str(workdir)]
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    again = trained("whole")
    assert again.code == 0
    assert "this run is finished: nothing is left to train" in again.out
    assert {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()} == before


TABLE = """\
part              parameters            dtype  weights, MB a device  optimizer, MB a device
vision                36,160  frozen  float32                   0.1                     0.0
projector              6,272  trains  float32                   0.0                     0.1
"""
STAGE_1 = (
    TABLE
    + """\
language/embed        41,088  frozen  float32                   0.2                     0.0
language/decoder      74,048  frozen  float32                   0.3                     0.0
language/head         41,088  frozen  float32                   0.2                     0.0
"""
)
STAGE_2 = (
    TABLE
    + """\
language/embed        41,088  trains  float32                   0.2                     0.3
language/decoder      74,048  trains  float32                   0.3                     0.6
language/head         41,088  trains  float32                   0.2                     0.3
"""
)


@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_the_table_of_parts(stage):
    """The tiny architecture, on one device: 4 bytes a weight, 8 of moments where it trains."""
    trains = configs.STAGE_1 if stage == "stage 1" else configs.STAGE_2
    layout = Layout(make_mesh(MeshShape(), jax.devices()[:1]))
    params = params_in_memory(training.ARCHITECTURE, training.start_model().leaves, layout)
    table = train.parts_table(optim.parts(*optim.split(params, trains)))
    assert table.rstrip() == (STAGE_1 if stage == "stage 1" else STAGE_2).rstrip()


# --- what is wrong is said before the first step ---


@pytest.fixture
def refused(trained, folder):
    """refused("part of the sentence", options…): exit code 2, one line, and no workdir begun."""

    def check(said: str, *options: str, name: str = "refused") -> None:
        before = snapshot(folder / name)
        ended = trained(name, *options)
        assert ended.code == 2, ended.err
        assert len(ended.errors) == 1, ended.err
        assert "Traceback" not in ended.err
        # A sentence may go on in a list of what it speaks of.
        message = ended.err[ended.err.index("error: ") :]
        assert re.search(said, message, re.S), message
        assert "compiling" not in ended.out
        assert snapshot(folder / name) == before

    return check


def snapshot(workdir: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(workdir)): file.read_bytes()
        for file in workdir.rglob("*")
        if file.is_file()
    }


WRONG = {
    "a misspelt field": (["--config.optim.lrr=1"], r"unknown field config.optim.lrr; did you mean"),
    "a misspelt section": (["--config.optimm.lr=1"], r"unknown field config.optimm"),
    "another type": (["--config.epochs=many"], r"got config.epochs = 'many', expected a whole num"),
    "no such choice": (["--config.compute.gather=all"], r"compute.gather = 'all', expected one of"),
    "rows that do not divide": (
        ["--config.batch.pack=False", "--config.batch.conversations=6"],
        r"got config.batch.conversations = 6, one a row, for 8 devices",
    ),
    "groups that do not divide": (
        ["--config.batch.loss_groups=3"],
        r"got 8 rows a step for config.batch.loss_groups = 3, expected a",
    ),
    "a mesh of other devices": (["--config.compute.fsdp=3"], r"3.* for 8 devices"),
    "no such start": (
        ["--config.model.start=nowhere", "--config.model.how=python launch/convert.py …"],
        r"needs what is not here:.*nowhere  \(config.model.start\)\n    python launch/convert.py …",
    ),
    "no such projector": (
        ["--config.model.projector=runs/none"],
        r"runs/none  \(config.model.projector\)\n    train stage 1 with this --workdir",
    ),
    "no such data": (
        ["--config.data.sources.chats.path=gone.json"],
        r"gone.json  \(source chats\)\n    no command is known for it",
    ),
    "a start that is no model": (
        ["--config.model.start={folder}/images"],
        r"images, which holds no llava.json; expected a model folder",
    ),
    "pixels of another tower": (
        ["--config.data.image_size=42"],
        r"got pictures of 42 pixels in patches of 14 .* reads 28 in patches of 14",
    ),
    "what trains fits nothing": (
        ["--config.optim.trains=('projektor/.*',)"],
        r"got trainable 'projektor/\.\*', which fits no parameter",
    ),
    "no such attention": (["--config.compute.attention=flash"], r"flash"),
    "no such remat": (["--config.compute.remat=some"], r"some"),
    "no rate": (["--config.optim.lr=0", "--config.optim.projector_lr=1e-3"], r"config.optim.lr"),
    "never saved": (["--config.checkpoints.every=0"], r"config.checkpoints.every = 0"),
    "none kept": (["--config.checkpoints.keep=0"], r"config.checkpoints.keep = 0"),
    "no parts": (["--config.compute.parts=0"], r"config.compute.parts = 0"),
    "a warm-up of more": (["--config.optim.warmup_ratio=3"], r"config.optim.warmup_ratio = 3"),
    "pieces that do not divide": (["--config.compute.loss_pieces=7"], r"320.*7|7.*320"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_before_anything_is_done(folder, refused, wrong):
    options, said = WRONG[wrong]
    refused(said, *(option.format(folder=folder) for option in options))
    assert not (folder / "refused").exists()
