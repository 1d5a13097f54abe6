"""Tokenizers as folders hold them: LLaMA's file, a Hugging Face tokenizer.json, broken ones."""

import json
import pickle
import random
import re
import sys
from pathlib import Path

import pytest

from llava_jax.conversation import UNFINISHED, Piece, gpt, human, pieces, template
from llava_jax.tokenizer import load, render
from tests.tiny_tokenizer import model_bytes, write_tokenizer

V1_ADDED = ("<im_patch>", "<im_start>", "<im_end>")


def change(folder: Path, name: str, **changes) -> None:
    """Fields of a JSON file of the folder; None takes one away."""
    file = folder / name
    value = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))


def test_a_folder_of_llava_hf(tmp_path):
    write_tokenizer(tmp_path, ("<image>", "<pad>"), vocab_size=600)
    tokenizer = load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.num_ids) == (600, 602)
    assert tokenizer.added == {"<image>": 600, "<pad>": 601}
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        0,
        1,
        2,
        601,
    )
    assert (tokenizer.legacy, tokenizer.adds_bos) == (False, True)
    assert [tokenizer.id(name) for name in ("<image>", "</s>")] == [600, 2]
    with pytest.raises(ValueError, match="no token '<im_start>'; expected one of <unk>, <s>"):
        tokenizer.id("<im_start>")


@pytest.mark.parametrize("source", ["tokenizer_config.json", "added_tokens.json", "tokenizer.json"])
def test_added_tokens_wherever_they_are_told(tmp_path, source):
    ids = write_tokenizer(tmp_path, V1_ADDED)
    if source != "tokenizer_config.json":
        change(tmp_path, "tokenizer_config.json", added_tokens_decoder=None)
    if source != "added_tokens.json":
        (tmp_path / "added_tokens.json").unlink()
    if source == "tokenizer.json":
        listed = [{"id": id, "content": name, "special": True} for name, id in ids.items()]
        change(tmp_path, "tokenizer.json", added_tokens=listed)
    assert load(tmp_path).added == {"<im_patch>": 512, "<im_start>": 513, "<im_end>": 514}


def test_a_tokenizer_model_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes())
    tokenizer = load(tmp_path)
    assert (tokenizer.added, tokenizer.num_ids, tokenizer.pad_id) == ({}, 512, 0)
    # What LLaMA's first folders meant, before there was a flag to say it.
    assert (tokenizer.legacy, tokenizer.adds_bos) == (True, True)
    ids, _ = render(tokenizer, [Piece("text", "a")])
    assert ids == [1, *tokenizer.encode("a")]


def test_flags_of_the_config(tmp_path):
    write_tokenizer(tmp_path, ("[PAD]",), legacy=True)
    assert (load(tmp_path).legacy, load(tmp_path).pad_id) == (True, 512)
    change(tmp_path, "tokenizer_config.json", add_bos_token=False, legacy=None, pad_token=None)
    tokenizer = load(tmp_path)
    assert tokenizer.legacy
    assert tokenizer.pad_id == 512  # special_tokens_map.json says so too, as an object
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": null}')
    assert load(tmp_path).pad_id == 512
    assert render(tokenizer, [Piece("text", "a")])[0] == tokenizer.encode("a")


def test_pieces_are_for_people(tmp_path):
    ids = write_tokenizer(tmp_path, ["<im_start>"])
    tokenizer = load(tmp_path)
    spelled = [tokenizer.piece(id) for id in [1, *tokenizer.encode("boat\n雪"), 2, *ids.values()]]
    assert spelled == [*"<s> ▁boat <0x0A> <0xE9> <0x9B> <0xAA> </s> <im_start>".split()]


def test_two_files_that_disagree(tmp_path):
    write_tokenizer(tmp_path, ("<image>",))
    change(tmp_path, "added_tokens.json", **{"<image>": 640})
    with pytest.raises(ValueError, match=r"got id 640 for <image> .*expected 512 as in"):
        load(tmp_path)


# --- tokenizer.json ---

SAMPLES = ["a boat", "boats\n\n", "USER: 37 geese", "雪 ☂️ é", "a  b ", "</s>?", "<image> <s>x"]


def as_json(folder: Path, added=(), *, prefix: str) -> None:
    """Turns the tiny tokenizer's files into a tokenizer.json, as transformers would write it.

    prefix 'first' or 'always': where the ▁ goes, newer folders' way. 'normalizer': the older way.
    """
    transformers = pytest.importorskip("transformers")
    write_tokenizer(folder, added)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    spec = json.loads((folder / "saved/tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": prefix}
    spec["normalizer"], spec["pre_tokenizer"] = None, metaspace
    if prefix == "normalizer":
        steps = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        spec["normalizer"] = {"type": "Sequence", "normalizers": steps}
        spec["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer.model").unlink()


@pytest.mark.parametrize("prefix", ["first", "always", "normalizer"])
def test_a_tokenizer_json_is_the_same_tokenizer(tmp_path, prefix):
    as_json(tmp_path, (*V1_ADDED, "<pad>"), prefix=prefix)
    write_tokenizer(tmp_path / "model", (*V1_ADDED, "<pad>"), legacy=prefix != "first")
    got, expected = load(tmp_path), load(tmp_path / "model")
    for name in "vocab_size num_ids added bos_id eos_id unk_id pad_id legacy adds_bos".split():
        assert getattr(got, name) == getattr(expected, name), name
    for text in SAMPLES:
        for after in ("start", "special", "text"):
            ids = expected.encode(text, after)
            assert got.encode(text, after) == ids
            assert got.encode(text, after, parses=True) == expected.encode(text, after, parses=True)
            assert got.decode(ids, after) == expected.decode(ids, after) == text
            assert list(map(got.piece, ids)) == list(map(expected.piece, ids))
    turns = (human("Where is the boat?", images=1), gpt("Here </s>."), human("Why?"), UNFINISHED)
    for name in ("v0", "v1", "llava_llama_2"):
        parts = pieces(turns, template(name, start_end_tokens=True))
        assert render(got, parts) == render(expected, parts)


def test_a_tokenizer_json_decodes_leading_spaces(tmp_path):
    as_json(tmp_path, prefix="first")
    tokenizer = load(tmp_path)
    spaces = tokenizer.encode("a  boat", "text")[1:]
    assert tokenizer.decode(spaces, "text") == "  boat"
    assert tokenizer.decode(tokenizer.encode("a boat", "text")[1:], "start") == "boat"


def test_a_tokenizer_json_says_itself_whether_bos_comes_first(tmp_path):
    as_json(tmp_path, prefix="first")
    change(tmp_path, "tokenizer_config.json", add_bos_token=None)
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    rest = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    adds = {"type": "TemplateProcessing", "single": [first, rest], "pair": [first, rest]}
    adds["special_tokens"] = {"<s>": bos}
    adds["pair"] = [*adds["pair"], {"Sequence": {"id": "B", "type_id": 1}}]
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for post_processor in (adds, None):
        spec["post_processor"] = post_processor
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        assert load(tmp_path).adds_bos is (post_processor is not None)
    change(tmp_path, "tokenizer_config.json", add_bos_token=True)
    assert load(tmp_path).adds_bos


def test_a_tokenizer_json_with_added_words(tmp_path):
    """Added, but not special: when typed, still text."""
    as_json(tmp_path, ("<im_start>",), prefix="first")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ids = load(tmp_path).encode("a <im_start></s>")
    assert not {2, 512} & set(ids)


def test_the_longest_special_token_counts(tmp_path):
    write_tokenizer(tmp_path, ("<im>", "<im>s"))
    assert load(tmp_path).encode("<im>s<im>", parses=True) == [513, 512]


def test_a_tokenizer_json_pickles(tmp_path):
    as_json(tmp_path, prefix="first")
    tokenizer = load(tmp_path)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert [again.encode(text, "text") for text in SAMPLES] == [
        tokenizer.encode(text, "text") for text in SAMPLES
    ]


def test_bytes_without_a_beginning(tmp_path):
    """The kind of Qwen and GPT: no BOS, no ▁, an end of its own name."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["a boat and a goose"] * 9, trainer)
    made.add_special_tokens(["<|end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    change(tmp_path, "tokenizer_config.json", eos_token="<|end|>")

    tokenizer = load(tmp_path)
    end = tokenizer.vocab_size
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.unk_id) == (None, False, None)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (end, end)
    for text in (*SAMPLES, "<|end|>"):
        for after in ("start", "special", "text"):
            assert tokenizer.decode(tokenizer.encode(" " + text, after), after) == " " + text
        assert end not in tokenizer.encode(text)
        spelled = b"".join(bytes(tokenizer.piece(id)) for id in tokenizer.encode(text))  # pyright: ignore
        assert spelled.decode() == text
    assert tokenizer.piece(end) == "<|end|>"
    turns = (human("a boat"), gpt("a goose"))
    ids, mask = render(tokenizer, pieces(turns, template("v1", system="")))
    assert tokenizer.decode(ids, "text", specials=True) == " USER: a boat ASSISTANT: a goose<|end|>"
    assert ids[-1] == end
    assert mask[-1]
    parts = pieces((*turns, human("a")), template("llava_llama_2"))
    with pytest.raises(ValueError, match="without a token for the beginning of a text"):
        render(tokenizer, parts)


def test_against_transformers(tmp_path):
    """Where version 5 still does as the reference did: texts that do not begin with a space."""
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, V1_ADDED)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load(tmp_path)
    rng = random.Random(0)
    for _ in range(200):
        text = "x" + "".join(rng.choices(["boat", " ", "\n", "雪", "7", "#", "é", "  "], k=8))
        assert theirs.encode(text) == [1, *ours.encode(text)]
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text
        both = f"{text}</s>{text}<im_start>"
        assert theirs.encode(both) == [1, *ours.encode(both, parses=True)]


# --- broken folders ---


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"got .*nowhere, expected a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", model_bytes()[:-1]],
    ids=["empty", "pointer", "page", "truncated"],
)
def test_a_file_that_is_no_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    says = (
        rf"tokenizer\.model of {len(content)} bytes beginning with {re.escape(repr(content[:20]))}"
    )
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


def test_a_model_cut_anywhere_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for size in range(0, len(whole), 11):
        (tmp_path / "tokenizer.model").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            load(tmp_path)


def test_a_model_without_its_rules(tmp_path):
    """Cut between two records, a file still parses; what comes last are the rules for spaces."""
    whole = model_bytes()
    rules = whole.index(b"\x1a", whole.rindex(b"\n\x08identity") - 4)
    (tmp_path / "tokenizer.model").write_bytes(whole[:rules])
    with pytest.raises(ValueError, match="which reads ' a  b' as 'a▁b', expected '▁a▁▁b'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", '{"legacy": fal', r"tokenizer_config\.json, which is no JSON"),
        ("added_tokens.json", '["<image>"]', r"added_tokens\.json with a list, expected an object"),
        ("added_tokens.json", '{"<image>": "x"}', r"token '<image>' with id 'x' in "),
        ("added_tokens.json", '{"": 512}', "token '' with id 512"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}', "token None with id '5'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [5]}', r"added_tokens_decoder \[5\]"),
    ],
)
def test_broken_lists(tmp_path, name, content, says):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    ("spec", "config", "says"),
    [
        ("{", {}, r"tokenizer\.json, which is no JSON"),
        ("{}", {"eos_token": "</s>"}, "eos_token '</s>', expected the name of one of"),
        ('{"added_tokens": ["</s>"]}', {}, "token '</s>' with id None"),
        (
            '{"added_tokens": [{"id": 2, "content": "</s>"}]}',
            {"eos_token": "</s>"},
            r"expected a tokenizer\.json",
        ),
    ],
)
def test_broken_tokenizer_json(tmp_path, spec, config, says):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(spec)
    change(tmp_path, "tokenizer_config.json", **config)
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


def test_three_ids_are_no_vocabulary(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    made.add_special_tokens(list(vocabulary))
    made.save(str(tmp_path / "tokenizer.json"))
    change(tmp_path, "tokenizer_config.json", eos_token={"content": "</s>"}, bos_token="<s>")
    with pytest.raises(ValueError, match="got a tokenizer of 3 ids"):
        load(tmp_path)


def test_a_model_without_bos(tmp_path):
    # Of the trainer's settings (field 2), bos_piece (field 46): a piece that is not there.
    (tmp_path / "tokenizer.model").write_bytes(model_bytes() + b"\x12\x06\xf2\x02\x03<x>")
    with pytest.raises(ValueError, match="without bos, expected unk, bos and eos"):
        load(tmp_path)


def test_a_model_that_puts_nothing_in_front(tmp_path):
    # Of the rules for spaces (field 3), add_dummy_prefix (field 3): false.
    (tmp_path / "tokenizer.model").write_bytes(model_bytes() + b"\x1a\x02\x18\x00")
    tokenizer = load(tmp_path)
    assert tokenizer.encode("boat", "start") == tokenizer.encode("boat", "text")
    assert tokenizer.decode(tokenizer.encode(" boat")) == " boat"


def test_without_the_tokenizers_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 2, "content": "</s>"}]}')
    change(tmp_path, "tokenizer_config.json", eos_token="</s>")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load(tmp_path)
