"""The demonstration as a user meets it, at toy size: all is random, and little is learned."""

import json
import signal
import sys

import jax
import pytest

from launch import demo
from llava_jax import metrics, telling
from llava_jax.evals import picture_world as exam
from tests.pages.reading import Reading
from tests.weights import checkpoints

CHANGES = (
    "--config.data.image_size=56",
    "--config.data.patch_size=14",
    "--config.data.sources.picture_world.take=first:16",
    "--config.data.threads=1",
    "--config.data.conversation_tokens=640",
    "--config.batch.tokens=640",
    "--config.batch.images=2",
    "--config.batch.conversations=4",
    "--config.compute.cache=",
    "--config.held_out.every=0",
)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    checkpoints.clip(folder / "clip")
    checkpoints.llama(folder / "llama")
    return folder


@pytest.fixture
def plan(towers, monkeypatch):
    # Eight would take turns on the cores, for nothing.
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    return demo.Plan(
        scenes=20, examined=2, clip=towers / "clip", llama=towers / "llama", changes=CHANGES
    )


def test_interrupted_in_the_middle_it_goes_on(tmp_path, plan, monkeypatch, capsys):
    folder = str(tmp_path / "demo")
    step = telling.Telling.step

    def interrupted(self, number, result, read):
        if number == 1 and "stage2" in str(self._workdir):
            monkeypatch.setattr(telling.Telling, "step", step)
            signal.raise_signal(signal.SIGINT)
        step(self, number, result, read)

    monkeypatch.setattr(telling.Telling, "step", interrupted)
    assert demo.demonstrate(folder, plan) == 130
    told = capsys.readouterr().out
    assert f"to go on: python launch/demo.py --workdir {folder}\n" in told
    assert not (tmp_path / "demo" / "demo.html").exists()
    seconds = json.loads((tmp_path / "demo" / "demo.json").read_text())["seconds"]
    assert list(seconds) == ["picture world", "start", "stage 1", "stage 2"]
    made = {name: (tmp_path / "demo" / name).stat().st_mtime_ns for name in ("world", "start")}

    arguments = list(sys.argv)
    assert demo.demonstrate(folder, plan) == 0
    assert sys.argv == arguments
    told = capsys.readouterr().out
    assert [line.split(":")[0] for line in told.splitlines() if "done before" in line] == [
        "picture world",
        "start",
        "stage 1",
    ]
    assert f"to look at: {folder}/demo.html" in told
    for name, before in made.items():
        assert (tmp_path / "demo" / name).stat().st_mtime_ns == before
    events = metrics.read(tmp_path / "demo" / "stage2").events
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [2]
    again = json.loads((tmp_path / "demo" / "demo.json").read_text())["seconds"]
    assert again["stage 1"] == seconds["stage 1"]
    assert again["stage 2"] > seconds["stage 2"]

    check_answers(tmp_path / "demo", told)
    check_page(tmp_path / "demo")

    # Once more: nothing is left to do but the page.
    before = (tmp_path / "demo" / "answers.json").stat().st_mtime_ns
    assert demo.demonstrate(folder, plan) == 0
    assert (tmp_path / "demo" / "answers.json").stat().st_mtime_ns == before


def check_answers(folder, told):
    """Every row answered every question, and the table says how often rightly."""
    said = json.loads((folder / "answers.json").read_text())
    assert list(said) == ["test", "unseen_pairs"]
    for split, rows in said.items():
        questions = exam.read(folder / "world", split, 2)
        assert {row: len(answers) for row, answers in rows.items()} == dict.fromkeys(
            exam.ROWS, len(questions)
        )
    questions = exam.read(folder / "world", "test", 2)
    share = exam.score(questions, said["test"][exam.USUAL])[exam.MANY].share
    (line,) = [line for line in told.splitlines() if line.startswith(exam.USUAL)]
    assert line.split()[2] == f"{share:.1%}"


def check_page(folder):
    page = (folder / "demo.html").read_text()
    reading = Reading(page)
    cells = [e.text for e in reading.elements if e.tag == "td"]
    at = cells.index("language/decoder")
    assert cells[at + 2 : at + 4] == ["frozen", "trains"]
    commands = "\n".join(e.text for e in reading.elements if e.tag == "pre")
    for word in ("llava_jax.picture_world --out", "convert.py import", "stage1.py:tiny"):
        assert word in commands
    assert len(reading.of("article", "sample")) == len(
        {q.category for q in exam.read(folder / "world", "test", 2)}
    )  # a random model is wrong everywhere


def test_a_folder_of_other_settings_is_refused(tmp_path, plan, towers):
    folder = str(tmp_path / "demo")
    demo.Demo(folder, plan).claim()
    demo.Demo(folder, plan).claim()
    changes = (*CHANGES, "--config.optim.lr=0.5")
    changed = demo.Plan(20, 2, towers / "clip", towers / "llama", changes)
    with pytest.raises(ValueError, match=r"other settings; remove it.*\n.*stage1: optim.lr: 0.5 "):
        demo.Demo(folder, changed).claim()
    elsewhere = (*CHANGES, "--config.data.threads=7", "--config.log.tensorboard=true")
    demo.Demo(folder, demo.Plan(20, 2, towers / "clip", towers / "llama", elsewhere)).claim()


def test_a_folder_of_something_else_is_refused(tmp_path, plan):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="photos, which holds other files; expected a new folder"):
        demo.Demo(str(tmp_path / "photos"), plan).claim()
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_no_towers(tmp_path):
    with pytest.raises(ValueError, match=r"got no tower in .*clip, expected one that comes with"):
        demo.Demo(str(tmp_path / "demo"), demo.Plan(clip=tmp_path / "clip"))


def test_help(run_verb):
    outcome = run_verb(demo, "--help")
    assert outcome.code == 0
    assert "python launch/demo.py --workdir demo" in outcome.out
