"""What trains, at which rate, and how gradients become steps: by hand and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import optim, step
from llava_jax.config import STAGE_1, STAGE_1_START_END, STAGE_2
from llava_jax.models.llava import Llava, released
from llava_jax.optim import AdamW
from llava_jax.sharding import leaf_paths
from tests import tiny
from tests.conftest import import_torch


def paths_of(tree) -> set[str]:
    return set(jax.tree.leaves(leaf_paths(tree)))


def released_shapes(name: str):
    return jax.eval_shape(Llava(released(name)).init, jax.random.key(0))


def test_stage_1_trains_the_projector_alone():
    trainable, frozen = optim.split(released_shapes("v1.5-13b"), STAGE_1)
    assert paths_of(trainable) == {
        f"projector/linear_{n}/{leaf}" for n in (0, 1) for leaf in ("kernel", "bias")
    }
    assert not any(path.startswith("projector") for path in paths_of(frozen))
    state = jax.eval_shape(lambda tree: step.init(tree, AdamW()), trainable)
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part))
        for name, part in (("weights", state.trainable), ("moments", state.opt))
    }
    assert sizes["weights"] == 31_467_520  # as published
    assert sizes["moments"] == 2 * sizes["weights"] + 1  # and Adam's count


def test_stage_1_with_start_and_end_tokens_trains_their_input_rows_too():
    trainable, _ = optim.split(released_shapes("v1-7b"), STAGE_1_START_END)
    assert paths_of(trainable) == {
        "projector/linear_0/kernel",
        "projector/linear_0/bias",
        "language/embed/added",
    }
    assert trainable["language"]["embed"]["added"].shape == (2, 4096)


def test_stage_2_trains_all_but_the_tower():
    params = released_shapes("v1-7b")
    trainable, frozen = optim.split(params, STAGE_2)
    assert {path.split("/")[0] for path in paths_of(frozen)} == {"vision"}
    assert paths_of(trainable) | paths_of(frozen) == paths_of(params)


def test_what_was_split_is_joined():
    params = tiny.draw_params()
    for patterns in (STAGE_1, STAGE_2, (r".*bias",), (r".*",)):
        joined = optim.join(*optim.split(params, patterns))
        assert jax.tree.structure(joined) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, joined, params)


def test_a_projector_without_leaves_is_not_lost():
    params = {"projector": {}, "language": {"norm": np.ones(2)}}
    assert optim.join(*optim.split(params, (r"language/.*",))) == params


def test_a_pattern_that_fits_nothing():
    with pytest.raises(
        ValueError,
        match=r"got 'projektor/\.\*' of what trains \(config\.optim\.trains\), which fits",
    ):
        optim.split(tiny.draw_params(), (r"projektor/.*",))


@pytest.mark.parametrize(
    ("steps", "ratio"), [(30, 0.1), (100, 0.03), (7, 0.0), (1, 0.03), (5, 1.0)]
)
def test_the_schedule_of_transformers(steps, ratio):
    torch = import_torch()
    import math

    from transformers import get_cosine_schedule_with_warmup

    adam = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    theirs = get_cosine_schedule_with_warmup(adam, math.ceil(steps * ratio), steps)
    ours = optim.schedule(2e-3, steps=steps, warmup_ratio=ratio)
    for number in range(steps):
        np.testing.assert_allclose(
            ours(number), theirs.get_last_lr()[0], rtol=1e-6, atol=1e-12, err_msg=str(number)
        )
        adam.step()
        theirs.step()
    assert ours(steps + 5) == ours(steps) == 0


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_of_pytorch(decay):
    """Ten steps, matrices decayed and biases not, the projector at its own rate."""
    torch, rng = import_torch(), np.random.default_rng(0)
    params = {
        "projector": {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)},
        "language": {"kernel": rng.standard_normal((5, 2))},
    }
    params = jax.tree.map(np.float32, params)
    adamw = AdamW(b1=0.8, b2=0.95, eps=1e-6, weight_decay=decay, lr_of=((r"projector/.*", 0.1),))
    transformation = adamw.transformation(params)
    state, ours = transformation.init(params), params
    flat = {
        path: torch.tensor(leaf)
        for path, leaf in zip(
            jax.tree.leaves(leaf_paths(params)), jax.tree.leaves(params), strict=True
        )
    }
    theirs = torch.optim.AdamW(
        [
            {
                "params": [leaf],
                "lr": 0.01 * (0.1 if "projector" in path else 1.0),
                "weight_decay": 0.0 if "bias" in path else decay,
            }
            for path, leaf in flat.items()
        ],
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for _ in range(10):
        gradients = jax.tree.map(lambda leaf: np.float32(rng.standard_normal(leaf.shape)), params)
        for leaf, gradient in zip(flat.values(), jax.tree.leaves(gradients), strict=True):
            leaf.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = transformation.update(gradients, state, ours)
        ours = jax.tree.map(lambda leaf, update: leaf - 0.01 * update, ours, updates)
    for leaf, expected in zip(jax.tree.leaves(ours), flat.values(), strict=True):
        np.testing.assert_allclose(leaf, expected.numpy(), rtol=2e-5, atol=1e-6)


def test_clipping_of_pytorch():
    torch, rng = import_torch(), np.random.default_rng(1)
    for scale in (0.01, 10.0):
        tree = {"a": np.float32(scale * rng.standard_normal(5))}
        leaf = torch.zeros(5)
        leaf.grad = torch.tensor(tree["a"])
        norm = torch.nn.utils.clip_grad_norm_([leaf], 1.0)
        clipped = AdamW(clip=1.0).clipped(tree, jnp.float32(norm.item()))
        np.testing.assert_allclose(clipped["a"], leaf.grad.numpy(), rtol=1e-6)
        assert AdamW(clip=None).clipped(tree, jnp.float32(norm.item())) is tree
    with pytest.raises(ValueError, match="got clip 0, expected a norm above 0"):
        AdamW(clip=0)
