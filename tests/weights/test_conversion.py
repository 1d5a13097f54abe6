"""Weights go through us and come back the same to the bit, whatever layout they came in."""

import json

import numpy as np
import pytest
from etils import epath

from llava_jax import model_folder
from llava_jax.weights import exporting
from llava_jax.weights.assembly import Choices, open_model
from tests.weights import checkpoints
from tests.weights.checkpoints import VOCAB, WIDTH, same
from tests.weights.passages import exported, imported, leaves_of


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, "mixed") for layout in checkpoints.HUGGING_FACE),
        *(("hub", dtype) for dtype in ("float32", "float16", "bfloat16")),
    ],
)
def test_hugging_faces_layouts_come_back_as_the_hubs(tmp_path, layout, dtype):
    src, state = checkpoints.hugging_face(tmp_path / "src", layout, dtype)
    stored = imported(tmp_path / "ours", src)
    back = exported(tmp_path / "back", stored, "hf")
    theirs = checkpoints.HUGGING_FACE[layout]
    as_hub = {}
    for name, array in state.items():
        for prefix, hub in sorted(
            zip(theirs, checkpoints.HUGGING_FACE["hub"], strict=True), key=lambda p: -len(p[0])
        ):
            if name.startswith(prefix):
                as_hub[hub + name.removeprefix(prefix)] = array
                break
    assert same(back, as_hub)


@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
@pytest.mark.parametrize("linear", [False, True], ids=["v1.5", "v1"])
def test_the_originals_layout_comes_back(tmp_path, linear, dtype):
    added = ("<im_patch>", "<im_start>", "<im_end>") if linear else ()
    src, state = checkpoints.original(tmp_path / "src", dtype, linear=linear, added=added)
    stored = imported(tmp_path / "ours", src)
    assert same(exported(tmp_path / "back", stored, "original"), state)
    assert stored.about.template == "v1"  # assumed: no file of the original's says it
    assert stored.about.image_mode == ("crop" if linear else "pad")


def test_a_tower_from_its_own_folder_ends_up_inside(tmp_path):
    src, state = checkpoints.original(tmp_path / "src", with_tower=False)
    clip, clip_state = checkpoints.clip(tmp_path / "clip")
    stored = imported(tmp_path / "ours", src, clip)
    inside = {
        checkpoints.ORIGINAL_TOWER + name.removeprefix("vision_model."): array
        for name, array in clip_state.items()
        if name.startswith("vision_model.")
    }
    assert same(exported(tmp_path / "back", stored, "original"), {**state, **inside})


@pytest.mark.parametrize("dtype", ["float16", "mixed"])
def test_from_hugging_face_over_the_original_and_back(tmp_path, dtype):
    src, state = checkpoints.hugging_face(tmp_path / "src", dtype=dtype)
    ours = imported(tmp_path / "ours", src)
    exporting.export(ours, epath.Path(tmp_path / "original"), "original")
    again = imported(tmp_path / "again", tmp_path / "original")
    assert same(leaves_of(again), leaves_of(ours))
    assert again.about.config == ours.about.config
    assert same(exported(tmp_path / "back", ours, "hf"), state)


def test_all_blocks_of_the_tower_survive(tmp_path):
    src, state = checkpoints.hugging_face(tmp_path / "src")
    leaves = imported(tmp_path / "ours", src).leaves
    last = checkpoints.BLOCKS - 1  # the model runs all but this one
    key = f"vision_tower.vision_model.encoder.layers.{last}.mlp.fc2.weight"
    np.testing.assert_array_equal(leaves[f"vision/layers/{last}/fc2/kernel"].read(), state[key])
    key = "vision_tower.vision_model.post_layernorm.bias"
    np.testing.assert_array_equal(leaves["vision/post_norm/bias"].read(), state[key])


def test_exports_are_sharded_with_an_index(tmp_path):
    src, state = checkpoints.hugging_face(tmp_path / "src")
    stored = imported(tmp_path / "ours", src)
    assert same(exported(tmp_path / "back", stored, "hf", shard_bytes=200_000), state)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    shards = {path.name for path in (tmp_path / "back").glob("model-*-of-*.safetensors")}
    assert len(shards) > 2
    assert shards == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in state.values())
    assert open_model(epath.Path(tmp_path / "back")).about == stored.about


def test_buffers_of_old_checkpoints_are_left_out_and_counted(tmp_path):
    src, state = checkpoints.original(tmp_path / "src")
    buffers = {
        f"{checkpoints.ORIGINAL_TOWER}embeddings.position_ids": np.arange(17)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32),
    }
    old = checkpoints.write(
        tmp_path / "old", {**state, **buffers}, checkpoints.original_config(VOCAB)
    )
    opened = open_model(epath.Path(old))
    assert opened.leaves.keys() == open_model(epath.Path(src)).leaves.keys()
    assert any(note.startswith("2 buffers") for note in opened.notes)


@pytest.mark.parametrize(
    ("chat", "template"),
    [
        ("{% for m in messages %}USER: {{ m }} ASSISTANT:{% endfor %}", "v1"),
        ("[INST] {{ messages }} [/INST]", "llava_llama_2"),
        ("### Human: {{ messages }}", "v0"),
    ],
)
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_tells_the_conversation(tmp_path, file, chat, template):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    is_json = file.endswith(".json")
    (src / file).write_text(json.dumps({"chat_template": chat}) if is_json else chat)
    assert open_model(epath.Path(src)).about.template == template
    told = open_model(epath.Path(src), choices=Choices(template="plain"))
    assert told.about.template == "plain"


@pytest.mark.parametrize("same_head", [True, False])
def test_a_head_beside_tied_embeddings_counts_if_it_differs(tmp_path, same_head):
    src, state = checkpoints.hugging_face(tmp_path / "good")
    config = json.loads((src / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if same_head:
        state[head] = state[table]
    tied = checkpoints.write(tmp_path / "tied", state, config, added=("<image>", "<pad>"))
    opened = open_model(epath.Path(tied))
    assert opened.about.config.language.tie_embeddings == same_head
    assert ("language/head/kernel" in opened.leaves) == (not same_head)


@pytest.mark.parametrize("where", ["model", "clip"])
def test_the_colours_a_processor_subtracts_are_the_folders_own(tmp_path, where):
    clip, _ = checkpoints.clip(tmp_path / "clip")
    src, _ = (
        checkpoints.hugging_face(tmp_path / "model")
        if where == "model"
        else checkpoints.original(tmp_path / "model", with_tower=False)
    )
    own = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "size": 56}
    (tmp_path / where / "preprocessor_config.json").write_text(json.dumps(own))
    bases = [clip] if where == "clip" else []
    stored = imported(tmp_path / "ours", src, *bases)
    vision = stored.about.config.vision
    assert (vision.image_mean, vision.image_std) == ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    exporting.export(stored, epath.Path(tmp_path / "back"), "hf")
    written = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.5, 0.4, 0.3]


def test_ids_written_above_the_language_models_own_config_count(tmp_path):
    src, _ = checkpoints.hugging_face(tmp_path / "src")
    assert open_model(epath.Path(src)).about.tokens.pad == VOCAB + 1


# What is added to a vocabulary.


def test_added_ids_are_split_off_and_known_by_the_tokenizer(tmp_path):
    added = ("[PAD]", "<im_patch>", "<im_end>", "<im_start>")  # in an order of its own
    src, state = checkpoints.original(tmp_path / "src", linear=True, added=added)
    stored = imported(tmp_path / "ours", src)
    table = state["model.embed_tokens.weight"]
    embed = {name: stored.leaves[f"language/embed/{name}"].read() for name in ("table", "added")}
    np.testing.assert_array_equal(embed["table"], table[:VOCAB])
    np.testing.assert_array_equal(embed["added"], table[VOCAB:])
    head = stored.leaves["language/head/added"].read()
    np.testing.assert_array_equal(head, state["lm_head.weight"][VOCAB:].T)
    tokens = stored.about.tokens
    assert (tokens.image_patch, tokens.image_end, tokens.image_start) == (513, 514, 515)
    assert stored.about.start_end_tokens
    assert stored.about.config.language.added_vocab == 4


def test_without_a_tokenizer_no_ids_are_told_apart(tmp_path):
    src, state = checkpoints.hugging_face(tmp_path / "src", tokenizer=False)
    stored = imported(tmp_path / "ours", src)
    assert stored.about.config.language.added_vocab == 0
    assert same(exported(tmp_path / "back", stored, "hf"), state)


def test_rows_for_the_image_token_are_never_the_likeliest(tmp_path):
    src, state = checkpoints.original(tmp_path / "src")
    back = exported(tmp_path / "back", imported(tmp_path / "ours", src), "hf")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (VOCAB, VOCAB + 1)
    assert config["text_config"]["vocab_size"] == VOCAB + 64
    head = back["language_model.lm_head.weight"]
    np.testing.assert_array_equal(head[:VOCAB], state["lm_head.weight"])
    mean = state["lm_head.weight"].mean(0, dtype=np.float64)
    # f32 sums of 512 numbers.
    np.testing.assert_allclose(head[VOCAB:], np.broadcast_to(mean, (64, WIDTH)), atol=1e-7)
    hidden = np.random.default_rng(0).standard_normal((1000, WIDTH))
    logits = hidden @ head.T.astype(np.float64)
    assert (logits.argmax(-1) < VOCAB).all()


def test_a_linear_projector_is_two_matrices_to_hugging_face(tmp_path):
    src, _ = checkpoints.original(tmp_path / "src", "bfloat16", linear=True)
    ours = imported(tmp_path / "ours", src)
    back = exported(tmp_path / "hf", ours, "hf")
    second = back["multi_modal_projector.linear_2.weight"]
    np.testing.assert_array_equal(second.astype(np.float32), np.eye(WIDTH, dtype=np.float32))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["projector_hidden_act"] == "linear"
    again = imported(tmp_path / "again", tmp_path / "hf")
    assert again.about.config.projector == ours.about.config.projector
    for leaf in ("kernel", "bias"):
        one, other = (x.leaves[f"projector/linear_0/{leaf}"].read() for x in (ours, again))
        assert one.tobytes() == other.tobytes()


def test_nan_and_infinity_are_kept_and_reported(tmp_path):
    src, state = checkpoints.hugging_face(tmp_path / "whole", dtype="bfloat16")
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    state[key][0, :2] = np.nan, -np.inf
    odd = checkpoints.write(
        tmp_path / "odd", state, json.loads((src / "config.json").read_text()), added=("<image>",)
    )
    opened = open_model(epath.Path(odd))
    report = model_folder.save(opened, epath.Path(tmp_path / "ours"))
    assert report.not_finite == {"language/decoder/layers/0/up/kernel": 2}
    assert same(
        exported(tmp_path / "back", model_folder.read(epath.Path(tmp_path / "ours")), "hf"), state
    )
