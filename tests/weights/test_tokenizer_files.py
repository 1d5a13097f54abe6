"""The tokenizer.json that is made gives sentencepiece's ids, behind special tokens too."""

import json
import random
from pathlib import Path

import pytest
from etils import epath

from llava_jax import tokenizer as ours
from llava_jax.model_folder import tokenizer_files
from llava_jax.weights.tokenizer_files import (
    prefixes_behind_specials,
    with_added,
    with_tokenizer_json,
)
from tests.tiny_tokenizer import write_tokenizer

TEXTS = [
    "USER: What is unusual? ASSISTANT: A man irons.",
    "Zwölf Boxkämpfer, 12345 × 67, naïve — 東京 🙂\n\n\tend",
    "  two spaces, and a trailing one ",
    "x\nUSER:\n\n- a\n- b",
]


def made(folder: Path, legacy: bool):
    tokenizers = pytest.importorskip("tokenizers")
    files = tokenizer_files(epath.Path(folder))
    files = with_added(files, {"<image>": 600, "<pad>": 601}, pad="<pad>")
    files = with_tokenizer_json(files)
    assert prefixes_behind_specials(files) is legacy
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    letters = "abcdeghinorstuAEIRSTU  ..,:!?'\"-()\n01239äéß東🙂▁"
    return ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("which", ["tiny", "llama"])
def test_ids_are_sentencepieces(tmp_path, legacy, which, request):
    write_tokenizer(tmp_path, legacy=legacy)
    if which == "llama":
        real = request.getfixturevalue("shared") / "data" / "tokenizer.llama2"
        (tmp_path / "tokenizer.model").write_bytes(real.read_bytes())
    theirs, loaded = made(tmp_path, legacy), ours.load(tmp_path)
    for text in TEXTS + random_texts(300):
        if not legacy and text.startswith((" ", "▁")):
            continue  # Metaspace sees a ▁ in front already and adds none; no template begins so
        assert theirs.encode(text).ids == [1, *loaded.encode(text)], text
        behind = theirs.encode(f"a</s>{text}", add_special_tokens=False).ids
        expected = [*loaded.encode("a"), 2, *loaded.encode(text, "special")]
        assert behind == expected, text
        assert theirs.decode([1, *loaded.encode(text)]) == loaded.decode(loaded.encode(text))


def test_added_tokens_are_in_every_file(tmp_path):
    write_tokenizer(tmp_path, ("<im_patch>",))
    files = tokenizer_files(epath.Path(tmp_path))
    files = with_added(files, {"<image>": 513, "<pad>": 514}, pad="<pad>")
    files = with_tokenizer_json(files)
    expected = {"<im_patch>": 512, "<image>": 513, "<pad>": 514}
    assert json.loads(files["added_tokens.json"]) == expected
    assert json.loads(files["special_tokens_map.json"])["pad_token"] == "<pad>"
    config = json.loads(files["tokenizer_config.json"])
    assert {t["content"]: int(id) for id, t in config["added_tokens_decoder"].items()} == {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **expected,
    }
    fast = json.loads(files["tokenizer.json"])
    assert {t["content"]: t["id"] for t in fast["added_tokens"]}.items() >= expected.items()


def test_a_tokenizer_json_that_is_there_gets_the_tokens_too(tmp_path):
    write_tokenizer(tmp_path)
    files = with_tokenizer_json(tokenizer_files(epath.Path(tmp_path)))
    again = with_added(files, {"<image>": 512}, pad="<unk>")
    fast = json.loads(again["tokenizer.json"])
    assert fast["added_tokens"][-1] == {
        "id": 512,
        "content": "<image>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    assert fast["model"] == json.loads(files["tokenizer.json"])["model"]


def test_without_a_tokenizer_nothing_is_invented():
    assert with_tokenizer_json(with_added({}, {"<image>": 512}, pad="<pad>")) == {}
