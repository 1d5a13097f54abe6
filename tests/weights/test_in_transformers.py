"""Exported folders as others use them: transformers' own loader, processor and generation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from PIL import Image

from llava_jax import api
from llava_jax.weights import exporting
from llava_jax.weights.assembly import open_model
from tests.conftest import import_torch
from tests.models.torch_weights import apart
from tests.weights import checkpoints

QUESTION = "What is unusual in the picture?"


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def load_in_torch(folder: Path) -> tuple[Any, Any]:
    torch = import_torch()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    model, found = loaded
    assert not any(found.values()), found  # nothing missing, unexpected or misshapen
    return model.eval(), AutoProcessor.from_pretrained(folder)


def their_inputs(processor: Any, question: str, images: list[Image.Image]) -> Any:
    pictures = [{"type": "image", "image": image} for image in images]
    message = {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}
    return processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def exported(tmp_path: Path, src: Path) -> tuple[api.Model, Path]:
    stored = open_model(epath.Path(src))
    exporting.export(stored, epath.Path(tmp_path / "hf"), "hf")
    return api.from_stored(stored), tmp_path / "hf"


@pytest.mark.parametrize("layout", ["hub", "in memory, plain tower"])
def test_a_folder_means_to_us_what_it_means_to_transformers(tmp_path, layout):
    """The source itself, loaded by both: what is exported could be wrong both ways."""
    torch = import_torch()
    from transformers import AutoModelForImageTextToText

    src, _ = checkpoints.hugging_face(tmp_path / "src", layout)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(src, attn_implementation="eager")
    ours = api.load(src)
    vision = ours.about.config.vision
    pixel_HW3 = np.random.default_rng(1).integers(0, 256, (56, 56, 3), np.uint8)
    mean, std = (np.array(x, np.float32) for x in (vision.image_mean, vision.image_std))
    normal_HW3 = (pixel_HW3.astype(np.float32) / np.float32(255) - mean) / std
    image = checkpoints.VOCAB
    ids = [1, 300, *[image] * checkpoints.PATCHES, 301]
    with torch.no_grad():
        logits_TV = loaded(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.from_numpy(normal_HW3.transpose(2, 0, 1)[None].copy()),
        ).logits[0]
    our_logits_TV = ours.logits(ids=[1, 300, image, 301], images=[Image.fromarray(pixel_HW3)])
    # Measured worst 9.0e-7, in f32.
    assert apart(our_logits_TV, logits_TV.numpy()) < 2e-5


SOURCES = {
    "hub": lambda folder: checkpoints.hugging_face(folder)[0],
    "v1.5": lambda folder: checkpoints.original(folder)[0],
    "v1, linear, start and end": lambda folder: checkpoints.original(
        folder, linear=True, added=("<im_patch>", "<im_start>", "<im_end>")
    )[0],
}


@pytest.mark.parametrize("source", SOURCES)
def test_same_ids_logits_and_answers_through_its_own_processor(tmp_path, source):
    torch = import_torch()
    ours, folder = exported(tmp_path, SOURCES[source](tmp_path / "src"))
    theirs, processor = load_in_torch(folder)
    placeholder = theirs.config.image_token_id
    for images in (0, 1, 2):
        pictures = [picture(160, 64), picture(56, 144)][:images]  # neither is square
        inputs = their_inputs(processor, QUESTION, pictures)
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(placeholder) == images * checkpoints.PATCHES  # not one less
        ours_expanded = [
            id
            for one in ours.prompt_ids(QUESTION, images)
            for id in ([placeholder] * checkpoints.PATCHES if one == -200 else [one])
        ]
        assert ids == ours_expanded

        with torch.no_grad():
            logits_TV = theirs(**inputs).logits[0].numpy()
            generated = theirs.generate(**inputs, max_new_tokens=32, do_sample=False)
        our_logits_TV = ours.logits(QUESTION, pictures)
        # Measured worst 6.8e-6: f32, and pixels that are equal to the bit.
        assert apart(our_logits_TV, logits_TV[:, : our_logits_TV.shape[1]]) < 2e-5
        our_answer = ours.generate(
            ids=ours.prompt_ids(QUESTION, images), images=pictures, max_new_tokens=32
        )
        answer = generated[0, len(ids) :].tolist()
        assert our_answer == (answer[: answer.index(2)] if 2 in answer else answer)
        assert len(our_answer) > 0


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_pictures_are_made_square_as_the_model_was_trained(tmp_path, mode):
    import_torch()
    from transformers import AutoProcessor

    src, _ = checkpoints.original(tmp_path / "src", linear=mode == "crop")
    ours, folder = exported(tmp_path, src)
    assert ours.about.image_mode == mode
    processor = AutoProcessor.from_pretrained(folder)
    vision = ours.about.config.vision
    mean, std = (np.array(x, np.float32) for x in (vision.image_mean, vision.image_std))
    for size in ((160, 64), (56, 144), (333, 47), (56, 56), (21, 40)):
        image = picture(max(size[0], 8), max(size[1], 8))
        theirs_3HW = processor.image_processor(image, return_tensors="np")["pixel_values"][0]
        batch, _ = ours._batch([[1, -200]], [[image]])
        ours_HW3 = (batch.pixel_RKHW3[0, 0].astype(np.float32) / np.float32(255) - mean) / std
        # Half a step of one colour is 1/255/2/0.27 = 7e-3; measured worst 0.
        np.testing.assert_allclose(theirs_3HW.transpose(1, 2, 0), ours_HW3, atol=2e-6)


def test_full_size_pictures_take_576_tokens(tmp_path):
    """The placeholders of a 336-pixel tower, counted by the processor alone."""
    import_torch()
    from transformers import AutoProcessor

    _, folder = exported(tmp_path, SOURCES["hub"](tmp_path / "src"))
    config = json.loads((folder / "preprocessor_config.json").read_text())
    full = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, **full}))
    processor = AutoProcessor.from_pretrained(folder)
    for image in (picture(640, 480), picture(336, 336)):
        inputs = their_inputs(processor, QUESTION, [image])
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert inputs["input_ids"][0].tolist().count(image_id) == 576
