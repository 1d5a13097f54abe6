"""Projectors against PyTorch: chains of nn.Linear and GELU, and transformers' Q-Former."""

from typing import Any

import jax
import numpy as np
import pytest

from llava_jax.models.projector import Projector, ProjectorConfig, ResamplerConfig
from llava_jax.models.stack import Compute
from tests.conftest import import_torch
from tests.models import torch_weights

RESAMPLER = ResamplerConfig(
    num_queries=5, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=3
)
FEATURES_IPE = np.random.default_rng(3).standard_normal((2, 9, 32), np.float32)


def project(config: ProjectorConfig, params: dict, compute: Compute = Compute()) -> np.ndarray:
    return np.asarray(jax.jit(Projector(config, compute).apply)({"params": params}, FEATURES_IPE))


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_matrices(kind: str):
    torch = import_torch()
    config = ProjectorConfig(kind, 32, 48)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48))
    for _ in range(config.depth - 1):
        model.extend([torch.nn.GELU(), torch.nn.Linear(48, 48)])
    torch_weights.randomise(model)
    names = [str(2 * i) for i in range(config.depth)]
    ours = project(config, torch_weights.mlp_params(torch_weights.state_of(model), *names))
    with torch.no_grad():
        expected = model(torch.from_numpy(FEATURES_IPE))
    # Measured worst 2.8e-7 (three matrices), because f32 sums run in another order.
    assert torch_weights.apart(ours, expected.numpy()) < 2e-6


def test_identity_has_no_parameters():
    projector = Projector(ProjectorConfig("identity", 32, 32))
    params = projector.init(jax.random.key(0), FEATURES_IPE)
    assert jax.tree.leaves(params) == []
    np.testing.assert_array_equal(projector.apply(params, FEATURES_IPE), FEATURES_IPE)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_resampler(scan: bool):
    torch, c = import_torch(), RESAMPLER
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    their_config = Blip2QFormerConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        encoder_hidden_size=32,
        layer_norm_eps=c.layer_norm_eps,
        hidden_act="gelu",
        cross_attention_frequency=1,
        use_qformer_text_input=False,
        **torch_weights.EAGER,
    )
    model: Any = torch.nn.Module()
    model.query = torch.nn.Parameter(torch.zeros(c.num_queries, c.hidden_size))
    model.qformer = Blip2QFormerModel(their_config)
    model.linear = torch.nn.Linear(c.hidden_size, 48)
    torch_weights.randomise(model)
    with torch.no_grad():
        queries = model.query[None].expand(len(FEATURES_IPE), -1, -1)
        features = torch.from_numpy(FEATURES_IPE)
        states = model.qformer(query_embeds=queries, encoder_hidden_states=features)
        expected = model.linear(states.last_hidden_state).numpy()

    config = ProjectorConfig("resampler", 32, 48, RESAMPLER)
    params = torch_weights.resampler_params(torch_weights.state_of(model), RESAMPLER)
    ours = project(config, params, Compute(scan=scan))
    assert ours.shape[1] == config.num_outputs(9) == 5
    # Measured worst 4.9e-7, because f32 sums run in another order.
    assert torch_weights.apart(ours, expected) < 2e-6


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match="features of width 32: this projector expects 24"):
        jax.eval_shape(
            Projector(ProjectorConfig("linear", 24, 48)).init, jax.random.key(0), FEATURES_IPE
        )


@pytest.mark.parametrize(
    ("kind", "input_size", "resampler", "says"),
    [
        ("mlp2x_relu", 32, None, "unknown projector 'mlp2x_relu': expected .*'mlpNx_gelu'"),
        ("mlp0x_gelu", 32, None, "unknown projector 'mlp0x_gelu': expected .*N from 1 up"),
        ("mlpx_gelu", 32, None, "unknown projector 'mlpx_gelu'"),
        ("identity", 24, None, "got features of width 24 for a language model of width 32"),
        ("resampler", 32, None, "got projector 'resampler' with resampler=None"),
        ("linear", 32, RESAMPLER, "got projector 'linear' with resampler=ResamplerConfig"),
    ],
)
def test_impossible_configs_are_refused(kind: str, input_size: int, resampler, says: str):
    with pytest.raises(ValueError, match=says):
        ProjectorConfig(kind, input_size, 32, resampler)
