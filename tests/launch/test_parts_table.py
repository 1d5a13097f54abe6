"""The table of parts, as it is printed: what trains and what it costs."""

import jax
import pytest

from launch import train
from llava_jax import config as configs
from llava_jax import optim
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.weights.memory import params_in_memory
from tests import training

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
