"""launch/convert.py as a user meets it: what it prints, how it ends, what it leaves behind."""

import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import convert
from tests.conftest import CHECKOUT, import_torch
from tests.launch.conftest import Outcome
from tests.weights import checkpoints
from tests.weights.checkpoints import VOCAB


@pytest.fixture
def run(run_verb):
    return functools.partial(run_verb, convert)


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A process of its own, with this checkout's package."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )


def refused(outcome: Outcome, dst: Path, *parts: str) -> bool:
    """Exit code 2, one error that says all these things, and nothing written."""
    assert outcome.code == 2, outcome.err
    message = outcome.err[outcome.err.index("error: ") :]
    for part in parts:
        assert part in message
    assert not dst.exists()
    assert [p for p in dst.parent.iterdir() if "unfinished" in p.name] == []
    return True


def test_there_and_back_as_a_command(tmp_path):
    src, state = checkpoints.hugging_face(tmp_path / "src", dtype="float16")
    script = CHECKOUT / "launch" / "convert.py"
    for arguments in (
        ("import", src, tmp_path / "ours"),
        ("export", tmp_path / "ours", tmp_path / "back", "--format", "hf"),
    ):
        done = run_python(script, *arguments)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "converting: " in done.stderr
    assert "language" in done.stdout
    assert "float16" in done.stdout
    assert checkpoints.same(checkpoints.read(tmp_path / "back"), state)


def test_verify_says_what_it_found(run, tmp_path):
    import_torch()
    src, _ = checkpoints.hugging_face(tmp_path / "src", "in memory, plain tower", "float16")
    outcome = run("import", src, tmp_path / "ours", "--verify")
    assert outcome.code == 0, outcome.err
    assert "82 tensors by name, shape, dtype and SHA-256" in outcome.out
    assert "logits of a text prompt equal PyTorch's" in outcome.out
    assert "logits of a picture prompt equal PyTorch's" in outcome.out
    original, _ = checkpoints.original(tmp_path / "original", "bfloat16")
    outcome = run("export", original, tmp_path / "hf", "--format", "original", "--verify")
    assert outcome.code == 0, outcome.err
    assert "picture prompt equal" in outcome.out
    shutil.rmtree(tmp_path / "hf")
    outcome = run("export", tmp_path / "ours", tmp_path / "hf", "--format", "hf", "--verify")
    assert outcome.code == 0, outcome.err
    assert "mapped back" in outcome.out
    assert "picture prompt equal" in outcome.out


def test_verify_notices_a_changed_tensor(run, tmp_path, monkeypatch):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    run("import", src, tmp_path / "ours")
    export = convert.exporting.export

    def export_and_damage(*args, **kwargs):
        report = export(*args, **kwargs)
        file = tmp_path / "back" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return report

    monkeypatch.setattr(convert.exporting, "export", export_and_damage)
    outcome = run("export", tmp_path / "ours", tmp_path / "back", "--format", "hf", "--verify")
    assert outcome.code == 2
    assert "1 tensors differ from what was converted" in outcome.err


def test_a_thin_folder_and_back(run, tmp_path):
    whole, state = checkpoints.original(tmp_path / "whole")
    other, _ = checkpoints.hugging_face(tmp_path / "other")
    run("import", other, tmp_path / "base")
    projector = {k: x + 1 for k, x in state.items() if k.startswith("model.mm_projector.")}
    checkpoints.write_file(tmp_path / "mm_projector.safetensors", projector)
    outcome = run(
        "import", tmp_path / "mm_projector.safetensors", tmp_path / "thin", "--base",
        tmp_path / "base", "--thin",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    described = json.loads((tmp_path / "thin" / "llava.json").read_text())
    assert {path.split("/")[0] for path in described["tensors"]} == {"projector"}
    assert described["base"]["path"] == "../base"
    assert run("export", tmp_path / "thin", tmp_path / "back", "--format", "original").code == 0
    back = checkpoints.read(tmp_path / "back")
    for name, array in projector.items():
        np.testing.assert_array_equal(back[name], array)
    assert len(back) == len(state)
    assert whole.exists()


def test_the_projector_apart(run, tmp_path):
    torch = import_torch()
    src, state = checkpoints.original(tmp_path / "src", "bfloat16")
    outcome = run("export", src, tmp_path / "dst", "--format", "original", "--projector_bin")
    assert outcome.code == 0, outcome.err
    projector = torch.load(tmp_path / "dst" / "mm_projector.bin", weights_only=True)
    assert projector.keys() == {k for k in state if k.startswith("model.mm_projector.")}
    assert all(x.dtype == torch.bfloat16 for x in projector.values())
    again = run(
        "import", tmp_path / "dst" / "mm_projector.bin", tmp_path / "ours", "--base", src,
        "--allow-pickle",
    )  # fmt: skip
    assert again.code == 0, again.err


# Bad input: one sentence, exit code 2, nothing written.


def spoilt(tmp_path: Path, **changes: Any) -> Path:
    """A good folder with its config.json changed, its parts field by field."""
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    file = src / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        inside = name in config and isinstance(value, dict)
        config[name] = {**config[name], **value} if inside else value
    file.write_text(json.dumps(config))
    return src


def test_a_truncated_file(run, tmp_path):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    file = src / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert refused(run("import", src, tmp_path / "dst"), tmp_path / "dst", "model.safetensors")


def test_a_missing_shard(run, tmp_path):
    src, _ = checkpoints.hugging_face(tmp_path / "src", shard_bytes=200_000)
    shard = sorted(src.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert refused(run("import", src, tmp_path / "dst"), tmp_path / "dst", shard.name)


def test_tensors_that_do_not_fit_are_all_named(run, tmp_path):
    src, state = checkpoints.hugging_face(tmp_path / "good")
    vision, _, language, _ = checkpoints.HUGGING_FACE["hub"]
    del state[f"{vision}encoder.layers.2.mlp.fc1.bias"]
    state[f"{language}layers.0.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
    state["language_model.model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    config = json.loads((src / "config.json").read_text())
    odd = checkpoints.write(tmp_path / "src", state, config, added=("<image>", "<pad>"))
    assert refused(
        run("import", odd, tmp_path / "dst"),
        tmp_path / "dst",
        "3 of the tensors do not fit",
        "encoder.layers.2.mlp.fc1.bias: missing, expected shape (64,)",
        "layers.0.mlp.up_proj.weight: got shape (3, 5), expected (96, 48)",
        "layers.0.self_attn.q_proj.bias: unused",
    )


def test_a_config_that_disagrees_with_the_shapes(run, tmp_path):
    src = spoilt(tmp_path, text_config={"vocab_size": VOCAB})
    assert refused(
        run("import", src, tmp_path / "dst"), tmp_path / "dst", "'vocab_size' is 512", "576 rows"
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"projector_hidden_act": "relu"}, ("'projector_hidden_act' is 'relu'", "'gelu'")),
        ({"multimodal_projector_bias": False}, ("'multimodal_projector_bias' is False",)),
        ({"vision_feature_select_strategy": "x"}, ("is 'x', expected 'default' or 'full'",)),
        ({"vision_feature_layer": "last"}, ("'vision_feature_layer' is 'last'",)),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, ("'siglip_vision_model'",)),
        ({"text_config": {"model_type": "qwen2"}}, ("is a 'qwen2'", "'llama'")),
        ({"model_type": "llava_next"}, ("'model_type' is 'llava_next'",)),
        ({"quantization_config": {"bits": 4}}, ("'quantization_config'",)),
        ({"text_config": {"num_hidden_layers": 10**9}}, ("1000000000", "tensors are of 2")),
        ({"text_config": {"num_hidden_layers": -1}}, ("-1, expected 1 or more",)),
        ({"vision_config": {"num_hidden_layers": 24}}, ("is 24, and the tensors are of 3",)),
        ({"vision_config": {"patch_size": 0}}, ("'patch_size' is 0, expected 1 or more",)),
        ({"text_config": {"rms_norm_eps": float("nan")}}, ("NaN",)),
        ({"text_config": {"rms_norm_eps": -1}}, ("rms_norm_eps -1",)),
        ({"text_config": {"rope_theta": 0}}, ("rope theta 0",)),
        (
            {"text_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}},
            ("unknown rope scaling 'yarn'",),
        ),
        ({"text_config": {"num_attention_heads": 5}}, ("5 query heads for 2",)),
    ],
)
def test_a_config_of_something_else(run, tmp_path, changes, parts):
    src = spoilt(tmp_path, **changes)
    outcome = run("import", src, tmp_path / "dst")
    assert refused(outcome, tmp_path / "dst", "config.json", *parts)


def test_weights_that_are_no_numbers_of_a_model(run, tmp_path):
    src, state = checkpoints.hugging_face(tmp_path / "good")
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    state[key] = state[key].astype(np.int8)
    config = json.loads((src / "config.json").read_text())
    odd = checkpoints.write(tmp_path / "src", state, config, added=("<image>", "<pad>"))
    outcome = run("import", odd, tmp_path / "dst")
    assert refused(outcome, tmp_path / "dst", key, "got int8, expected one of ('float16'")


def test_start_and_end_tokens_that_do_not_exist(run, tmp_path):
    src, _ = checkpoints.original(tmp_path / "src", linear=True)
    config = checkpoints.original_config(VOCAB, linear=True)
    (src / "config.json").write_text(json.dumps({**config, "mm_use_im_start_end": True}))
    outcome = run("import", src, tmp_path / "dst")
    assert refused(outcome, tmp_path / "dst", "<im_start> and <im_end>", "no such token")


def test_an_image_token_out_of_range(run, tmp_path):
    outcome = run("import", spoilt(tmp_path, image_token_index=99999), tmp_path / "dst")
    assert refused(outcome, tmp_path / "dst", "<image> is id 99999, expected 0 to 575")


def test_a_projector_of_another_kind_than_told(run, tmp_path):
    src, _ = checkpoints.original(tmp_path / "src")
    config = json.loads((src / "config.json").read_text())
    for field, value in (("mm_projector_type", "mlp3x_gelu"), ("mm_hidden_size", 1024)):
        (src / "config.json").write_text(json.dumps({**config, field: value}))
        outcome = run("import", src, tmp_path / "dst")
        assert refused(outcome, tmp_path / "dst", field, str(value), "the tensors are of")


def test_a_seed_below_zero(run, tmp_path):
    llama, _ = checkpoints.llama(tmp_path / "llama")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    outcome = run("import", llama, tmp_path / "dst", "--base", clip, "--seed=-1")
    assert refused(outcome, tmp_path / "dst", "got seed -1")


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_an_interrupted_import_leaves_nothing(tmp_path, number, word):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    # The signal comes while tensors are read and written: the process sends it to itself.
    program = (
        "import os, runpy, signal, sys\n"
        "from llava_jax import model_folder\n"
        # A shell that starts tests in the background lets them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "observe = model_folder.Observer.__call__\n"
        "def signalling(self, path, array):\n"
        "    observe(self, path, array)\n"
        f"    if path.endswith('layers/1/up/kernel'): os.kill(os.getpid(), {int(number)})\n"
        "model_folder.Observer.__call__ = signalling\n"
        f"sys.argv = ['convert.py', 'import', {str(src)!r}, {str(tmp_path / 'dst')!r}]\n"
        f"runpy.run_path({str(CHECKOUT / 'launch' / 'convert.py')!r}, run_name='__main__')\n"
    )
    done = run_python("-c", program)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.splitlines()[-1] == word
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_an_unknown_architecture(run, tmp_path):
    src = checkpoints.write(
        tmp_path / "src",
        checkpoints.draw({"transformer.h.0.attn.weight": (4, 4)}),
        {"architectures": ["GPT2LMHeadModel"]},
        tokenizer=False,
    )
    assert refused(
        run("import", src, tmp_path / "dst"),
        tmp_path / "dst",
        "unknown architecture",
        "GPT2LMHeadModel",
        "transformer.h.0.attn.weight",
        "expected a llava-hf",
    )


def test_a_pickle_without_leave(run, tmp_path):
    src, _ = checkpoints.original(tmp_path / "src")
    (src / "model.safetensors").unlink()
    (src / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    outcome = run("import", src, tmp_path / "dst")
    assert refused(outcome, tmp_path / "dst", "pytorch_model.bin", "--allow-pickle")


def test_no_config(run, tmp_path):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    (src / "config.json").unlink()
    assert refused(run("import", src, tmp_path / "dst"), tmp_path / "dst", "config.json")


def test_no_tower_and_none_given(run, tmp_path):
    src, _ = checkpoints.original(tmp_path / "src", with_tower=False)
    assert refused(
        run("import", src, tmp_path / "dst"),
        tmp_path / "dst",
        "holds no vision tower",
        "openai/clip-vit-large-patch14-336",
        "--base",
    )


def test_a_base_that_gives_nothing(run, tmp_path):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    clip, _ = checkpoints.clip(tmp_path / "clip")
    outcome = run("import", src, tmp_path / "dst", "--base", clip)
    assert refused(outcome, tmp_path / "dst", "gives nothing the others lack", "clip")


def test_no_such_folder(run, tmp_path):
    outcome = run("import", tmp_path / "nowhere", tmp_path / "dst")
    assert refused(outcome, tmp_path / "dst", "nowhere", "does not exist")


def test_a_destination_in_use(run, tmp_path):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("mine")
    for arguments in (("import", src), ("export", src)):
        format = ("--format", "hf") if arguments[0] == "export" else ()
        outcome = run(*arguments, tmp_path / "dst", *format)
        assert outcome.code == 2
        assert "'precious'" in outcome.err
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["precious"]


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_full_disk(tmp_path, verb):
    """Files may grow to 100 kB: to a writer, that is a disk that fills up."""
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    format = ["--format", "hf"] if verb == "export" else []
    program = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.argv = ['convert.py', {verb!r}, {str(src)!r}, {str(tmp_path / 'dst')!r}, *{format}]\n"
        f"runpy.run_path({str(CHECKOUT / 'launch' / 'convert.py')!r}, run_name='__main__')\n"
    )
    done = run_python("-c", program)
    assert done.returncode == 2, done.stderr
    assert f"error: cannot write {tmp_path / 'dst'}: file too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_what_a_format_cannot_say(run, tmp_path):
    src = spoilt(tmp_path, vision_feature_layer=[-2, -3])
    outcome = run("import", src, tmp_path / "ours")
    assert outcome.code == 2  # the projector is for one layer's features
    assert "features of width" in outcome.err or "do not fit" in outcome.err


def test_options_that_do_not_go_together(run, tmp_path):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    outcome = run("import", src, tmp_path / "dst", "--thin")
    assert refused(outcome, tmp_path / "dst", "--thin", "expected one model folder")
    assert run("export", src, tmp_path / "dst").code == 2
    assert "did you mean --base" in run("import", src, tmp_path / "dst", "--bsae", "x").err
