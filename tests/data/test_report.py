"""The report's tables: what is counted, and that nothing in the data moves the terminal."""

import numpy as np

from llava_jax.data import report
from llava_jax.data.dataset import open_dataset
from llava_jax.data.schedule import schedule
from tests.data import small


def cells(dataset) -> dict[str, str]:
    return dict(zip(report.COMPOSITION, report.composition(dataset)[0], strict=True))


def test_conversations_without_their_picture_teach_nothing(tmp_path):
    config = small.changed(small.write(tmp_path), data={"max_bad_fraction": 1.0})
    (tmp_path / "images/3.png").unlink()
    dataset = open_dataset(config)
    lengths, (broken) = dataset.lengths["small"], dataset.checked["small"].broken_N
    assert broken.sum() == 7
    share = lengths.learned_N[~broken].sum() / lengths.tokens_N.sum()
    assert cells(dataset)["learned"] == f"{share:.1%}"
    assert cells(dataset)["no picture"] == "7"
    unseen = cells(open_dataset(config, check=None))
    assert unseen["no picture"] == "–"
    assert unseen["learned"] == f"{lengths.learned_N.sum() / lengths.tokens_N.sum():.1%}"


def test_ids_of_other_people_move_no_cursor(tmp_path):
    made = small.entries(5)
    made[4].update(id="a\x1b[2Jb\r\nc", conversations=[])
    config = small.changed(small.write(tmp_path, made), data={"max_bad_fraction": 1.0})
    dataset = open_dataset(config)
    text = report.text(dataset, schedule(dataset))
    assert "(entry 4): got no turns" in text
    assert not {"\x1b", "\r"} & set(text)
    (line,) = (line for line in text.splitlines() if "(entry 4)" in line)
    assert "a" in line.split("(")[0]
    assert "c" in line.split("(")[0]


def test_steps_add_up(tmp_path):
    dataset = open_dataset(small.changed(small.write(tmp_path), epochs=3))
    plan = schedule(dataset)
    said = dict(report.steps(dataset, plan))
    assert said["steps"] == f"{len(plan)} in 3 epochs"
    assert said["a step"].startswith(f"{plan.rows_per_step} rows, ")
    rows = np.ceil(len(plan.plans[0]) / plan.rows_per_step)
    assert f"{60 / rows:.1f} conversations on average" in said["a step"]
    single = open_dataset(small.changed(dataset.config, batch={"conversations": 1}, epochs=1))
    assert dict(report.steps(single, schedule(single)))["a step"].startswith("1 row, ")
