"""What a benchmark changes in a config is still there to be changed."""

import pytest

from benchmarks import learning
from llava_jax import config


@pytest.mark.parametrize("row", learning.ROWS)
def test_each_row_of_learning_is_two_runs(row, tmp_path):
    changes = learning._changes(learning.Run(row, 1, tmp_path, ()))
    loaded = {
        stage: config.load(learning._config(stage), config.parse_overrides(words))
        for stage, words in changes.items()
    }
    assert {told.seed for told in loaded.values()} == {1}
    assert bool(loaded["stage2"].model.projector) == (row != "no stage 1")
