"""Rendering on a tiny tokenizer: ids as of the whole text, masks that need no searching."""

import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from llava_jax import files
from llava_jax.batch import ROW_END, TEXT
from llava_jax.conversation import TEMPLATES, UNFINISHED, Turn, gpt, human, pieces, template
from llava_jax.tokenizer import IMAGE, Tokenizer, expand, fit, load, render, splice
from tests.tiny_tokenizer import model_bytes, write_tokenizer

ADDED = ("<im_start>", "<im_end>")


@pytest.fixture(scope="module", params=[False, True], ids=["legacy=false", "legacy=true"])
def tiny(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder, ADDED, legacy=request.param)
    return load(folder)


def by_recipe(text: str, legacy: bool) -> list[int]:
    """The reference's ids of a text with <image>, </s> and the like spelled out, in one go."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes())
    names = {"<s>": 1, "</s>": 2, "<im_start>": 512, "<im_end>": 513}
    behind = processor.encode("\n")

    def without_prefix(part: str) -> list[int]:
        return processor.encode("\n" + part)[len(behind) :]

    ids = [1]
    for number, cut in enumerate(text.split("<image>")):
        ids += [IMAGE] if number else []
        for place, part in enumerate(re.split("(</?s>|<im_start>|<im_end>)", cut)):
            if part in names:
                ids.append(names[part])
            elif part:
                ids += processor.encode(part) if legacy or place == 0 else without_prefix(part)
    return ids


def words(rng: random.Random) -> str:
    parts = ["boat", " ", "  ", "\n", "a", "B", "37", "###", ":", "雪", "▁", "ASSISTANT:", "é"]
    return "".join(rng.choices(parts, k=rng.randrange(1, 9)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_piece_by_piece_is_the_whole_text(tiny, name):
    rng = random.Random(0)
    how = template(name, image_at="as_written", start_end_tokens=name == "v1")
    tags = {"image": "<image>", "bos": "<s>", "eos": "</s>"}
    for _ in range(150):
        images = rng.randrange(1 if name == "plain" else 0, 3)
        texts = tuple(words(rng) for _ in range(images + 1))
        turns = [Turn("human", ("x" + texts[0], *texts[1:])), gpt(words(rng))]
        if name != "plain" and rng.random() < 0.5:
            turns += [human("x" + words(rng)), gpt(words(rng))]
        parts = pieces(turns, how)
        text = "".join(tags.get(part.kind, part.text) for part in parts)
        ids, mask = render(tiny, parts)
        assert ids == by_recipe(text, tiny.legacy), text
        assert len(ids) == len(mask)
        assert not any(yes for id, yes in zip(ids, mask, strict=True) if id == IMAGE)


def test_what_is_learned(tiny):
    def learned(turns, how) -> list[int]:
        ids, mask = render(tiny, pieces(turns, how))
        return [id for id, yes in zip(ids, mask, strict=True) if yes]

    answer = "USER: boat ASSISTANT: goose"
    turns = (human("Where?", images=1), gpt(answer), human("So?"), gpt("雪"))
    first, second = (tiny.encode(text, "text") for text in (" " + answer, " 雪"))
    assert learned(turns, template("v1")) == [*first, 2, *second, 2]
    assert learned(turns[:2], template("plain")) == tiny.encode(answer + "\n", "start")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_how_the_training_ids_begin(tiny, name):
    question = human("What is it?", images=1)
    prompt, mask = render(tiny, pieces((question, UNFINISHED), TEMPLATES[name]))
    ids, learned = render(tiny, pieces((question, gpt("boat")), TEMPLATES[name]))
    assert ids[: len(prompt)] == prompt
    assert learned[: len(prompt)] == mask
    assert all(learned[len(prompt) :])


def test_the_text_behind_an_image(tiny):
    def behind(**changes) -> list[int]:
        ids, _ = render(tiny, pieces((human("", 1), UNFINISHED), template("v1", **changes)))
        return ids[ids.index(IMAGE) + 1 :]

    chunk = tiny.encode(" ASSISTANT:", "start")
    one_pass = tiny.encode(" ASSISTANT:", "text")
    assert chunk != one_pass
    assert behind() == chunk
    # Then an image is like any special token, behind which a legacy tokenizer starts anew.
    assert behind(text_restarts=False) == (chunk if tiny.legacy else one_pass)


def test_specials_typed_by_a_user_are_text(tiny):
    text = "a</s><im_start> <unk><s>"
    assert not {0, 1, 2, 512, 513} & set(tiny.encode(text))
    assert tiny.decode(tiny.encode(text)) == text
    assert not {0, 2, 512} & set(render(tiny, pieces((human(text),), template("v1")))[0])

    parsed = tiny.encode(text, parses=True)
    space = tiny.encode(" ", "special")
    assert parsed == [*tiny.encode("a"), 2, 512, *space, 0, 1]
    trusted, _ = render(tiny, pieces((human(text),), template("v1", typed_specials=True)))
    assert trusted[-len(tiny.encode(" ", "special")) - 1] == 1
    assert {0, 1, 2, 512} <= set(trusted)


def test_what_stands_before_a_text(tiny):
    assert tiny.encode("boat", "start") == tiny.encode(" boat", "text")
    assert tiny.encode("boat", "text") != tiny.encode("boat", "start")
    assert tiny.encode("boat", "special") == tiny.encode("boat", "start" if tiny.legacy else "text")
    assert tiny.encode("a▁b") == tiny.encode("a b")
    assert [tiny.encode("", after) for after in ("start", "special", "text")] == [[], [], []]


def test_decoding(tiny):
    for text in ("boat", " boat", "  a  ", "a\nb", "雪 ☂️", "", "▁"):
        assert tiny.decode(tiny.encode(text)) == text.replace("▁", " ")
        assert tiny.decode(tiny.encode(text, "text"), "text") == text.replace("▁", " ")
    snow = tiny.encode("雪", "text")
    assert len(snow) == 3
    assert tiny.decode(snow[:2], "text").count("\N{REPLACEMENT CHARACTER}") >= 1
    ids = [1, *tiny.encode("a"), 2, 512, *tiny.encode("b", "special")]
    assert tiny.decode(ids, "start", specials=True).replace(" ", "") == "<s>a</s><im_start>b"
    assert tiny.decode(np.array(ids)[1:3]) == "a"
    for wrong in (514, -1, IMAGE):
        with pytest.raises(ValueError, match=f"got id {wrong}, expected 0 to 513"):
            tiny.decode([wrong])


def test_pickling_keeps_the_ids(tiny):
    again = pickle.loads(pickle.dumps(tiny))
    for after in ("start", "special", "text"):
        assert again.encode("boat </s>", after) == tiny.encode("boat </s>", after)
    assert again.decode([400, 401]) == tiny.decode([400, 401])


@pytest.mark.parametrize("place", [str, Path, files.path])
def test_any_kind_of_path(tmp_path, place):
    write_tokenizer(tmp_path)
    assert load(place(str(tmp_path))).encode("a")


# --- images in their places ---


def test_expanding():
    ids, mask = [1, IMAGE, 7, IMAGE, IMAGE, 8, 2], [False] * 5 + [True] * 2
    token_T, mask_T, index_T = expand(ids, mask, 3)
    assert token_T.tolist() == [1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 8, 2]
    assert index_T.tolist() == [-1, 0, 1, 2, -1, 3, 4, 5, 6, 7, 8, -1, -1]
    assert mask_T.tolist() == [False] * 11 + [True] * 2
    assert (token_T.dtype, mask_T.dtype, index_T.dtype) == (np.int32, bool, np.int32)
    token_T, mask_T, index_T = expand([5, 6], [True, False], 3)
    assert (token_T.tolist(), mask_T.tolist(), index_T.tolist()) == (
        [5, 6],
        [True, False],
        [TEXT, TEXT],
    )


def test_images_of_different_lengths():
    images = [np.array([4, ROW_END]), np.array([0, 1, 2])]
    token_T, mask_T, index_T = splice([IMAGE, 9, IMAGE], [False, True, False], images)
    assert index_T.tolist() == [4, ROW_END, TEXT, 0, 1, 2]
    assert token_T.tolist() == [0, 0, 9, 0, 0, 0]
    assert mask_T.tolist() == [False, False, True, False, False, False]
    with pytest.raises(ValueError, match="got 2 image placeholders for 1 images"):
        splice([IMAGE, 9, IMAGE], [False, True, False], images[:1])


# --- what does not fit ---

LONG = (human("a", images=1), gpt("b"), human("c", images=1), gpt("d"), human("e"), gpt("f"))
V1 = template("v1", system="")


def length(tokenizer, turns, how=V1) -> int:
    return len(expand(*render(tokenizer, pieces(turns, how)), 10)[0])


@pytest.mark.parametrize(
    ("turns", "room", "policy", "cut_turns", "kept"),
    [
        (LONG, 0, "cut_turns", 0, 6),
        (LONG, -1, "cut_turns", 2, 4),
        (LONG[:5], -1, "cut_turns", 1, 4),
        ((gpt("x"), *LONG[:4]), -1, "cut_turns", 2, 3),
        (LONG, 0, "drop", 0, 6),
        (LONG, 0, "cut_tokens", 0, 6),
    ],
)
def test_rounds_that_fit(tiny, turns, room, policy, cut_turns, kept):
    most = length(tiny, turns) + room
    got = fit(tiny, turns, V1, max_tokens=most, tokens_per_image=10, too_long=policy)
    ids, mask = render(tiny, pieces(turns[:kept], V1))
    assert got == (ids, mask, cut_turns, 0, False)


@pytest.mark.parametrize("policy", ["cut_turns", "cut_tokens"])
@pytest.mark.parametrize("before", [(), (gpt("x"),)])
def test_tokens_that_fit(tiny, policy, before):
    turns = (*before, human("a", images=1), gpt("boat goose"))
    ids, mask = render(tiny, pieces(turns, V1))
    most = length(tiny, turns)
    options = {"tokens_per_image": 10, "too_long": policy}
    got = fit(tiny, turns, V1, max_tokens=most - 2, **options)
    assert got == (ids[:-2], mask[:-2], 0, 2, False)
    # Nothing learned is left, and then nothing.
    for fewer in (most - sum(mask), 1, 0):
        assert fit(tiny, turns, V1, max_tokens=fewer, **options) == ([], [], 0, 0, True)


def test_a_cut_goes_between_images(tiny):
    before = length(tiny, LONG[:2])
    got = fit(tiny, LONG, V1, max_tokens=before + 10, tokens_per_image=10, too_long="cut_tokens")
    assert got.ids.count(IMAGE) == 1
    assert length(tiny, LONG) - got.cut_tokens == len(expand(got.ids, got.mask, 10)[0])
    assert before <= len(expand(got.ids, got.mask, 10)[0]) < before + 10


def test_dropping(tiny):
    most = length(tiny, LONG) - 1
    got = fit(tiny, LONG, V1, max_tokens=most, tokens_per_image=10, too_long="drop")
    assert got == ([], [], 0, 0, True)
    with pytest.raises(ValueError, match="got too_long 'zero', expected 'cut_turns'"):
        fit(tiny, LONG, V1, max_tokens=9, tokens_per_image=1, too_long="zero")  # pyright: ignore


def fit_turn_by_turn(tokenizer, turns, how, most, features, image_last):
    """What cut_turns means, one rendering for every round that goes: cut turns, tokens that fit."""
    kept = list(turns)
    while True:
        ids, mask = render(tokenizer, pieces(kept, how, image_last=image_last))
        tokens = sum(features if id == IMAGE else 1 for id in ids)
        if tokens <= most or len(kept) <= 2 + (kept[0].role == "gpt"):
            break
        del kept[-1 if kept[-1].role == "human" else -2 :]
    fits = len(ids)
    while tokens > most:
        fits -= 1
        tokens -= features if ids[fits] == IMAGE else 1
    if fits < len(ids) and not any(mask[:fits]):
        return [], [], 0, 0, True
    cut = sum(features if id == IMAGE else 1 for id in ids[fits:])
    return ids[:fits], mask[:fits], len(turns) - len(kept), cut, False


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_rounds_that_fit_are_those_found_one_by_one(tiny, name):
    rng = random.Random(1)
    hows = [template(name, image_at=at) for at in ("first", "as_written", "random")]
    hows += [template(name, system="", start_end_tokens=True, typed_specials=True)]
    seen = set()
    for _ in range(250):
        how = rng.choice(hows)
        rounds = 1 if name == "plain" else rng.randrange(1, 9)
        turns = [gpt(words(rng))] if rng.random() < 0.3 and name != "plain" else []
        for _ in range(rounds):
            images = rng.randrange(1 if name == "plain" else 0, 3)
            texts = tuple(words(rng) for _ in range(images + 1))
            turns += [Turn("human", ("x" + texts[0], *texts[1:]))]
            turns += [gpt(rng.choice(["", "</s>", words(rng)]))]
        if rng.random() < 0.3 and name != "plain":
            turns.append(human("x" + words(rng)))
        features = rng.randrange(1, 40)
        last = rng.random() < 0.5 if how.image_at == "random" else None
        whole = render(tiny, pieces(turns, how, image_last=last))[0]
        longest = sum(features if id == IMAGE else 1 for id in whole)
        most = rng.randrange(longest + 5)
        got = fit(
            tiny,
            turns,
            how,
            max_tokens=most,
            tokens_per_image=features,
            too_long="cut_turns",
            image_last=last,
        )
        assert got == fit_turn_by_turn(tiny, turns, how, most, features, last)
        seen.add((got.cut_turns > 0, got.cut_tokens > 0, got.dropped))
    assert len(seen) >= (3 if name == "plain" else 4), seen


def test_a_thousand_rounds_are_cut_in_a_few_renderings(tiny, monkeypatch):
    turns = [turn for n in range(1000) for turn in (human(f"a{n}"), gpt(f"b{n}"))]
    rendered = []

    def counting(turns, *args, **options):
        rendered.append(len(turns))
        return pieces(turns, *args, **options)

    monkeypatch.setattr("llava_jax.conversation.pieces", counting)
    got = fit(tiny, turns, V1, max_tokens=300, tokens_per_image=1, too_long="cut_turns")
    assert 1900 < got.cut_turns < 2000
    assert sum(rendered) < 3 * len(turns)
