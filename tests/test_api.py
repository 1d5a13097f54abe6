"""`llava_jax.load`: any folder, whatever its name; text and pictures in, text and logits out."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

import llava_jax
from llava_jax import model_folder
from llava_jax.sharding import Layout, MeshShape, make_mesh
from llava_jax.weights.assembly import open_model
from tests.models.torch_weights import apart
from tests.weights import checkpoints
from tests.weights.checkpoints import PATCHES, VOCAB

IMAGE = -200


def photo(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same weights as ours, llava-hf's and the original's."""
    root = tmp_path_factory.mktemp("folders")
    original, _ = checkpoints.original(root / "original")
    model_folder.save(open_model(epath.Path(original)), epath.Path(root / "ours"))
    hub, _ = checkpoints.hugging_face(root / "hub")
    return {"original": original, "ours": root / "ours", "hub": hub}


@pytest.fixture(scope="module")
def model(folders) -> llava_jax.Model:
    return llava_jax.load(folders["ours"])


def test_the_same_weights_from_any_folder(folders, model):
    ids = [1, 300, IMAGE, 301, 302]
    expected = model.logits(ids=ids, images=[photo(0)])
    assert expected.shape == (len(ids) - 1 + PATCHES, VOCAB)
    assert expected.dtype == np.float32
    loaded = llava_jax.load(folders["original"])
    np.testing.assert_array_equal(loaded.logits(ids=ids, images=[photo(0)]), expected)
    hub = llava_jax.load(str(folders["hub"]))
    assert hub.logits(ids=[1, VOCAB, 5], images=[photo(0)]).shape == (2 + PATCHES, VOCAB + 64)


def test_a_folders_name_means_nothing(folders, model, tmp_path):
    for name in ("vicuna-7b-lora", "clip", "v0-delta"):
        shutil.copytree(folders["original"], tmp_path / name)
        renamed = llava_jax.load(tmp_path / name)
        assert renamed.about == llava_jax.load(folders["original"]).about
    np.testing.assert_array_equal(renamed.logits("Hi", [photo(1)]), model.logits("Hi", [photo(1)]))


def test_prompts_are_answered_alone_as_in_a_batch(model):
    prompts = ["What is unusual?", "Hi", "Describe the two pictures in some detail."]
    pictures = [[photo(0)], [], [photo(1), photo(2, 40, 120)]]
    together = model.generate(prompts, pictures, max_new_tokens=12)
    assert len(together) == 3
    assert all(isinstance(text, str) for text in together)
    for prompt, own, text in zip(prompts, pictures, together, strict=True):
        assert model.generate(prompt, own, max_new_tokens=12) == text


def test_generation_is_the_argmax_of_the_logits(model):
    ids = model.prompt_ids("What is that?", 1)
    new = model.generate(ids=ids, images=[photo(3)], max_new_tokens=8)
    longer = list(ids)
    for token in new:
        assert model.logits(ids=longer, images=[photo(3)])[-1].argmax() == token
        longer.append(token)


def test_generation_ends_with_the_end_token(model):
    ids = [1, 300, 301]
    whole = model.generate(ids=ids, max_new_tokens=8)
    assert len(whole) == 8
    tokens = model.about.tokens
    about = dataclasses.replace(model.about, tokens=dataclasses.replace(tokens, eos=whole[3]))
    ended = dataclasses.replace(model, about=about)
    assert ended.generate(ids=ids, max_new_tokens=8) == whole[: whole.index(whole[3])]
    assert model.generate(ids=ids, max_new_tokens=0) == []


def test_a_row_that_has_ended_says_no_more_while_others_go_on(model):
    prompts = ["What is unusual?", "Hi", "Describe it."]
    rows = [model.prompt_ids(prompt) for prompt in prompts]
    whole = [model.generate(ids=ids, max_new_tokens=12) for ids in rows]
    eos = whole[0][2]
    tokens = dataclasses.replace(model.about.tokens, eos=eos)
    ended = dataclasses.replace(model, about=dataclasses.replace(model.about, tokens=tokens))
    expected = [ids[: ids.index(eos)] if eos in ids else ids for ids in whole]
    assert len({len(ids) for ids in expected}) > 1  # or this would show nothing
    assert ended._new_ids(rows, [[]] * 3, 12) == expected


def test_pictures_come_as_paths_bytes_or_images(model, tmp_path):
    photo(4).save(tmp_path / "photo.png")
    expected = model.logits("Hi", [photo(4)])
    for source in (tmp_path / "photo.png", (tmp_path / "photo.png").read_bytes()):
        np.testing.assert_array_equal(model.logits("Hi", [source]), expected)


def test_every_picture_matters_and_in_its_place(model):
    ids = [1, IMAGE, 300, IMAGE, 301]
    one, two = photo(5), photo(6)
    pairs = ((one, two), (two, one), (two, two))
    last = [model.logits(ids=ids, images=list(pair))[-1] for pair in pairs]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert apart(last[a], last[b]) > 1e-3


def test_the_same_over_a_mesh(folders, model):
    layout = Layout(make_mesh(MeshShape(fsdp=(2, 2), tensor=2)))
    spread = llava_jax.load(folders["ours"], layout=layout)
    prompt, pictures = "What is unusual?", [photo(0)]
    # Measured worst 1.6e-6: sums in another order.
    assert apart(spread.logits(prompt, pictures), model.logits(prompt, pictures)) < 5e-6
    expected = model.generate(prompt, pictures, max_new_tokens=6)
    assert spread.generate(prompt, pictures, max_new_tokens=6) == expected


def test_a_folder_without_a_tokenizer_takes_ids(folders, tmp_path):
    shutil.copytree(folders["ours"], tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    bare = llava_jax.load(tmp_path / "bare")
    assert len(bare.generate(ids=[1, 5, 6], max_new_tokens=3)) == 3
    with pytest.raises(ValueError, match="holds no tokenizer: expected ids="):
        bare.generate("Hi")


def test_a_picture_may_be_marked_in_the_text(model):
    assert model.prompt_ids("<image>\nHi", 1) == model.prompt_ids("Hi", 1)
    assert model.generate("Hi", None, max_new_tokens=2) == model.generate("Hi", max_new_tokens=2)
    assert model.generate([]) == []
    with pytest.raises(ValueError, match="got max_new_tokens -1"):
        model.generate("Hi", max_new_tokens=-1)


def test_typed_special_tokens_are_text(model):
    ids = model.prompt_ids("Say </s> and <image>")
    assert IMAGE not in ids
    assert 2 not in ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": [1, IMAGE, 5]}, "got 1 image placeholders for 0 images"),
        ({"ids": [1, 5], "images": [photo(0)]}, "got 0 image placeholders for 1 images"),
        ({"ids": [1, VOCAB]}, f"got id {VOCAB}, expected 0 to {VOCAB - 1}"),
        ({"ids": []}, "got no ids"),
        ({"prompt": 5}, "got prompt 5"),
        ({}, "got no prompt"),
        ({"prompt": "Hi", "ids": [1]}, "got both prompt and ids"),
        ({"ids": [[1, 2]]}, "expected a list of numbers"),
        ({"prompt": "Hi", "images": "photo.jpg"}, "got images of type str"),
        ({"prompt": "<image> and <image>", "images": [photo(0)]}, "got 2 <image> in the prompt"),
        ({"prompt": "Hi", "images": [b"no picture"]}, "the picture"),
    ],
)
def test_what_cannot_be_is_said(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.logits(**arguments)


def test_batches_need_a_list_of_pictures_for_each_prompt(model):
    with pytest.raises(ValueError, match="got 2 prompts and images for 1"):
        model.generate(["a", "b"], [[photo(0)]])
    with pytest.raises(ValueError, match="expected at most 1024 in all"):
        model.generate("a", max_new_tokens=1020)
