"""The training step: the same training as PyTorch's, whatever it is cut into, and what it skips."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import optim, step
from llava_jax.batch import Batch
from llava_jax.config import STAGE_1, STAGE_2
from llava_jax.models.llava import Llava, LlavaConfig
from llava_jax.models.stack import Compute
from llava_jax.optim import AdamW
from llava_jax.sharding import Layout, MeshShape, make_mesh
from tests import tiny
from tests.conftest import import_torch
from tests.models import test_llava, torch_weights

STEPS, LR, WARMUP = 30, 2e-3, 0.1


def one_device() -> Layout:
    return Layout(make_mesh(MeshShape(), jax.devices()[:1]))


class Run:
    """A training run in small: its state, and the step that changes it."""

    def __init__(
        self,
        config: LlavaConfig,
        params: Any,
        stage: tuple[str, ...],
        layout: Layout,
        *,
        clip: float | None = 1.0,
        lr_of: tuple[tuple[str, float], ...] = (),
        parts: int = 1,
        chunks: int = 1,
        **compute: Any,
    ):
        model = Llava(config, Compute(**compute), layout.placement("float32"))
        adamw = AdamW(clip=clip, lr_of=lr_of)
        trainable, frozen = optim.split(params, stage)
        self.layout = layout
        self.frozen = jax.device_put(frozen, layout.param_shardings(frozen))
        lies = step.shardings(trainable, adamw, layout)
        placed = jax.device_put(trainable, lies.trainable)
        self.state = jax.jit(functools.partial(step.init, adamw=adamw), out_shardings=lies)(placed)
        lr = optim.schedule(LR, steps=STEPS, warmup_ratio=WARMUP)
        self._step = jax.jit(
            step.make_step(step.token_sums(model, 2, chunks), adamw, lr, layout, parts=parts),
            out_shardings=(lies, layout.replicated),
        )

    def __call__(self, batch: Batch) -> step.Metrics:
        placed = jax.device_put(batch, self.layout.batch_shardings(batch))
        self.state, metrics = self._step(self.state, self.frozen, placed, jax.random.key(1))
        return metrics

    @property
    def params(self) -> Any:
        return jax.device_get(optim.join(self.state.trainable, self.frozen))


# --- against PyTorch ---


def lesson(config: LlavaConfig, number: int) -> tuple[list, Batch]:
    """Conversations, and the batch they make: some text is learned, pictures and ends are not."""
    conversations = test_llava.draw_conversations(config, seed=number)
    batch = test_llava.pack(config, conversations)
    rng = np.random.default_rng(number)
    for row, _, at, _ in test_llava.places(config, conversations):
        following = batch.token_RT[row, at][1:]
        text = batch.image_index_RT[row, at][1:] == -1
        batch.target_RT[row, at.start : at.stop - 1] = following
        batch.loss_weight_RT[row, at.start : at.stop - 1] = text & (rng.random(len(text)) < 0.7)
    return conversations, batch


def their_loss(model: Any, config: LlavaConfig, conversations: list, batch: Batch) -> Any:
    """The mean over all that is learned, each conversation read alone."""
    torch = import_torch()
    total = 0.0
    for row, _, at, conversation in test_llava.places(config, conversations):
        logits = test_llava.their_logits(model, config, batch, row, conversation)
        target = torch.from_numpy(batch.target_RT[row, at]).long()
        ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        total = total + (ce * torch.from_numpy(batch.loss_weight_RT[row, at])).sum()
    return total / float(batch.loss_weight_RT.sum())


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_the_same_training_as_pytorch(stage):
    config = test_llava.CONFIGS["GQA"]
    model = test_llava.their_model(config)
    before = test_llava.our_params(config, torch_weights.state_of(model))
    before = jax.tree.map(np.array, before)  # not PyTorch's own memory, which it trains in
    run = Run(config, before, stage, one_device())
    trains = "multi_modal_projector" if stage is STAGE_1 else ""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains in name and "vision_tower" not in name)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    largest_gradient = train_both(run, model, config, [{"params": learning}])
    after = test_llava.our_params(config, torch_weights.state_of(model))
    overwrite(model, largest_gradient)
    steep = test_llava.our_params(config, torch_weights.state_of(model))
    check_frozen(run.params, before, stage)
    flat, total = compare([optim.split(x, stage)[0] for x in (run.params, after, before, steep)])
    assert flat < 0.06 * total, f"{flat} of {total}"  # ids that no text has


def train_both(run: Run, model: Any, config: LlavaConfig, groups: list[dict]) -> dict[str, Any]:
    """All steps of ours and of PyTorch's, compared one by one. groups: of its optimizer, the first
    at the run's own rate. Gives the largest gradient that each entry of its parameters had."""
    torch = import_torch()
    from transformers import get_cosine_schedule_with_warmup

    adam = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0)
    lr = get_cosine_schedule_with_warmup(adam, round(STEPS * WARMUP), STEPS)
    learning = [parameter for group in groups for parameter in group["params"]]
    largest: dict[str, Any] = {}
    for number in range(STEPS):
        conversations, batch = lesson(config, number)
        loss = their_loss(model, config, conversations, batch)
        adam.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen = largest.get(name, torch.zeros(()))
                largest[name] = torch.maximum(seen, parameter.grad.abs())
        norm = torch.nn.utils.clip_grad_norm_(learning, 1.0)
        metrics = run(batch)
        # Measured worst 6.1e-7 and 7.4e-6: f32 sums run in another order.
        np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-5, err_msg=f"step {number}")
        np.testing.assert_allclose(metrics.norm, norm.item(), rtol=1e-4, err_msg=f"step {number}")
        np.testing.assert_allclose(metrics.lr, lr.get_last_lr()[0], rtol=1e-6, atol=1e-12)
        adam.step()
        lr.step()
    return largest


def overwrite(model: Any, largest: dict[str, Any]) -> None:
    """Puts gradients where the weights were, so that they map onto our tree as those do."""
    torch = import_torch()
    for name, parameter in model.named_parameters():
        seen = largest.get(name, torch.zeros(()))
        parameter.data = torch.broadcast_to(seen, parameter.shape).clone()


def check_frozen(ours: Any, before: Any, stage: tuple[str, ...]) -> None:
    frozen, untouched = (optim.split(tree, stage)[1] for tree in (ours, before))
    for leaf, old in _pairs(frozen, untouched):
        np.testing.assert_array_equal(leaf, old)


def compare(trained: list[Any]) -> tuple[int, int]:
    """[ours, theirs, before, largest gradients] of what trains: equal, but for entries without a
    gradient. How many those are, of how many."""
    ours, after, before, steep = trained
    update = max(np.abs(b - a).max() for a, b in _pairs(after, before))
    flat = 0
    for path, mine in jax.tree.leaves_with_path(ours):
        theirs, gradient = (_at(tree, path) for tree in (after, steep))
        # Adam divides by the gradient's size: of next to none, rounding decides.
        counts = gradient >= 1e-7
        flat += int((~counts).sum())
        apart = np.abs(mine - theirs)[counts].max(initial=0.0) / update
        # Measured worst 2.2e-5, and of LoRA 1.4e-5.
        assert apart < 1e-4, (path, apart)
    return flat, sum(leaf.size for leaf in jax.tree.leaves(ours))


def _pairs(tree: Any, other: Any):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)


def _at(tree: Any, path: Any) -> Any:
    return functools.reduce(lambda node, key: node[key.key], path, tree)


# --- whatever it is cut into ---

ONE = MeshShape()
CUTS: dict[str, dict[str, Any]] = {
    "8 devices": {"mesh": MeshShape(fsdp=(8,))},
    "data 4, fsdp 2": {"mesh": MeshShape(data=4, fsdp=(2,))},
    "2 of each": {"mesh": MeshShape(data=2, fsdp=(2,), tensor=2)},
    "two fsdp axes, explicit": {"mesh": MeshShape(fsdp=(4, 2)), "explicit": True},
    "2 parts": {"parts": 2},
    "4 parts, 2 devices": {"mesh": MeshShape(fsdp=(2,)), "parts": 4},
    "pieces of rows": {"chunks": 4},
    "not scanned": {"scan": False},
}


@pytest.fixture(scope="module")
def whole():
    return trained()


def trained(
    mesh: MeshShape = ONE, explicit: bool = False, **options: Any
) -> list[tuple[float, ...]]:
    devices = jax.devices()[: int(np.prod(mesh.sizes))]
    layout = Layout(make_mesh(mesh, devices), explicit=explicit)
    run = Run(tiny.CONFIG, tiny.draw_params(), STAGE_2, layout, **options)
    told = []
    for number in range(10):
        metrics = run(tiny.draw_batch(seed=number))
        told.append((float(metrics.loss), float(metrics.norm), *metrics.loss_S.tolist()))
    return told


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_changes_no_loss(cut, whole):
    # Measured worst: see the figures of the suite; f32 sums run in another order.
    np.testing.assert_allclose(trained(**CUTS[cut]), whole, rtol=1e-5)


# --- one compilation, nothing of what is frozen, and steps that are skipped ---


def test_one_compilation_whatever_comes():
    run = Run(tiny.CONFIG, tiny.draw_params(), STAGE_2, Layout(make_mesh(MeshShape(fsdp=(8,)))))
    for number in range(3):
        run(tiny.draw_batch(seed=number))
    assert run._step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_loss_that_is_not_finite_changes_nothing():
    run = Run(tiny.CONFIG, tiny.draw_params(), STAGE_1, one_device())
    for number in range(2):
        run(tiny.draw_batch(seed=number))
    before = jax.device_get(run.state)
    batch = tiny.draw_batch(seed=2)
    batch.loss_weight_RT[np.nonzero(batch.loss_weight_RT)] = np.inf
    metrics = run(batch)
    assert not np.isfinite(metrics.loss)
    assert metrics.skipped == 1
    assert run.state.step == before.step + 1
    for leaf, old in _pairs((run.state.trainable, run.state.opt), (before.trainable, before.opt)):
        np.testing.assert_array_equal(leaf, old)
    assert run(tiny.draw_batch(seed=3)).skipped == 0


def test_a_gradient_that_is_not_finite_changes_nothing():
    def loss(trainable, frozen, batch, key_R):
        nothing = jnp.sum(jnp.sqrt(0.0 * trainable["row_end"]))  # 0, and its gradient is no number
        return step.Sums(nothing, jnp.ones(()), jnp.zeros(2), jnp.zeros(2))

    adamw, trainable = AdamW(), {"row_end": jnp.ones(8)}
    state = step.init(trainable, adamw)
    do = jax.jit(step.make_step(loss, adamw, lambda number: jnp.ones(()), one_device()))
    after, metrics = do(state, {}, tiny.draw_batch(), jax.random.key(0))
    assert np.isfinite(metrics.loss)
    assert not np.isfinite(metrics.norm)
    assert metrics.skipped == 1
    for leaf, old in _pairs((after.trainable, after.opt), (state.trainable, state.opt)):
        np.testing.assert_array_equal(leaf, old)


def test_a_batch_with_nothing_to_learn_is_no_failure():
    run = Run(tiny.CONFIG, tiny.draw_params(), STAGE_2, one_device())
    batch = tiny.draw_batch()
    batch.loss_weight_RT[:] = 0
    metrics = run(batch)
    assert (metrics.loss, metrics.norm, metrics.skipped) == (0, 0, 0)
