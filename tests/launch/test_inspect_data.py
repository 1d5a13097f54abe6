"""launch/inspect_data.py: the page and the terminal show what training would read."""

import functools

import pytest

from launch import inspect_data
from llava_jax.data.dataset import open_dataset
from llava_jax.data.pipeline import read_ahead
from llava_jax.data.schedule import schedule
from tests.data import small


@pytest.fixture
def run(run_verb):
    return functools.partial(run_verb, inspect_data)


def test_the_page(run, config, tmp_path):
    outcome = run("--config", config, "--n", 3, "--html", tmp_path / "rows.html")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"3 rows in {tmp_path / 'rows.html'}\n"
    html = (tmp_path / "rows.html").read_text()
    for shown in ("Row 2", "chats", "captions", "packed, each blind to the others", "▁boat"):
        assert shown in html, shown
    assert "Row 3" not in html


def test_a_row_in_the_terminal(run, config):
    outcome = run("--config", config, "--step", 1)
    assert outcome.code == 0, outcome.err
    assert "⟦" in outcome.out
    assert "⟪</s>⟫" in outcome.out  # the token, not its spelling
    assert "\x1b" not in outcome.out  # no terminal


def test_what_is_shown_is_what_is_learned(tmp_path):
    dataset = open_dataset(small.write(tmp_path))
    steps = schedule(dataset)
    first = next(read_ahead(dataset, steps))
    shown = next(inspect_data.some_rows(dataset, steps, 0, 1))
    learned = [id for id, weight in zip(shown.token_T, shown.weight_T, strict=True) if weight]
    targets = first.batch.target_RT[0][first.batch.loss_weight_RT[0] > 0]
    assert learned == targets.tolist()
    assert [segment.example for segment in shown.segments] == [s.id for s in first.segments[0]]


def test_empty_rows_are_not_shown(tmp_path):
    dataset = open_dataset(small.write(tmp_path))
    steps = schedule(dataset)
    assert len(steps.plans[0]) % steps.rows_per_step, "choose other sizes: no row is empty"
    shown = list(inspect_data.some_rows(dataset, steps, 0, 1000))
    assert [row.number for row in shown] == list(range(len(steps.plans[0])))


def test_a_replaced_picture_is_told(run, config, tmp_path):
    (tmp_path / "images/3.png").unlink()
    options = ["--config.data.max_bad_fraction=1", "--n", 60, "--html", tmp_path / "rows.html"]
    assert run("--config", config, *options).code == 0
    html = (tmp_path / "rows.html").read_text()
    assert "nothing is learned: 3.png" in html


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--n", 0], "got --n 0, expected 1 or more"), (["--step", 99], "got step 99, expected 0 to")],
)
def test_rows_that_do_not_exist(run, config, arguments, says):
    outcome = run("--config", config, *arguments)
    assert outcome.code == 2
    assert says in outcome.err
