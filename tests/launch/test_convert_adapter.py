"""LoRA through launch/convert.py: merged or as an adapter, verified, and back."""

import functools
import json
from pathlib import Path

import pytest
from etils import epath

from launch import convert
from llava_jax import model_folder
from llava_jax.model_folder import StoredModel
from llava_jax.weights.adapter import without_lora
from tests.conftest import import_torch
from tests.weights import checkpoints
from tests.weights.checkpoints import same
from tests.weights.passages import leaves_of
from tests.weights.test_adapter import LORAS, model, thin, trained


@pytest.fixture
def run(run_verb):
    return functools.partial(run_verb, convert)


@pytest.fixture
def stored(tmp_path) -> StoredModel:
    """A run's result in tmp_path/thin, over tmp_path/base."""
    return thin(trained(model(tmp_path), LORAS["q, v"]), tmp_path)


@pytest.mark.parametrize("format", ["peft", "original-peft"])
def test_an_adapter_there_and_back(run, tmp_path, stored, format):
    import_torch()
    adapter, back = tmp_path / "adapter", tmp_path / "back"
    out = run("export", tmp_path / "thin", adapter, "--format", format, "--verify")
    assert out.code == 0, out.err
    assert "12 tensors by name, shape, dtype and SHA-256, mapped back" in out.out
    assert "picture prompt equal PyTorch's" in out.out
    base = ("--base", tmp_path / "base", "--thin", "--allow-pickle")
    assert run("import", adapter, back, *base).code == 0
    again = model_folder.read(epath.Path(back))
    assert again.about == stored.about
    assert same(leaves_of(again), leaves_of(stored))
    assert again.own == stored.own


@pytest.mark.parametrize("format", ["hf", "original"])
def test_what_is_exported_whole_is_merged(run, tmp_path, stored, format):
    import_torch()
    out = run("export", tmp_path / "thin", tmp_path / "whole", "--format", format, "--verify")
    assert out.code == 0, out.err
    assert "mapped back" in out.out
    assert "picture prompt equal PyTorch's" in out.out
    kernel = without_lora(stored).leaves["language/decoder/layers/1/v/kernel"].read()
    names = {
        "hf": "language_model.model.layers.1.self_attn.v_proj.weight",
        "original": "model.layers.1.self_attn.v_proj.weight",
    }
    written = checkpoints.read(tmp_path / "whole")
    assert written[names[format]].tobytes() == kernel.T.tobytes()
    assert not [name for name in written if "lora" in name]


def test_verify_notices_a_changed_factor(run, tmp_path, stored, monkeypatch):
    export = convert.exporting.export

    def export_and_damage(*args, **kwargs):
        report = export(*args, **kwargs)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return report

    monkeypatch.setattr(convert.exporting, "export", export_and_damage)
    out = run("export", tmp_path / "thin", tmp_path / "adapter", "--format", "peft", "--verify")
    assert out.code == 2
    assert "1 tensors differ from what was converted" in out.err


def test_what_makes_no_adapter_is_said(run, tmp_path):
    model(tmp_path)
    out = run("export", tmp_path / "base", tmp_path / "dst", "--format", "peft")
    assert (out.code, len(out.errors)) == (2, 1)
    assert "is of LoRA factors, and the model has none" in out.err
    out = run("export", tmp_path / "base", tmp_path / "dst", "--format", "peft", "--projector_bin")
    assert "--projector_bin with --format peft: expected --format original" in out.err
    assert not (tmp_path / "dst").exists()


def test_an_adapter_that_trained_more_than_we_have_is_refused(run, tmp_path, stored):
    """PEFT keeps other modules whole than the projector."""
    run("export", tmp_path / "thin", tmp_path / "adapter", "--format", "peft")
    spoil(tmp_path / "adapter" / "adapter_config.json", modules_to_save=["lm_head"])
    out = run("import", tmp_path / "adapter", tmp_path / "dst", "--base", tmp_path / "base")
    assert out.code == 2
    assert "'modules_to_save' is ['lm_head'], expected none but ['multi_modal_pro" in out.err
    assert not (tmp_path / "dst").exists()


def spoil(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
