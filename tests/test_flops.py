"""FLOPs are those the compiler counts, whatever trains; chips are known by their names."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llava_jax import flops, optim
from llava_jax.flops import costs, pairs_of, peak
from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import Llava, LlavaConfig, released
from llava_jax.models.lora import LoraConfig
from llava_jax.models.projector import ProjectorConfig, ResamplerConfig
from llava_jax.models.stack import Compute
from tests import tiny

# Small, and wide enough that matrices are nearly all of the work.
CONFIG = LlavaConfig(
    vision=ClipConfig(128, 512, 2, 4, image_size=112, patch_size=14),
    projector=ProjectorConfig("mlp2x_gelu", 128, 256),
    language=LlamaConfig(
        vocab_size=1020,
        hidden_size=256,
        intermediate_size=700,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        added_vocab=2,
    ),
)
LORA = dataclasses.replace(
    CONFIG, language=dataclasses.replace(CONFIG.language, lora=LoraConfig(rank=8))
)
TIED = dataclasses.replace(
    CONFIG, language=dataclasses.replace(CONFIG.language, tie_embeddings=True)
)
RESAMPLER = dataclasses.replace(
    CONFIG,
    projector=ProjectorConfig("resampler", 128, 256, ResamplerConfig(32, 128, 256, 2, 4)),
)
STAGE_1, STAGE_2 = ("projector/.*",), ("projector/.*", "language/.*")
ROWS, TOKENS, IMAGES = 2, 256, 2

TRAININGS = {
    "forward": (CONFIG, ()),
    "stage 1, resampler": (RESAMPLER, STAGE_1),
    "stage 2, tied": (TIED, STAGE_2),
    "LoRA": (LORA, ("projector/.*", "language/.*/lora_[ab]")),
    "everything": (CONFIG, (".*",)),
}


def counted(config: LlavaConfig, trainable: tuple[str, ...]) -> float:
    """By the compiler, of a whole pass and of its gradients, without loops and recomputation."""
    model = Llava(config, Compute(scan=False, remat="none"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = tiny.draw_batch(config, rows=ROWS, tokens=TOKENS, images=IMAGES)
    if not trainable:
        return flops_of(jax.jit(model.logits).lower(params, batch))
    learns, frozen = optim.split(params, trainable)

    def step(learns, frozen, batch):
        def loss(learns):
            return jnp.mean(model.token_losses(optim.join(learns, frozen), batch))

        return jax.grad(loss)(learns)

    return flops_of(jax.jit(step).lower(learns, frozen, batch))


def flops_of(program: Any) -> float:
    return program.cost_analysis()["flops"]


@pytest.mark.parametrize("name", TRAININGS)
def test_flops_are_those_the_compiler_counts(name):
    config, trainable = TRAININGS[name]
    # The backend here takes the whole square of scores, not the half that is seen.
    square = ROWS * TOKENS**2
    mine = costs(config, trainable).step(tokens=ROWS * TOKENS, pairs=square, images=ROWS * IMAGES)
    # Measured 2.0 % to 3.5 % more: softmax, norms and all else that is no matrix.
    assert 1.0 < counted(config, trainable) / mine < 1.05


def test_llama_7b():
    # 32 layers of 4 · 4096² + 3 · 4096 · 11008 and a head of 4096 · 32000, twice.
    forward = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000)
    config = released("v1.5-7b")
    assert forward == 13_214_154_752
    assert costs(config, ()).token == forward
    assert costs(config, STAGE_1).token == 2 * forward
    assert costs(config, STAGE_2).token == 3 * forward
    assert costs(config, ()).pair == 4 * 32 * 4096
    # 23 blocks of the tower, 577 tokens, as the README of CLIP has them, and the projector's 576.
    tower = 23 * (2 * 577 * 12 * 1024**2 + 4 * 577**2 * 1024) + 2 * 576 * 588 * 1024
    assert costs(config, ()).image == tower + 2 * 576 * (1024 * 4096 + 4096**2)


def test_patterns_and_the_paths_themselves_are_the_same():
    paths = jax.tree.leaves(flops.leaf_paths(jax.eval_shape(Llava(LORA).init, jax.random.key(0))))
    factors = [path for path in paths if path.endswith(("lora_a", "lora_b"))]
    assert costs(LORA, factors) == costs(LORA, (".*/lora_[ab]",))


def test_pairs_are_the_tokens_that_are_seen():
    assert pairs_of([]) == 0
    assert pairs_of([1, 2, 4]) == 1 + 3 + 10
    assert pairs_of([2048] * 3) < pairs_of([3 * 2048]) / 2


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v3", 61.5),  # a core
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("TPU v99", None),
        ("cpu", None),
    ],
)
def test_a_chip_is_known_by_its_name(kind, teraflops):
    expected = None if teraflops is None else pytest.approx(teraflops * 1e12)
    assert peak(types.SimpleNamespace(device_kind=kind)) == expected
