"""The whole of LLaVA against transformers' LlavaForConditionalGeneration.

Every configuration reads the same rows: they hold 0, 1 and 3 images, at the very front, at the
very end, side by side, and in the last of them two conversations are packed. The reference reads
each conversation on its own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from llava_jax import batch as batches
from llava_jax.models.clip_vit import ClipConfig
from llava_jax.models.llama import LlamaConfig, RopeConfig
from llava_jax.models.llava import Llava, LlavaConfig, released
from llava_jax.models.projector import ProjectorConfig
from llava_jax.models.stack import Compute, Placement
from tests import tiny
from tests.conftest import import_torch
from tests.models import torch_weights
from tests.models.torch_weights import inside

VISION = ClipConfig(
    hidden_size=32, intermediate_size=72, num_layers=3, num_heads=4, image_size=56, patch_size=14
)
LANGUAGE = LlamaConfig(
    vocab_size=100,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
)
THEIR_IMAGE = 7  # stands at an image's features in the reference's input, and nowhere in our text


def llava_config(kind: str = "mlp2x_gelu", vision: Any = (), **language: Any) -> LlavaConfig:
    clip = dataclasses.replace(VISION, **dict(vision))
    llama = dataclasses.replace(LANGUAGE, **language)
    return LlavaConfig(clip, ProjectorConfig(kind, clip.feature_size, llama.hidden_size), llama)


LLAMA3 = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_position=64)
CONFIGS = {
    "plain": llava_config(),
    "48/16": llava_config(vision={"image_size": 48, "patch_size": 16}),
    "60/14 gelu": llava_config(vision={"image_size": 60, "hidden_act": "gelu"}),
    "32/8": llava_config(vision={"image_size": 32, "patch_size": 8}),
    "class token": llava_config(vision={"select": "cls_patch"}),
    "last layer": llava_config(vision={"select_layers": (-1,)}),
    "two layers": llava_config(vision={"select_layers": (-2, -4)}),
    "linear": llava_config("linear"),
    "mlp3x_gelu": llava_config("mlp3x_gelu"),
    "GQA": llava_config(num_kv_heads=2),
    "wide heads": llava_config(num_kv_heads=2, head_dim=16),
    "linear rope": llava_config(rope=RopeConfig(kind="linear", factor=2.0)),
    "llama3 rope": llava_config(rope=LLAMA3),
    "tied": llava_config(tie_embeddings=True),
    "added ids": llava_config(added_vocab=2),
    "tied, added ids": llava_config(tie_embeddings=True, added_vocab=2),
}


class Conversation(NamedTuple):
    """Pieces in order: ids of text, or the number of an image slot."""

    row: int
    pieces: list[np.ndarray | int]

    def ids(self, features: int, image: int) -> np.ndarray:
        parts = [np.full(features, image) if isinstance(p, int) else p for p in self.pieces]
        return np.concatenate(parts).astype(np.int32)

    def image_index(self, features: int) -> np.ndarray:
        return np.concatenate(
            [
                p * features + np.arange(features)
                if isinstance(p, int)
                else np.full(len(p), batches.TEXT)
                for p in self.pieces
            ]
        )


def draw_conversations(config: LlavaConfig, seed: int = 5) -> list[Conversation]:
    rng, ids = np.random.default_rng(seed), config.language.num_ids

    def text(length: int) -> np.ndarray:
        drawn = rng.integers(0, ids - 1, length)
        drawn[drawn >= THEIR_IMAGE] += 1
        drawn[0] = ids - 1  # the last id, an added one where there are any, is in every text
        return drawn

    return [
        Conversation(0, [text(9)]),
        Conversation(1, [0, text(5)]),
        Conversation(2, [text(9 + 2 * config.tokens_per_image), 0]),  # fills its row to the end
        Conversation(3, [text(2), 0, 1, text(3), 2, text(1)]),
        Conversation(4, [text(3), 0, text(2)]),
        Conversation(4, [1, text(3), 2, text(1)]),
    ]


def pack(config: LlavaConfig, conversations: list[Conversation]) -> batches.Batch:
    rows, tokens = 5, 9 + 3 * config.tokens_per_image
    size = config.vision.image_size
    zeros = batches.shape_batch(rows=rows, tokens=tokens, images=3, image_size=size)
    batch = batches.Batch(*(array.copy() for array in zeros))
    batch.image_index_RT[:] = batches.TEXT
    batch.pixel_RKHW3[:] = np.random.default_rng(6).integers(0, 256, batch.pixel_RKHW3.shape)
    for row, segment, at, conversation in places(config, conversations):
        batch.token_RT[row, at] = conversation.ids(config.tokens_per_image, image=0)
        batch.image_index_RT[row, at] = conversation.image_index(config.tokens_per_image)
        batch.segment_RT[row, at] = segment
        batch.position_RT[row, at] = np.arange(at.stop - at.start)
    batches.validate(
        batch,
        tokens_per_image=config.tokens_per_image,
        image_size=size,
        vocab_size=config.language.num_ids,
    )
    return batch


def places(config: LlavaConfig, conversations: list[Conversation]):
    """(row, segment, where in the row, conversation) of each."""
    filled: dict[int, tuple[int, int]] = {}
    for conversation in conversations:
        start, segment = filled.get(conversation.row, (0, 0))
        stop = start + len(conversation.image_index(config.tokens_per_image))
        filled[conversation.row] = stop, segment + 1
        yield conversation.row, segment + 1, slice(start, stop), conversation


def their_model(config: LlavaConfig) -> Any:
    torch = import_torch()
    from transformers import LlavaConfig as TheirLlavaConfig
    from transformers import LlavaForConditionalGeneration

    v, p = config.vision, config.projector
    layers = list(v.select_layers)
    model: Any = LlavaForConditionalGeneration(
        TheirLlavaConfig(
            vision_config=torch_weights.clip_config(v),
            text_config=torch_weights.llama_config(config.language),
            image_token_index=THEIR_IMAGE,
            image_seq_length=config.tokens_per_image,
            vision_feature_layer=layers if len(layers) > 1 else layers[0],
            vision_feature_select_strategy="default" if v.select == "patch" else "full",
            projector_hidden_act="linear" if p.kind == "linear" else "gelu",
            tie_word_embeddings=config.language.tie_embeddings,
            **torch_weights.EAGER,
        )
    )
    if p.kind == "mlp3x_gelu":
        chain = [torch.nn.Linear(p.input_size, p.output_size)]
        for _ in range(2):
            chain += [torch.nn.GELU(), torch.nn.Linear(p.output_size, p.output_size)]
        model.model.multi_modal_projector = torch.nn.Sequential(*chain)
    torch_weights.randomise(model)
    if p.kind == "linear":
        torch.nn.init.eye_(model.model.multi_modal_projector.linear_2.weight)
        torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.bias)
    return model


def their_logits(model: Any, config: LlavaConfig, batch, row: int, conversation) -> Any:
    """The reference reads one conversation, alone."""
    ids = conversation.ids(config.tokens_per_image, THEIR_IMAGE)
    slots = [piece for piece in conversation.pieces if isinstance(piece, int)]
    pixel_IHW3 = batch.pixel_RKHW3[row, slots]
    pixels = torch_weights.torch_pixels(pixel_IHW3, config.vision) if slots else None
    ids_1T = import_torch().from_numpy(ids[None]).long()
    return model(input_ids=ids_1T, pixel_values=pixels).logits[0]


def our_params(config: LlavaConfig, state: torch_weights.State) -> dict:
    names = {
        "linear": ("linear_1",),
        "mlp2x_gelu": ("linear_1", "linear_2"),
        "mlp3x_gelu": ("0", "2", "4"),
    }[config.projector.kind]
    projector = inside(state, "model.multi_modal_projector.")
    language = inside(state, "model.language_model.")
    return {
        "vision": torch_weights.clip_params(inside(state, "model.vision_tower."), config.vision),
        "projector": torch_weights.mlp_params(projector, *names),
        "language": torch_weights.llama_params(language, config.language, state["lm_head.weight"]),
    }


def our_logits(config: LlavaConfig, compute: Compute, params: Any, batch) -> np.ndarray:
    return np.asarray(jax.jit(Llava(config, compute).logits)(params, batch))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str):
    config, torch = CONFIGS[name], import_torch()
    model = their_model(config)
    params = our_params(config, torch_weights.state_of(model))
    conversations = draw_conversations(config)
    batch = pack(config, conversations)
    logits = our_logits(config, Compute(scan=name != "plain"), params, batch)
    for row, segment, at, conversation in places(config, conversations):
        with torch.no_grad():
            theirs = their_logits(model, config, batch, row, conversation)
        error = torch_weights.apart(logits[row, at], theirs.numpy())
        # Measured worst 1.6e-6 (two layers), because f32 sums run in another order.
        assert error < 1e-5, f"row {row}, conversation {segment}"


@pytest.mark.parametrize("name", ["GQA", "tied, added ids"])
def test_gradients(name: str):
    """Of every parameter: the packed batch against the sum over conversations read alone."""
    config, torch = CONFIGS[name], import_torch()
    model = their_model(config)
    params = our_params(config, torch_weights.state_of(model))
    conversations = draw_conversations(config)
    batch = pack(config, conversations)
    shape_RTV = (*batch.token_RT.shape, config.language.num_ids)
    weight_RTV = np.random.default_rng(8).standard_normal(shape_RTV, np.float32)
    weight_RTV *= (batch.segment_RT > 0)[..., None]

    def loss(params):
        return (Llava(config).logits(params, batch) * weight_RTV).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    for row, _, at, conversation in places(config, conversations):
        logits = their_logits(model, config, batch, row, conversation)
        (logits * torch.from_numpy(weight_RTV[row, at])).sum().backward()
    theirs = our_params(config, torch_weights.gradients_of(model))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for (path, ours), expected in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(theirs), strict=True
    ):
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        scale = max(np.abs(expected).max(), 1e-3 * largest)
        error = np.abs(np.asarray(ours) - expected).max() / scale
        # Measured worst 1.4e-5 for CLIP's key bias, whose gradient is zero but for rounding (a
        # softmax does not see it); 2.9e-6 for all others: f32 sums run in another order.
        assert error < (5e-5 if leaf == "vision/layers/k/bias" else 1e-5), f"{leaf}: {error}"


def test_bfloat16_stays_near():
    batch, params = tiny.draw_batch(rows=2), tiny.draw_params()
    exact, rounded = (
        our_logits(tiny.CONFIG, Compute(dtype=dtype), params, batch)
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == np.float32
    # Measured 1.5e-2: bf16 keeps 8 bits, a step of 4e-3, and rounds after every matmul. Were it
    # near nothing, f32 would have been computed under the other name.
    assert 1e-3 < torch_weights.apart(rounded, exact) < 0.05


@pytest.mark.parametrize(
    ("name", "language", "image_tokens"),
    [
        # Two ids more, input and output, and both tables padded to hold their columns.
        ("v1-7b", 6_738_415_616 + 2 * (2 + 128) * 4096, 256),
        ("v1-13b", 13_015_864_320 + 2 * (2 + 128) * 5120, 256),
        ("v1.5-7b", 6_738_415_616, 576),
        ("v1.5-13b", 13_015_864_320, 576),
    ],
)
def test_released_sizes(name: str, language: int, image_tokens: int):
    """LLaMA's published parameter counts; shapes only, nothing is drawn."""
    config = released(name)
    shapes = jax.eval_shape(Llava(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["language"])) == language
    assert config.tokens_per_image == image_tokens


@pytest.mark.parametrize(
    ("projector", "says"),
    [
        (ProjectorConfig("linear", 64, 48), "features of width 64 and the vision tower gives 32"),
        (ProjectorConfig("linear", 32, 64), "gives width 64 and the language model has 48"),
    ],
)
def test_parts_that_do_not_fit_are_refused(projector: ProjectorConfig, says: str):
    with pytest.raises(ValueError, match=says):
        LlavaConfig(VISION, projector, LANGUAGE)


def test_unknown_release_is_refused():
    with pytest.raises(ValueError, match=r"unknown LLaVA 'v1\.6-7b': expected one of .*v1\.5-13b"):
        released("v1.6-7b")


def test_a_bfloat16_embedding_sums_its_gradient_in_f32():
    """A bf16 sum of ones stops growing at 256; ids occur more often than that."""
    model, params = Llava(tiny.CONFIG, Compute(dtype="bfloat16")), tiny.draw_params()
    token_RT = np.full((1, 4096), 5, np.int32)
    token_RT[0, :600] = 301  # an added id
    text = np.full((1, 4096), -1, np.int32)

    def total(embed):
        changed = {**params, "language": {**params["language"], "embed": embed}}
        x_RTD = model.embed(changed, token_RT, np.zeros((1, 0, 4, 64)), text)
        return x_RTD.astype(np.float32).sum()

    gradient = jax.jit(jax.grad(total))(params["language"]["embed"])
    assert gradient["table"].dtype == np.float32
    np.testing.assert_allclose(gradient["table"][5], 3496, rtol=2**-8)
    np.testing.assert_allclose(gradient["added"][1], 600, rtol=2**-8)
    assert not gradient["table"][6].any()


def test_a_tree_of_another_architecture_is_refused_with_every_difference():
    params = tiny.draw_params()
    Llava(tiny.CONFIG).check(params)
    del params["language"]["head"]["added"]
    params["projector"]["linear_0"]["kernel"] = np.zeros((32, 65))
    params["vision"]["spare"] = np.zeros(3)
    with pytest.raises(ValueError, match="3 leaves differ") as caught:
        Llava(tiny.CONFIG).check(params)
    for line in (
        r"language/head/added: got nothing, expected (64, 2)",
        r"projector/linear_0/kernel: got (32, 65), expected (32, 64)",
        r"vision/spare: got (3,), expected nothing",
    ):
        assert line in str(caught.value)


def test_one_dtype_is_asked_for():
    with pytest.raises(ValueError, match="casts weights to bfloat16 and the model computes in fl"):
        Llava(tiny.CONFIG, placement=Placement(dtype="bfloat16"))
