"""Models from pieces: LoRA factors, deltas, projectors, a tower and a language model."""

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from llava_jax import api, tokenizer
from llava_jax.weights.assembly import Choices, open_model
from tests.weights import checkpoints
from tests.weights.checkpoints import VOCAB, WIDTH, State, same
from tests.weights.passages import exported, imported, leaves_of


def lora_folder(
    folder: Path, dtype=np.float32, targets=("q_proj", "down_proj"), adapter_name=""
) -> dict:
    """A LoRA as the reference saves one: PEFT's factors, and the projector beside them."""
    rng = np.random.default_rng(3)
    places = {"q_proj": ("self_attn", WIDTH, WIDTH), "down_proj": ("mlp", checkpoints.MLP, WIDTH)}
    factors = {}
    for layer in range(checkpoints.LAYERS):
        for name in targets:
            block, inputs, outputs = places[name]
            key = f"base_model.model.model.layers.{layer}.{block}.{name}"
            factors[f"{key}.lora_A{adapter_name}.weight"] = rng.standard_normal((4, inputs)).astype(
                dtype
            )
            factors[f"{key}.lora_B{adapter_name}.weight"] = rng.standard_normal(
                (outputs, 4)
            ).astype(dtype)
    names = ("base_model.model.model.mm_projector.0", "base_model.model.model.mm_projector.2")
    projector = checkpoints.draw(checkpoints.matrices(*names), seed=4)
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": list(targets)}
    folder.mkdir()
    for file, state in (("adapter_model", factors), ("non_lora_trainables", projector)):
        checkpoints.write_file(folder / f"{file}.safetensors", state)
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, "lora_dropout": 0.05}))
    (folder / "config.json").write_text(json.dumps(checkpoints.original_config(VOCAB)))
    return {**factors, **projector}


def test_a_lora_is_merged_into_its_base(tmp_path):
    llama, base = checkpoints.llama(tmp_path / "llama", "float16")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    state = lora_folder(tmp_path / "lora")
    stored = imported(tmp_path / "ours", tmp_path / "lora", llama, clip)
    back = exported(tmp_path / "back", stored, "original")
    for key, block in (
        ("layers.1.self_attn.q_proj", "q"),
        ("layers.0.mlp.down_proj", "down"),
    ):
        factor = f"base_model.model.model.{key}"
        delta = (
            state[f"{factor}.lora_B.weight"].astype(np.float64) @ state[f"{factor}.lora_A.weight"]
        )
        expected = base[f"model.{key}.weight"].astype(np.float64) + 4.0 * delta
        # One rounding to f16.
        np.testing.assert_allclose(back[f"model.{key}.weight"], expected, rtol=1e-3, atol=1e-3)
        assert back[f"model.{key}.weight"].dtype == np.float16, block
    untouched = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(back[untouched], base[untouched])
    np.testing.assert_array_equal(
        back["model.mm_projector.2.weight"],
        state["base_model.model.model.mm_projector.2.weight"],
    )


def test_a_lora_is_kept_beside_its_base(tmp_path):
    llama, base = checkpoints.llama(tmp_path / "llama")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    state = lora_folder(tmp_path / "lora")
    stored = imported(tmp_path / "ours", tmp_path / "lora", llama, clip, keep_lora=True)
    lora = stored.about.config.language.lora
    assert (lora.rank, lora.alpha, lora.targets) == (4, 16.0, ("q", "down"))
    layer = "language/decoder/layers/1/down"
    factor = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(
        stored.leaves[f"{layer}/lora_a"].read(), state[f"{factor}.lora_A.weight"].T
    )
    np.testing.assert_array_equal(
        stored.leaves[f"{layer}/lora_b"].read(), state[f"{factor}.lora_B.weight"]
    )
    np.testing.assert_array_equal(
        stored.leaves[f"{layer}/kernel"].read(), base["model.layers.1.mlp.down_proj.weight"]
    )


def delta_folder(folder: Path, dtype: str = "float16") -> tuple[Path, State]:
    """What was trained minus its base, so that norms are near 0; LLaVA v0 came like this."""
    added = ("<im_patch>", "<im_start>", "<im_end>")
    shapes = checkpoints.original_shapes(VOCAB + 3, linear=True, with_tower=False)
    rng = np.random.default_rng(8)
    state = {
        name: (0.01 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()
    }
    config = checkpoints.original_config(VOCAB + 3, linear=True)
    return checkpoints.write(folder, state, config, added=added), state


def test_a_delta_is_added_to_its_base(tmp_path):
    llama, base = checkpoints.llama(tmp_path / "llama", "float16")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    src, delta = delta_folder(tmp_path / "delta")
    stored = imported(tmp_path / "ours", src, llama, clip)
    back = exported(tmp_path / "back", stored, "original")
    for key, values in delta.items():
        expected = np.array(values)
        if key in base:
            expected[: len(base[key])] += base[key]
        np.testing.assert_array_equal(back[key], expected, err_msg=key)
    assert stored.about.template == "v0"
    assert stored.about.tokens.image_start == VOCAB + 1


def test_a_whole_model_is_not_taken_for_a_delta(tmp_path):
    llama, _ = checkpoints.llama(tmp_path / "llama")
    src, _ = checkpoints.original(tmp_path / "src")
    with pytest.raises(ValueError, match="it is whole, leave this base out"):
        open_model(epath.Path(src), [epath.Path(llama)])


def test_a_delta_alone_is_noticed(tmp_path):
    clip, _ = checkpoints.clip(tmp_path / "clip")
    src, _ = delta_folder(tmp_path / "delta")
    opened = open_model(epath.Path(src), [epath.Path(clip)])
    assert any("as a delta's is: if it is one, give --base" in note for note in opened.notes)


def test_peft_may_name_the_adapter_in_its_keys(tmp_path):
    llama, _ = checkpoints.llama(tmp_path / "llama")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    lora_folder(tmp_path / "plain")
    lora_folder(tmp_path / "named", adapter_name=".default")
    bases = [epath.Path(llama), epath.Path(clip)]
    one, other = (
        open_model(epath.Path(tmp_path / name), bases, Choices(keep_lora=True))
        for name in ("plain", "named")
    )
    assert same(leaves_of(one), leaves_of(other))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_tower_and_a_language_model_make_a_start(tmp_path, kind):
    llama, base = checkpoints.llama(tmp_path / "llama", "bfloat16")
    clip, _ = checkpoints.clip(tmp_path / "clip", "float16")
    one, same_seed, other = (
        imported(tmp_path / f"ours{i}", llama, clip, projector=kind, seed=seed)
        for i, seed in enumerate((7, 7, 8))
    )
    assert one.about.config.projector.kind == kind
    assert same(leaves_of(one), leaves_of(same_seed))
    drawn = one.leaves["projector/linear_0/kernel"].read()
    assert not np.array_equal(drawn, other.leaves["projector/linear_0/kernel"].read())
    assert 0.9 < np.abs(drawn).max() * checkpoints.TOWER**0.5 <= 1.0
    table = one.leaves["language/embed/table"].read()
    assert table.tobytes() == base["model.embed_tokens.weight"].tobytes()


def test_a_start_of_v1_has_words_for_a_pictures_ends(tmp_path):
    llama, base = checkpoints.llama(tmp_path / "llama")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    stored = imported(tmp_path / "ours", llama, clip, projector="linear", start_end_tokens=True)
    assert stored.about.start_end_tokens
    assert tokenizer.load(tmp_path / "ours").added == {"<im_start>": VOCAB, "<im_end>": VOCAB + 1}
    for name, leaf in (("model.embed_tokens", "embed/added"), ("lm_head", "head/added")):
        mean = base[f"{name}.weight"].mean(0, dtype=np.float64)
        added = stored.leaves[f"language/{leaf}"].read()
        expected = np.stack([mean, mean], 0 if name == "model.embed_tokens" else 1)
        np.testing.assert_allclose(added, expected, atol=1e-7)
    whole, _ = checkpoints.original(tmp_path / "v1", linear=True, added=("<im_start>", "<im_end>"))
    with pytest.raises(ValueError, match="has <im_start> already"):
        imported(tmp_path / "twice", whole, clip, start_end_tokens=True)


def test_a_projector_alone_goes_onto_a_base(tmp_path):
    _, state = checkpoints.original(tmp_path / "whole")
    other, _ = checkpoints.hugging_face(tmp_path / "base")
    projector = {k: x for k, x in state.items() if k.startswith("model.mm_projector.")}
    checkpoints.write_file(tmp_path / "mm_projector.safetensors", projector)
    stored = imported(tmp_path / "ours", tmp_path / "mm_projector.safetensors", other)
    back = exported(tmp_path / "back", stored, "original")
    np.testing.assert_array_equal(
        back["model.mm_projector.0.weight"], projector["model.mm_projector.0.weight"]
    )


@pytest.mark.parametrize("alone", [True, False], ids=["two rows", "the whole embedding"])
def test_rows_for_start_and_end_come_with_their_projector(tmp_path, alone):
    """What stage 1 with <im_start> and <im_end> saves: the projector, and the embedding."""
    llama, base = checkpoints.llama(tmp_path / "llama")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    rows = np.random.default_rng(5).standard_normal((2, WIDTH)).astype(np.float32)
    whole = np.concatenate([base["model.embed_tokens.weight"], rows])
    saved = {
        **checkpoints.draw(checkpoints.matrices("model.mm_projector"), seed=6),
        "model.embed_tokens.weight": rows if alone else whole,
    }
    file = tmp_path / "stage1" / "mm_projector.safetensors"
    file.parent.mkdir()
    checkpoints.write_file(file, saved)
    (file.parent / "config.json").write_text(
        json.dumps(checkpoints.original_config(VOCAB + 2, linear=True))
    )
    stored = imported(tmp_path / "ours", file.parent, llama, clip)
    tokens = stored.about.tokens
    assert (tokens.image_start, tokens.image_end) == (VOCAB, VOCAB + 1)
    assert tokenizer.load(tmp_path / "ours").added == {"<im_start>": VOCAB, "<im_end>": VOCAB + 1}
    np.testing.assert_array_equal(stored.leaves["language/embed/added"].read(), rows)
    mean = base["lm_head.weight"].mean(0, dtype=np.float64)
    # f32 sums of 512 numbers.
    np.testing.assert_allclose(
        stored.leaves["language/head/added"].read(), np.stack([mean, mean], 1), atol=1e-7
    )
    model = api.from_stored(stored)
    ids = model.prompt_ids("Hi", 1)
    at = ids.index(-200)
    assert (ids[at - 1], ids[at + 1]) == (VOCAB, VOCAB + 1)
