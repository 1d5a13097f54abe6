"""The released checkpoints by their names and shapes alone: taken in whole, handed back the same.

The folders are as large as the real ones, and empty: files with holes.
"""

import dataclasses

import pytest
from etils import epath

from llava_jax.models.llava import released as released_config
from llava_jax.weights import exporting
from llava_jax.weights.assembly import open_model
from tests.weights.released import V1_TOKENS, Spec, lay_out, release

CASES = [
    ("v1.5-7b", "hf", ()),
    ("v1.5-13b", "hf", ()),
    ("v1.5-7b", "original", ()),
    ("v1.5-13b", "original", ()),
    ("v1-7b", "original", V1_TOKENS),
    ("v1-13b", "original", V1_TOKENS),
    ("v1-13b", "original", ()),
]


@pytest.mark.parametrize(("variant", "layout", "added"), CASES)
def test_names_and_shapes_come_back(tmp_path, variant, layout, added):
    expected = release(variant, layout, added)
    lay_out(expected, tmp_path)
    bases = [epath.Path(tmp_path / "clip")] if expected.clip else []
    stored = open_model(epath.Path(tmp_path / "model"), bases)

    assert stored.about.variant == variant
    language = released_config(variant).language
    rows = 64 if layout == "hf" else len(added)
    assert stored.about.config.language == dataclasses.replace(language, added_vocab=rows)
    assert stored.about.context == (2048 if variant.startswith("v1-") else 4096)
    assert stored.about.start_end_tokens == bool(added)
    # The hub's own files crop; the original was trained on padded pictures from v1.5 on.
    pads = layout == "original" and variant.startswith("v1.5")
    assert stored.about.image_mode == ("pad" if pads else "crop")
    assert any("'crop'" in note for note in stored.notes) == (layout == "hf")

    tensors, _ = exporting.hugging_face(stored) if layout == "hf" else exporting.original(stored)
    assert {k: Spec(t.dtype.name, t.shape) for k, t in tensors.items()} == expected.exported


def test_the_originals_7b_has_the_hubs_names_when_it_is_exported_there(tmp_path):
    lay_out(release("v1.5-7b", "original"), tmp_path)
    stored = open_model(epath.Path(tmp_path / "model"), [epath.Path(tmp_path / "clip")])
    tensors, _ = exporting.hugging_face(stored)
    hub = release("v1.5-7b", "hf").exported
    assert {k: t.shape for k, t in tensors.items()} == {k: spec.shape for k, spec in hub.items()}
