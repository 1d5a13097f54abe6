"""Conversations: the text of each template, what of it is learned, and dialogues that are refused.

Ids and masks of the reference are in test_tokenizer.py.
"""

import itertools
import json
import pickle
import re

import pytest

from llava_jax.conversation import (
    TEMPLATES,
    UNFINISHED,
    Piece,
    Refused,
    Turn,
    gpt,
    human,
    parse,
    pieces,
    template,
)

TWO_ROUNDS = (human("Where?", images=1), gpt("Here."), human("Why?"), gpt("So."))
TAGS = {"image": "<image>", "bos": "<s>", "eos": "</s>"}


def written(parts: list[Piece]) -> str:
    """One text of it all; «what is learned» in brackets."""
    text = ""
    for part in parts:
        words = TAGS.get(part.kind, part.text)
        text += f"«{words}»" if part.supervised else words
    return text.replace("»«", "")


CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)
LLAMA_2 = (
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language.\n<</SYS>>\n\n<image>\nWhere? [/INST]"
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "v1",
            CURIOUS.format("user") + " USER: <image>\nWhere? ASSISTANT:« Here.</s>»"
            "USER: Why? ASSISTANT:« So.</s>»",
        ),
        (
            "v0",
            CURIOUS.format("human") + "\n\n«###» Human: <image>\nWhere?\n«### Assistant: Here.\n"
            "###» Human: Why?\n«### Assistant: So.\n### »",
        ),
        (
            "llava_v0",
            CURIOUS.format("human") + "###Human: <image>\nWhere?###Assistant:« Here.###»"
            "Human: Why?###Assistant:« So.###»",
        ),
        ("llava_llama_2", LLAMA_2 + "« Here. </s>»<s>[INST] Why? [/INST]« So. </s>»"),
    ],
)
def test_what_a_template_says_and_teaches(name, text):
    assert written(pieces(TWO_ROUNDS, template(name))) == text


def test_captions():
    turns = (human("Describe it.", images=1), gpt("a dog"))
    assert written(pieces(turns, template("plain"))) == "<image>«a dog\n»"
    assert written(pieces((turns[0], UNFINISHED), template("plain"))) == "<image>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_how_the_training_text_begins(name):
    prompt = written(pieces((TWO_ROUNDS[0], UNFINISHED), TEMPLATES[name]))
    text = written(pieces(TWO_ROUNDS[:2], TEMPLATES[name]))
    bare, bare_text = (re.sub("[«»]", "", t) for t in (prompt, text))
    assert bare_text.startswith(bare)
    assert bare_text[len(bare) :].strip().startswith("Here.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_supervised_alike_is_one_piece(name):
    turns = TWO_ROUNDS[:2] if name == "plain" else TWO_ROUNDS
    kinds = [(part.kind, part.supervised) for part in pieces(turns, TEMPLATES[name])]
    assert all(a != b or a[0] != "text" for a, b in itertools.pairwise(kinds))


@pytest.mark.parametrize(
    ("value", "changes", "question"),
    [
        ("<image>\nWhere?", {}, "<image>\nWhere?"),
        ("Where?\n<image>", {}, "<image>\nWhere?"),
        ("  In <image> where? ", {}, "<image>\nIn  where?"),
        ("<image>", {}, "<image>"),
        ("<image> and <image>: where?", {}, "<image>\n<image>\nand : where?"),
        ("<image><image>", {}, "<image>\n<image>"),
        ("  In <image> where? ", {"image_at": "as_written"}, "  In <image> where? "),
        ("<image>a<image>b", {"image_at": "as_written"}, "<image>a<image>b"),
        ("a <image>", {"start_end_tokens": True}, "<im_start><image><im_end>\na"),
        (
            "a <image><image>",
            {"start_end_tokens": True, "image_at": "as_written"},
            "a <im_start><image><im_end><im_start><image><im_end>",
        ),
    ],
)
def test_where_images_stand(value, changes, question):
    turns = parse([{"from": "human", "value": value}], images=value.count("<image>"))
    text = written(pieces(turns, template("v1", system="", **changes)))
    assert text == f" USER: {question} "


@pytest.mark.parametrize(
    ("value", "image_last", "question"),
    [
        ("Where?", False, "<image>\nWhere?"),
        ("Where?", True, "Where?\n<image>"),
        ("", True, "<image>"),
    ],
)
def test_the_papers_draw_is_for_the_first_question(value, image_last, question):
    turns = (human(value, images=1), gpt("a"), human("b", images=1))
    text = written(
        pieces(turns, template("v1", system="", image_at="random"), image_last=image_last)
    )
    assert text == f" USER: {question} ASSISTANT:« a</s>»USER: <image>\nb "


def test_two_images_at_the_end():
    turns = (human("a", images=2),)
    how = template("v1", system="", image_at="random")
    assert written(pieces(turns, how, image_last=True)) == " USER: a\n<image>\n<image> "


def test_the_draw_is_asked_for_and_only_then():
    turns = (human("a"),)
    with pytest.raises(ValueError, match="image_last None with image_at 'random'"):
        pieces(turns, template("v1", image_at="random"))
    with pytest.raises(ValueError, match="image_last True with image_at 'first'"):
        pieces(turns, template("v1"), image_last=True)


def test_words_of_the_template_typed_by_a_user_are_words():
    turns = (human("{system} {} </s> <image>"), gpt("{system}"))
    text = written(pieces(turns, template("v1", system="Be {kind}.")))
    assert text == "Be {kind}. USER: {system} {} </s> <image> ASSISTANT:« {system}</s>»"
    kinds = [part.kind for part in pieces(turns, template("v1"))]
    assert kinds == ["text", "text", "eos"]


@pytest.mark.parametrize("trusted", [False, True])
def test_pieces_say_whether_specials_may_be_typed(trusted):
    for part in pieces(TWO_ROUNDS, template("v1", typed_specials=trusted)):
        assert part.parses == (trusted and part.kind == "text")


def test_images_say_how_the_text_goes_on():
    def image(**changes):
        return next(p for p in pieces(TWO_ROUNDS, template("v1", **changes)) if p.kind == "image")

    assert image().restarts
    assert not image(text_restarts=False).restarts


def test_empty_answers():
    turns = (human("a"), gpt(""), human("b"), gpt("c"))
    text = written(pieces(turns, template("v1", system="")))
    assert text == " USER: a ASSISTANT:USER: b ASSISTANT:« c</s>»"
    text = written(pieces(turns, template("v0", system="")))
    assert text.startswith("\n\n«###» Human: a\n«### Assistant: \n###» Human: b")


def test_an_answer_to_nothing():
    turns = (gpt("Hi."), *TWO_ROUNDS)
    assert pieces(turns, template("v1")) == pieces(TWO_ROUNDS, template("v1"))
    text = written(pieces(turns, template("v0", system="")))
    assert text.startswith("\n\n«### Assistant: Hi.\n###» Human: ")


HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
ONE_IMAGE = {"from": "human", "value": "<image>\na"}


@pytest.mark.parametrize(
    ("conversations", "images", "says"),
    [
        ([], 0, "got no turns"),
        ("hello", 0, "got conversations of type str, expected a list"),
        ({"from": "human"}, 0, "got conversations of type dict"),
        (None, 0, "NoneType"),
        ([HUMAN, "b"], 0, "turn 2: got 'b'"),
        ([{"from": "system", "value": "a"}, HUMAN, GPT], 0, "turn 1: got from 'system'"),
        ([{"value": "a"}], 0, "turn 1: got from None"),
        ([{"from": "human"}], 0, "turn 1: got value None, expected a text"),
        ([{"from": "human", "value": 3}], 0, "got value 3"),
        ([HUMAN, HUMAN, GPT], 0, "turn 2: got human again, expected gpt"),
        ([HUMAN, GPT, GPT], 0, "turn 3: got gpt again, expected human"),
        ([GPT], 0, "got only an answer"),
        ([{"from": "human", "value": " \n"}, GPT], 0, "turn 1: got an empty question"),
        ([HUMAN, GPT], 1, "got 0 <image> in the text for 1 images"),
        ([ONE_IMAGE, GPT], 0, "got 1 <image> in the text for 0 images"),
        ([ONE_IMAGE, GPT, ONE_IMAGE], 1, "got 2 <image> in the text for 1 images"),
        ([HUMAN, {"from": "gpt", "value": "<image>"}], 1, "turn 2: got <image> in an answer"),
        ([{"from": "x" * 500, "value": ""}], 0, "…, expected 'human' or 'gpt'"),
    ],
)
def test_bad_dialogues(conversations, images, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        parse(conversations, images)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("turns", "name", "says"),
    [
        ((), "v1", "got no turns"),
        ((human("a"), UNFINISHED, human("b")), "v1", "turn 2: got an unfinished answer"),
        ((human("a"), Turn("gpt", ("", "b"))), "v1", "turn 2: got <image> in an answer"),
        (TWO_ROUNDS, "plain", "got 4 turns for template 'plain'"),
        ((human("a"), gpt("b")), "plain", "got a question without <image>"),
    ],
)
def test_turns_a_template_refuses(turns, name, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        pieces(turns, template(name))


@pytest.mark.parametrize("texts", [("a\ud83d",), ("", "\nb \udc00"), ("\udcff", "x")])
def test_half_a_character_is_no_text(texts):
    for turns in ([Turn("human", texts)], [human("Hi"), Turn("gpt", ("".join(texts),))]):
        with pytest.raises(Refused, match=rf"turn {len(turns)}: .*half a character") as caught:
            pieces(turns, template("v1"))
        assert caught.value.kind == "text is not Unicode"
        str(caught.value).encode()
    whole = json.loads('"\\ud83d\\ude00 \\u0000 \\uffff"')  # json.dumps writes 😀 as two halves
    assert pieces([human(whole)], template("v1"))


def test_half_a_character_is_shown_where_it_is():
    with pytest.raises(Refused) as caught:
        pieces([human("a" * 500 + "\ud83d" + "b" * 500)], template("v1"))
    said = str(caught.value)
    assert r"aaa\ud83dbbb" in said
    assert len(said) < 120


def test_a_refusal_can_be_written_whatever_it_quotes():
    said = Refused("kind", "got \ud83d and é😀")
    assert str(said) == r"got \ud83d and é😀"
    assert str(pickle.loads(pickle.dumps(said))) == str(said)


def test_templates_by_name():
    with pytest.raises(ValueError, match=r"got template 'v7', expected one of v0, llava_v0, v1,"):
        template("v7")
    with pytest.raises(ValueError, match=r"got 'sistem' for template v1, expected one of .*system"):
        template("v1", sistem="")
    with pytest.raises(ValueError, match="got image_at 'middle', expected 'first'"):
        template("v1", image_at="middle")
