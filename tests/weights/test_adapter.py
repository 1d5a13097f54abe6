"""LoRA factors: drawn as PEFT draws them, merged, and handed to PEFT and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from llava_jax import api, checkpoint, model_folder, optim, step
from llava_jax.config import LORA
from llava_jax.model_folder import StoredModel
from llava_jax.models.lora import OUTPUT_FIRST, LoraConfig
from llava_jax.weights import exporting
from llava_jax.weights.adapter import with_lora, without_lora
from llava_jax.weights.assembly import Choices, open_model
from llava_jax.weights.memory import params_in_memory, stored_shapes
from llava_jax.weights.tensor import in_memory
from tests.conftest import import_peft, import_torch
from tests.models.torch_weights import apart
from tests.weights import checkpoints
from tests.weights.checkpoints import same
from tests.weights.passages import leaves_of
from tests.weights.test_in_transformers import picture

LORAS = {
    "all": LoraConfig(rank=4, alpha=8.0, dropout=0.05),
    "q, v": LoraConfig(rank=4, alpha=8.0, targets=("q", "v")),
}


def model(tmp_path: Path, linear: bool = False) -> StoredModel:
    """A base of ours, in tmp_path/base."""
    src, _ = (
        checkpoints.original(tmp_path / "src", linear=True)
        if linear
        else checkpoints.hugging_face(tmp_path / "src")
    )
    opened = open_model(epath.Path(src))
    about = dataclasses.replace(opened.about, tower="somebody/clip")
    opened = dataclasses.replace(opened, about=about)
    model_folder.save(opened, epath.Path(tmp_path / "base"))
    return model_folder.read(epath.Path(tmp_path / "base"))


def trained(base: StoredModel, lora: LoraConfig) -> StoredModel:
    """As after a run: the factors and the projector are what they were not."""
    fresh = with_lora(base, lora, seed=1)
    rng = np.random.default_rng(2)
    changed = {
        path: in_memory(rng.normal(0.0, 0.1, tensor.shape).astype(np.float32), path)
        for path, tensor in fresh.leaves.items()
        if path.startswith("projector/") or path.endswith(("lora_a", "lora_b"))
    }
    return dataclasses.replace(fresh, leaves={**fresh.leaves, **changed}, own=frozenset(changed))


def thin(stored: StoredModel, tmp_path: Path) -> StoredModel:
    """The same through a thin folder."""
    place, base = epath.Path(tmp_path / "thin"), epath.Path(tmp_path / "base")
    own, named = model_folder.thin(stored, base, place)
    model_folder.save(own, place, base=named)
    return model_folder.read(place)


# Fresh.


def test_fresh_factors_are_drawn_as_peft_draws_them(tmp_path):
    base = model(tmp_path)
    stored = with_lora(base, LoraConfig(rank=16, alpha=32.0), seed=3)
    config = stored.about.config
    assert stored.leaves.keys() == stored_shapes(config).keys()
    assert stored.own == stored.leaves.keys() - base.leaves.keys()
    units = []
    for path in stored.own:
        values = stored.leaves[path].read()
        assert values.dtype == np.float32
        if path.endswith("lora_b"):
            assert not values.any()
            continue
        units.append(values.ravel() * values.shape[0] ** 0.5)
        half = slice(values.shape[0] // 2, None), slice(0, 16)
        np.testing.assert_array_equal(stored.leaves[path].read_part(half), values[half])
    flat = np.concatenate(units)
    assert len({unit.tobytes() for unit in units}) == len(units) == 2 * 7
    # Uniform within 1/√inputs; 10,752 draws.
    assert 0.999 < np.abs(flat).max() <= 1.0
    assert abs(flat.mean()) < 0.02
    assert abs(flat.var() - 1 / 3) < 0.01
    assert same(leaves_of(with_lora(base, LoraConfig(rank=16), seed=3)), leaves_of(stored))
    path = "language/decoder/layers/0/q/lora_a"
    other = with_lora(base, LoraConfig(rank=16), seed=4).leaves[path].read()
    assert not np.array_equal(other, stored.leaves[path].read())
    assert same(leaves_of(without_lora(stored)), leaves_of(base))
    assert without_lora(stored).about == base.about


def test_factors_that_are_there_are_kept_or_refused(tmp_path):
    stored = trained(model(tmp_path), LORAS["q, v"])
    dropping = dataclasses.replace(LORAS["q, v"], targets=("v", "q"), dropout=0.5)
    again = with_lora(stored, dropping, seed=9)
    assert again.about.config.language.lora == dropping
    assert same(leaves_of(again), leaves_of(stored))
    for other in (LORAS["all"], dataclasses.replace(LORAS["q, v"], alpha=16.0), LoraConfig()):
        with pytest.raises(ValueError, match="has LoRA factors of rank 4, alpha 8 on q, v, and"):
            with_lora(stored, other, seed=0)
    with pytest.raises(ValueError, match="got seed -1"):
        with_lora(model(tmp_path / "other"), LORAS["all"], seed=-1)


# Merged.


def test_a_workdir_of_lora_is_an_adapter_or_merged(tmp_path):
    base = model(tmp_path)
    stored = trained(base, LORAS["all"])
    workdir = write_workdir(tmp_path / "run", stored)
    opened = api.open_stored(workdir)
    assert opened.about.config.language.lora == LORAS["all"]
    assert same(leaves_of(opened), leaves_of(stored))
    bases = [epath.Path(tmp_path / "base")]
    adapter = epath.Path(export(tmp_path / "adapter", opened, "peft"))
    assert same(leaves_of(open_model(adapter, bases, Choices(keep_lora=True))), leaves_of(stored))
    back = open_model(epath.Path(export(tmp_path / "hf", opened, "hf")))
    assert back.about.config == base.about.config
    for path, kernel in base.leaves.items():
        expected = stored.leaves[path].read().astype(np.float64)
        place = path.removesuffix("kernel")
        if f"{place}lora_a" in stored.leaves:
            a_IR, b_OR = (stored.leaves[f"{place}lora_{x}"].read().astype(np.float64) for x in "ab")
            delta = a_IR @ b_OR.T
            expected += 2.0 * (delta.T if place.split("/")[-2] in OUTPUT_FIRST else delta)
            assert np.abs(expected - kernel.read()).max() > 0.01
        # One rounding to f32.
        np.testing.assert_allclose(back.leaves[path].read(), expected, rtol=1e-6, atol=1e-7)


def write_workdir(workdir: Path, stored: StoredModel) -> epath.Path:
    place = epath.Path(workdir)
    base = model_folder.fingerprint(place.parent / "base")
    meta = checkpoint.Meta(stored.about, model_folder.Base(base, "../base"), data={})
    params = params_in_memory(stored.about.config, stored.leaves)
    state = step.init(optim.split(params, LORA)[0], optim.AdamW())
    with checkpoint.Checkpoints(place, keep=1, keep_every=0) as checkpoints:
        checkpoints.save(3, state, meta)
    return place


def export(folder: Path, stored: StoredModel, format: str) -> Path:
    exporting.export(stored, epath.Path(folder), format)
    return folder


# To PEFT and back.


@pytest.mark.parametrize("linear", [False, True], ids=["mlp", "linear"])
@pytest.mark.parametrize("lora", LORAS)
def test_peft_gives_the_logits_of_the_merged_model(tmp_path, lora, linear, recwarn):
    torch, peft = import_torch(), import_peft()
    from transformers import LlavaForConditionalGeneration

    base = model(tmp_path, linear)
    stored = thin(trained(base, LORAS[lora]), tmp_path)
    export(tmp_path / "base_hf", base, "hf")
    export(tmp_path / "adapter", stored, "peft")
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "base_hf", attn_implementation="eager"
    )
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapter")).eval()
    assert not [str(w.message) for w in recwarn if "key" in str(w.message)]
    with_factors = {n for n, _ in theirs.named_parameters() if "lora_" in n}
    assert len(with_factors) == 2 * 2 * len(LORAS[lora].targets)
    assert not any("vision" in name for name in with_factors)

    image, ids = loaded.config.image_token_id, [1, 300, 301, 302]
    vision = base.about.config.vision
    photo = picture(56, 56)
    mean, std = (np.array(x, np.float32) for x in (vision.image_mean, vision.image_std))
    normal_HW3 = (np.asarray(photo, np.float32) / np.float32(255) - mean) / std
    inputs = {
        "input_ids": torch.tensor([[*ids, *[image] * checkpoints.PATCHES, 303]]),
        "pixel_values": torch.from_numpy(normal_HW3.transpose(2, 0, 1)[None].copy()),
    }
    with torch.no_grad():
        logits_TV = theirs(**inputs).logits[0].numpy()
        with theirs.disable_adapter():
            without_TV = theirs(**inputs).logits[0].numpy()
    our_logits_TV, our_without_TV = (
        api.from_stored(each).logits(ids=[*ids, -200, 303], images=[photo])
        for each in (without_lora(stored), base)
    )
    num_ids = our_logits_TV.shape[1]
    # Measured worst 1.9e-6, in f32.
    assert apart(our_logits_TV, logits_TV[:, :num_ids]) < 2e-5
    # The projector is the adapter's too.
    assert apart(our_without_TV, without_TV[:, :num_ids]) < 2e-5
    assert apart(our_without_TV, our_logits_TV) > 0.01


def test_peft_puts_the_originals_factors_on_its_language_model(tmp_path):
    torch, peft = import_torch(), import_peft()
    from transformers import LlamaForCausalLM

    llama, _ = checkpoints.llama(tmp_path / "llama")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    stored = trained(open_model(epath.Path(llama), [epath.Path(clip)]), LORAS["all"])
    export(tmp_path / "adapter", stored, "original-peft")
    loaded: Any = LlamaForCausalLM.from_pretrained(llama, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapter")).eval()
    ids = [1, 300, 301, 302, 303]
    with torch.no_grad():
        logits_TV = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    # Measured worst 6.0e-7, in f32.
    assert apart(api.from_stored(stored).logits(ids=ids), logits_TV) < 2e-5


@pytest.mark.parametrize("linear", [False, True], ids=["mlp", "linear"])
@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("format", ["peft", "original-peft"])
def test_an_adapter_comes_back_to_the_bit(tmp_path, format, lora, linear):
    if format == "original-peft":
        import_torch()
    base = model(tmp_path, linear)
    stored = trained(base, LORAS[lora])
    folder = export(tmp_path / "adapter", stored, format)
    back = open_model(
        epath.Path(folder),
        [epath.Path(tmp_path / "base")],
        Choices(allow_pickle=True, keep_lora=True),
    )
    assert back.about == stored.about
    assert same(leaves_of(back), leaves_of(stored))
    assert back.own == stored.own
    named = {*checkpoints.read_file(folder / "adapter_model.safetensors")}
    prefix = "base_model.model.model." + "language_model." * (format == "peft")
    assert f"{prefix}layers.1.self_attn.v_proj.lora_B.weight" in named
    if format == "peft":
        assert "base_model.model.model.multi_modal_projector.linear_1.bias" in named
        return
    torch = import_torch()
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    first = "" if linear else ".0"
    assert f"base_model.model.model.mm_projector{first}.weight" in beside
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"][:2] == ["q_proj", "v_proj" if lora == "q, v" else "k_proj"]


@pytest.mark.parametrize("older", [False, True], ids=["today's keys", "before transformers 4.52"])
def test_what_peft_saves_is_read(tmp_path, older):
    """Its own writer, with names of its own choosing."""
    torch, peft = import_torch(), import_peft()
    from transformers import LlavaForConditionalGeneration

    base = model(tmp_path)
    export(tmp_path / "hf", base, "hf")
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    wrapped = peft.get_peft_model(
        loaded,
        peft.LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=r".*language_model.*(up|down)_proj",
            modules_to_save=["multi_modal_projector"],
            init_lora_weights=False,
        ),
    )
    with torch.no_grad():
        wrapped.model.model.multi_modal_projector.modules_to_save.default.linear_1.bias.fill_(2.0)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = checkpoints.read_file(file)
    if older:
        state = {
            name.replace("model.model.language_model.", "model.language_model.model.").replace(
                "model.model.multi_modal_projector", "model.multi_modal_projector"
            ): array
            for name, array in state.items()
        }
        file.unlink()
        checkpoints.write_file(file, state)
    back = open_model(
        epath.Path(tmp_path / "adapter"),
        [epath.Path(tmp_path / "base")],
        Choices(keep_lora=True),
    )
    assert back.about.config.language.lora == LoraConfig(3, 6.0, 0.0, ("up", "down"))
    factor = next(array for name, array in state.items() if "layers.1.mlp.down_proj.lora_A" in name)
    got = back.leaves["language/decoder/layers/1/down/lora_a"].read()
    np.testing.assert_array_equal(got, factor.T)
    np.testing.assert_array_equal(back.leaves["projector/linear_0/bias"].read(), 2.0)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    base = model(tmp_path)
    with pytest.raises(ValueError, match="'peft' is of LoRA factors, and the model has none"):
        exporting.export(base, epath.Path(tmp_path / "dst"), "peft")
    stored = trained(base, LORAS["all"])
    more = dataclasses.replace(stored, own=stored.own | {"language/embed/added"})
    with pytest.raises(ValueError, match=r"1 other tensors trained too \(language/embed/added\)"):
        exporting.export(more, epath.Path(tmp_path / "dst"), "original-peft")
    assert not (tmp_path / "dst").exists()


def test_the_card_names_the_base(tmp_path):
    base = model(tmp_path)
    stored = thin(trained(base, LORAS["all"]), tmp_path)
    card = (export(tmp_path / "adapter", stored, "peft") / "README.md").read_text()
    assert model_folder.fingerprint(epath.Path(tmp_path / "base")) in card
    assert "rank 4, alpha 8, on q, k, v, o, gate, up, down" in card
