"""launch/train.py from a config to a model folder, in this process on eight devices."""

import dataclasses
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

import llava_jax
from launch import train
from llava_jax import checkpoint, metrics, model_folder
from llava_jax.data import pipeline
from llava_jax.weights.memory import stored_shapes
from llava_jax.weights.tensor import in_memory
from tests import tiny_tokenizer, training

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
    compilation_cache.reset_cache()


@pytest.fixture
def trained(folder, run_verb):
    """trained(name, options…): a run in the workdir of that name."""

    def run(name: str, *options: str):
        config = ("--config", folder / "small.py", "--config.checkpoints.every=4")
        return run_verb(train, *config, "--workdir", folder / name, *options)

    return run


def test_a_run_from_config_to_model(folder, trained):
    with training.compilations() as compiled:
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
        r"got config.batch.conversations = 6, one a row, for 8 parts that rows",
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
        r"runs/none  \(config.model.projector\)\n    or start without one: --config.model",
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
        r"got 'projektor/\.\*' of what trains \(config\.optim\.trains\), which fits",
    ),
    "no such attention": (
        ["--config.compute.attention=flash"],
        r"config.compute.attention = 'flash', expected one of auto, xla",
    ),
    "no such remat": (
        ["--config.compute.remat=some"],
        r"config.compute.remat = 'some', expected one of full",
    ),
    "no such layer": (
        ["--config.model.select_layer=-9"],
        r"got config.model.select_layer = -9, expected -4 to 3: the tower has 3 blocks",
    ),
    "factors of nothing": (
        ["--config.model.lora.rank=4", "--config.model.lora.targets=q,w"],
        r"config.model.lora.targets = 'w', expected one of q, k",
    ),
    "a rate that is no number": (["--config.optim.lr=1e999"], r"config.optim.lr = inf"),
    "no rate": (["--config.optim.lr=0", "--config.optim.projector_lr=1e-3"], r"config.optim.lr"),
    "never saved": (["--config.checkpoints.every=0"], r"config.checkpoints.every = 0"),
    "none kept": (["--config.checkpoints.keep=0"], r"config.checkpoints.keep = 0"),
    "no parts": (["--config.compute.parts=0"], r"config.compute.parts = 0"),
    "a warm-up of more": (["--config.optim.warmup_ratio=3"], r"config.optim.warmup_ratio = 3"),
    "an adapter of nothing": (["--config.export=peft"], r"config.export = 'peft'.*lora.rank"),
    "pieces that do not divide": (["--config.compute.loss_pieces=7"], r"320.*7|7.*320"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_before_anything_is_done(folder, refused, wrong):
    options, said = WRONG[wrong]
    refused(said, *(option.format(folder=folder) for option in options))
    assert not (folder / "refused").exists()


def test_a_tokenizer_of_more_ids_than_the_model(folder, refused):
    tiny_tokenizer.write_tokenizer(folder / "more", [f"<{n}>" for n in range(300)])
    refused(
        r"ids of the tokenizer .*more for a language model of 514",
        f"--config.data.tokenizer={folder}/more",
    )


def test_a_folder_that_holds_something_else(folder, refused):
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("\\section")
    refused("thesis, which holds other files; expected a new folder, or a run's", name="thesis")


def test_a_workdir_that_is_a_file(folder, refused):
    (folder / "file").write_text("")
    refused("not a directory: .*file", name="file")
    refused("not a directory: .*file", name="file/run")


def test_a_disk_that_is_full(folder, refused, monkeypatch):
    usage = shutil.disk_usage(folder)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    refused(r"got 5.0 MB of free disk, expected 5.\d for this run's checkpoints", name="full")


def test_a_disk_that_takes_nothing(folder, refused, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        refused(r"cannot write .*\.probe: file too large", name="limited")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- an old workdir ---


@pytest.fixture
def finished(folder, trained) -> str:
    """The name of a workdir whose run is done: a copy, for each test."""
    if not (folder / "whole" / "model").exists():
        assert trained("whole").code == 0
    shutil.rmtree(folder / "copy", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "copy")
    return "copy"


def test_changed_settings_are_refused_unless_told(folder, finished, refused, trained):
    changes = ["--config.optim.lr=5e-4", "--config.epochs=3"]
    refused(
        r"holds a run with other settings.*--allow_changes:\n"
        r"  epochs: 3 here, 2 there\n  optim.lr: 0.0005 here, 0.001 there",
        *changes,
        name=finished,
    )
    ended = trained(finished, *changes, "--allow_changes", "--config.log.profile_at=4")
    assert ended.code == 0, ended.err
    assert "no profile: config.log.profile_at = 4, steps 6 to 8" in ended.out
    assert "goes on from step 6 of 9" in ended.out
    assert len(training.told(folder / finished)) == 9
    # The model that it had made is kept, under another name; the new one is of the last step.
    assert (folder / finished / "model-before-step-6" / "llava.json").exists()
    stored = model_folder.read(epath.Path(folder / finished / "model"))
    norm = stored.leaves["language/decoder/norm/scale"].read()
    last = training.learned(folder / finished)["trainable/language/decoder/norm/scale"]
    np.testing.assert_array_equal(norm, last)
    assert trained(finished, *changes).code == 0  # now these are its settings


def test_other_data_is_refused(folder, finished, refused):
    for told in ([], ["--allow_changes"]):
        refused(
            r'was trained on other data; .*source chats: "first:50" here, "all" there',
            "--config.data.sources.chats.take=first:50",
            *told,
            name=finished,
        )


def test_another_start_is_refused(folder, finished, refused):
    other = dataclasses.replace(training.start_model(1), tokenizer=epath.Path(folder / "words"))
    model_folder.save(other, epath.Path(folder / "other"))
    refused(
        r"was trained over weights of fingerprint \w{12}….*/start\); got \w{12}….*/other\)",
        f"--config.model.start={folder}/other",
        f"--config.data.tokenizer={folder}/start",
        name=finished,
    )


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on an-host,", end="", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_at_once_in_a_workdir(folder, finished, refused, trained):
    place = folder / finished / ".running"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        refused("process 7 on an-host, trains in it; expected one run at a time", name=finished)
        holder.kill()
    # Nobody holds what a killed one left.
    assert trained(finished).code == 0
    assert not place.exists()


def test_a_damaged_checkpoint_is_passed_over(folder, finished, trained):
    (biggest, *_) = sorted(
        (folder / finished / "checkpoints" / "6").rglob("d/*"), key=lambda f: -f.stat().st_size
    )
    os.truncate(biggest, biggest.stat().st_size // 2)
    ended = trained(finished)
    assert ended.code == 0, ended.err
    assert "step 6 is damaged (" in ended.out
    assert "goes on from step 4 of 6" in ended.out
    assert training.told(folder / finished) == training.told(folder / "whole")
    whole = training.learned(folder / "whole")
    for name, leaf in training.learned(folder / finished).items():
        assert leaf.tobytes() == whole[name].tobytes()


def test_a_default_workdir_is_made_and_told(folder, run_verb, monkeypatch):
    monkeypatch.chdir(folder)
    config = ("--config", folder / "small.py", "--config.epochs=1", "--config.held_out.every=0")
    ended = run_verb(train, *config, "--config.log.profile_at=1", "--config.log.profile_steps=1")
    assert ended.code == 0, ended.err
    (workdir,) = (folder / "runs").iterdir()
    assert re.fullmatch(r"small-\d{4}-\d\d-\d\d-\d{6}", workdir.name)
    (trace,) = (workdir / "profile").rglob("*.xplane.pb")
    assert b"jit_step" in trace.read_bytes()
    assert f"--workdir {workdir}\n" in ended.out
    assert (workdir / "model" / "llava.json").exists()


# --- while it trains ---


def test_the_first_batch_must_keep_the_contract(folder, trained, monkeypatch):
    def broken(*arguments, **named):
        for read in pipeline.read_ahead(*arguments, **named):
            read.batch.token_RT[:, 3] = 10**6
            yield read

    monkeypatch.setattr(train, "read_ahead", broken)
    ended = trained("broken", "--config.held_out.every=0")
    assert ended.code == 2, ended.err
    assert "compiling" not in ended.out
    assert metrics.read(folder / "broken").steps == []


def test_steps_that_are_not_finite(folder, trained):
    """A weight is NaN: five steps learn nothing, then the run stops; the ids of each are told."""
    model = dataclasses.replace(training.start_model(), tokenizer=epath.Path(folder / "words"))
    path = "projector/linear_0/bias"
    bias = model.leaves[path].read().copy()
    bias[0] = np.nan
    leaves = {**model.leaves, path: in_memory(bias, path)}
    model_folder.save(dataclasses.replace(model, leaves=leaves), epath.Path(folder / "nan"))
    ended = trained("not-finite", f"--config.model.start={folder}/nan", "--config.held_out.every=0")
    assert ended.code == 2
    (error,) = ended.errors
    assert "got 5 steps in a row whose loss or gradient is not finite, up to step 4" in error
    history = metrics.read(folder / "not-finite")
    told = [event for event in history.events if event["kind"] == "not_finite"]
    assert [event["step"] for event in told] == [0, 1, 2, 3, 4]
    assert all(re.fullmatch(r"(chats|captions) e\d+", id) for id in told[0]["examples"])
    assert len(told[0]["examples"]) == history.steps[0]["conversations"]
    stored = checkpoint.read_model(epath.Path(folder / "not-finite"), step=4)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(stored.leaves[path].read(), leaf.read())


def test_too_many_broken_pictures(folder, trained):
    shutil.copytree(folder / "images", folder / "broken-images")
    (folder / "broken-images" / "3.png").write_bytes(b"no picture")
    options = [f"--config.data.sources.{n}.images={folder}/broken-images" for n in ("chats",)]
    ended = trained("pictures", *options, "--config.held_out.every=0")
    assert ended.code == 2, ended.err
    assert re.search(r"got \d+ of 68 conversations without their picture", ended.errors[0])
    assert "3.png" in (folder / "pictures" / "skipped.jsonl").read_text()
    patient = trained(
        "pictures", *options, "--config.held_out.every=0", "--config.data.max_bad_fraction=0.5"
    )
    assert patient.code == 0, patient.err
    dropped = metrics.read(folder / "pictures").steps[-1]["dropped"]
    assert dropped == len((folder / "pictures" / "skipped.jsonl").read_text().splitlines()) > 0
