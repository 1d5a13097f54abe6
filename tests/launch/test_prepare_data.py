"""launch/prepare_data.py as a user meets it: the report, what it keeps, what it refuses."""

import functools
import json

import pytest

from launch import prepare_data
from llava_jax.data.source import open_source
from tests.data import small


@pytest.fixture
def run(run_verb):
    return functools.partial(run_verb, prepare_data)


def test_the_report(run, config, tmp_path):
    made = small.entries()
    made[4]["conversations"] = []  # without an image
    made[8]["conversations"][1]["value"] = "it says </s>"
    (tmp_path / "chat.json").write_text(json.dumps(made))
    (tmp_path / "images/3.png").unlink()
    outcome = run("--config", config, "--config.data.max_bad_fraction=0.5")
    assert outcome.code == 0, outcome.err
    table, *rest = outcome.out.split("\n\n")
    header, captions, chats, everything = table.splitlines()
    assert header.split()[:5] == ["source", "has", "taken", "epochs", "refused"]
    assert chats.split()[:7] == ["chats", "60", "60", "1", "1", "7", "59"]
    assert captions.split()[:3] == ["captions", "60", "random:8"]
    assert everything.split()[0] == "all"
    text = "\n\n".join(rest)
    assert "chats, refused\n  1 × no turns\n      e4 (entry 4): got no turns" in text
    assert "1 × special tokens spelled out, kept as text\n      e8 (entry 8)" in text
    assert "7 × picture missing\n" in text
    assert "(entry 10): 3.png" in text
    for name in ("rows", "filled", "a step", "steps", "fingerprint"):
        assert f"\n{name}" in text


def test_it_is_quick_the_second_time(run, config):
    first, second = run("--config", config), run("--config", config)
    assert second.out == first.out
    assert "preparing chats" in first.err
    assert "preparing" not in second.err


def test_a_build_is_read_instead(run, config, tmp_path):
    outcome = run("--config", config, "--build", tmp_path / "built")
    assert outcome.code == 0, outcome.err
    overrides = [line.split(": ")[1] for line in outcome.out.splitlines() if "to read it" in line]
    assert len(overrides) == 2
    plain = open_source(tmp_path / "chat.json", images=[tmp_path / "images"])
    built = open_source(overrides[0].split("=")[1])
    assert [entry.id for entry in map(built.__getitem__, range(60))] == [
        entry.id for entry in map(plain.__getitem__, range(60))
    ]
    again = run("--config", config, *overrides)
    assert again.out == run("--config", config).out
    assert "kept" in run("--config", config, "--build", tmp_path / "built").out


def test_a_build_says_what_is_not_in_it(run, config, tmp_path):
    (tmp_path / "images/3.png").unlink()
    (tmp_path / "images/4.png").unlink()
    (tmp_path / "images/4.png").mkdir()
    arguments = ("--config", config, "--config.data.max_bad_fraction=1", "--build")
    new = run(*arguments, tmp_path / "built")
    assert new.code == 0, new.err
    chats = new.out.split("built/llava_instruct/chats/1.0.0\n")[1]
    names = [entry.get("image", []) for entry in small.entries()]
    held = sum(len(named) if isinstance(named, list) else 1 for named in names)
    lost = [int(line.split(" × ")[0]) for line in chats.splitlines() if " × picture" in line]
    assert f"{sum(lost)} of its {held} pictures are not in it\n" in chats
    assert f"  {lost[0]} × picture missing\n      no picture 3.png in " in chats
    assert f"  {lost[1]} × picture unreadable\n      got " in chats
    assert "built again" not in new.out

    small.write(tmp_path / "whole")
    (tmp_path / "images/4.png").rmdir()
    for name in ("3.png", "4.png"):
        (tmp_path / "images" / name).write_bytes((tmp_path / "whole/images" / name).read_bytes())
    kept = run(*arguments, tmp_path / "built")
    folder = f"{tmp_path}/built/llava_instruct/chats/1.0.0"
    assert f"kept {folder}, built before of the same text" in kept.out
    assert f"{sum(lost)} of its {held} pictures are not in it\n" in kept.out
    assert f"until {folder} is removed and built again" in kept.out

    whole = run(*arguments, tmp_path / "other")
    assert f"all its {held} pictures are in it\n" in whole.out
    again = run(*arguments, tmp_path / "other")
    assert f"all its {held} pictures are in it\n" in again.out
    assert "pictures are in it as they were then" in again.out
    assert "built again" not in again.out


@pytest.mark.parametrize(
    ("name", "folder", "says"),
    [
        ("my data/x", "built", "got name 'my data/x' for a data set, expected letters"),
        ("chats", "", "got '' to build in, expected a folder"),
        ("chats", "gs://bucket/built", "expected a local folder: build there"),
        ("chats", "chat.json", "a file; expected a folder to build in"),
    ],
)
def test_a_build_that_cannot_be_is_refused_first(run, config, tmp_path, name, folder, says):
    text = (tmp_path / "run.py").read_text()
    text = text.replace(
        "    return config",
        f"    config.data.sources[{name!r}] = config.data.sources.chats\n    return config",
    )
    (tmp_path / "run.py").write_text(text)
    where = folder if ":" in folder or not folder else tmp_path / folder
    outcome = run("--config", config, "--build", where)
    assert outcome.code == 2
    assert says in outcome.err.splitlines()[-1]
    assert "preparing" not in outcome.err
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.data.sorces=x"], "unknown field config.data.sorces; did you mean sources?"),
        (["--config.data.sources.chats.path=gone.json"], "gone.json"),
        (["--chek", "open"], "unknown option --chek; did you mean --check?"),
        (["--config.data.sources.chats.take=first:99"], "expected at most the 60 it has"),
    ],
)
def test_mistakes_are_one_sentence(run, config, arguments, says):
    outcome = run("--config", config, *arguments)
    assert outcome.code == 2
    assert says in outcome.err.splitlines()[-1]


def test_too_many_that_are_bad(run, config, tmp_path):
    (tmp_path / "images/3.png").unlink()
    outcome = run("--config", config)
    assert outcome.code == 2
    assert "conversations refused or without their picture" in outcome.err
    assert "× picture missing, as e" in outcome.err
