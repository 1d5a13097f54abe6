"""The vision tower against transformers' CLIPVisionModel, layer by layer, and at full size."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from llava_jax.models import llava
from llava_jax.models.clip_vit import ClipConfig, ClipVit
from llava_jax.models.stack import Compute
from tests.conftest import import_torch
from tests.models import torch_weights
from tests.models.torch_weights import State

SMALL = ClipConfig(
    hidden_size=32, intermediate_size=72, num_layers=3, num_heads=4, image_size=56, patch_size=14
)
EVERY_STATE = tuple(range(SMALL.num_layers + 1))


def pixels_for(config: ClipConfig, images: int = 2) -> np.ndarray:
    shape = (images, config.image_size, config.image_size, 3)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def reference(config: ClipConfig, images: int = 2) -> tuple[State, list[np.ndarray]]:
    """A random CLIP's weights, and its hidden states (embeddings first) for `pixels_for`."""
    torch, their_config = import_torch(), torch_weights.clip_config(config)
    from transformers import CLIPVisionModel

    with torch.device("meta"):  # spares the full-size one two initialisations of their own
        model: Any = CLIPVisionModel(their_config)
    model.to_empty(device="cpu")
    model.embeddings.position_ids.copy_(torch.arange(config.grid**2 + 1)[None])
    torch_weights.randomise(model)
    pixels = torch_weights.torch_pixels(pixels_for(config, images), config)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    return torch_weights.state_of(model), [state.numpy() for state in states]


def features(config: ClipConfig, state: State, compute: Compute, images: int = 2) -> np.ndarray:
    params = torch_weights.clip_params(state, config)
    apply = jax.jit(ClipVit(config, compute).apply)
    return np.asarray(apply({"params": params}, pixels_for(config, images)))


@pytest.mark.parametrize(
    ("change", "scan"),
    [
        ({}, True),
        ({}, False),
        ({"image_size": 48, "patch_size": 16, "hidden_act": "gelu"}, True),
        ({"image_size": 60, "layer_norm_eps": 1e-3}, True),  # 4 pixels on two sides: in no patch
        ({"image_size": 32, "patch_size": 8, "hidden_act": "gelu", "num_heads": 2}, False),
    ],
    ids=["56/14 scanned", "56/14 unrolled", "48/16 gelu", "60/14", "32/8 gelu"],
)
def test_every_hidden_state(change: dict, scan: bool):
    config = dataclasses.replace(SMALL, select_layers=EVERY_STATE, select="cls_patch", **change)
    state, expected = reference(config)
    joined = features(config, state, Compute(scan=scan))
    ours = np.split(joined, len(EVERY_STATE), axis=-1)
    for number, (our_state, their_state) in enumerate(zip(ours, expected, strict=True)):
        # Measured worst 8.0e-7 (60/14), because f32 sums run in another order.
        assert torch_weights.apart(our_state, their_state) < 5e-6, number


@pytest.fixture(scope="module")
def small_reference() -> tuple[State, list[np.ndarray]]:
    return reference(SMALL)


@pytest.mark.parametrize(
    ("layers", "select", "scan"),
    [
        ((-1,), "patch", True),
        ((-2,), "patch", True),
        ((-2,), "cls_patch", False),
        ((-2, -4), "patch", True),
        ((3, 1, 3), "cls_patch", True),
        ((0,), "patch", False),
    ],
    ids=str,
)
def test_selected_layers(small_reference, layers: tuple[int, ...], select: str, scan: bool):
    config = dataclasses.replace(SMALL, select_layers=layers, select=select)
    state, states = small_reference
    first = 0 if select == "cls_patch" else 1
    expected = np.concatenate([states[i][:, first:] for i in layers], axis=-1)
    ours = features(config, state, Compute(scan=scan))
    assert ours.shape[1:] == (config.num_features, config.feature_size)
    # Measured worst 7.3e-7 (the penultimate), because f32 sums run in another order.
    assert torch_weights.apart(ours, expected) < 5e-6


def test_no_block_above_the_selected_one_is_held():
    config = dataclasses.replace(SMALL, select_layers=(-2, 1))
    params = jax.eval_shape(ClipVit(config).init, jax.random.key(0), pixels_for(config))["params"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["layers"])} == {2}


def test_full_size():
    """ViT-L/14-336 as LLaVA-1.5 reads it, on one image."""
    config = llava.released("v1.5-7b").vision
    state, states = reference(config, images=1)
    ours = features(config, state, Compute(), images=1)
    assert ours.shape == (1, 576, 1024)
    # Measured worst 7.0e-7: f32 sums in another order, and norms keep them from adding up.
    assert torch_weights.apart(ours, states[-2][:, 1:]) < 1e-5


def test_pixels_of_another_size_are_refused():
    with pytest.raises(ValueError, match="48x56 pixels: this vision tower expects 56x56"):
        jax.eval_shape(ClipVit(SMALL).init, jax.random.key(0), np.zeros((1, 48, 56, 3), np.uint8))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "mish"}, "unknown activation 'mish': expected one of .*quick_gelu"),
        ({"select": "cls"}, "got select 'cls': expected 'patch' or 'cls_patch'"),
        ({"num_heads": 5}, "got CLIP width 32 for 5 heads: expected a multiple"),
        ({"image_size": 13}, "got 13-pixel images for 14-pixel patches: expected at least one"),
        ({"select_layers": ()}, r"got select_layers \(\): expected at least one"),
        ({"select_layers": (-2, 4)}, r"got select_layers \(-2, 4\): .* from -4 to 3 for 3 blocks"),
        ({"select_layers": (-5,)}, r"got select_layers \(-5,\): .* from -4 to 3"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(change: dict, says: str):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SMALL, **change)
