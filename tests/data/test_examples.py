"""An entry to what is learned: what is refused, what is repaired, and by which name."""

import dataclasses

import pytest

from llava_jax.conversation import Refused, template
from llava_jax.data import examples
from llava_jax.data.entry import Entry
from llava_jax.data.examples import Renderer
from llava_jax.tokenizer import load
from tests import tiny_tokenizer
from tests.data.small import conversation


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write_tokenizer(folder)
    return Renderer(
        tokenizer=load(folder),
        tokenizer_digest="",
        template=template("v1"),
        tokens_per_image=4,
        max_tokens=120,
        max_images=3,
        too_long="cut_turns",
        seed=1,
    )


def entry(*texts: str, pictures: int = 0, id: str = "a") -> Entry:
    return Entry(id, conversation(*texts), (None,) * pictures)  # pyright: ignore


def with_template(renderer: Renderer, name: str = "v1", **changes) -> Renderer:
    return dataclasses.replace(renderer, template=template(name, **changes))


def test_what_an_example_counts(renderer):
    example = renderer(entry("<image>\nWhat is unusual?", "The boat.", pictures=1))
    ids = renderer.tokenizer.encode(" The boat.", "text")
    assert example.learned == len(ids) + 1  # and the end
    assert example.tokens == len(example.ids) + 3
    assert (example.pictures, example.turns, example.notes) == (1, 2, ())


ROUND = ("what is the boat?", "the boat is red.")


@pytest.mark.parametrize(
    ("texts", "pictures", "kind"),
    [
        (("<image>\nq",), 1, "nothing to learn"),
        (("q", ""), 0, "nothing to learn"),
        (("q", " \n "), 0, "nothing to learn"),
        (("q", "a"), 1, "image without <image>"),
        (("<image>q", "a"), 0, "<image> without an image"),
        (("q", "<image> a"), 1, "<image> in an answer"),
        (("  ", "a"), 0, "empty question"),
        ((), 0, "no turns"),
        (("<image>" * 4 + "q", "a"), 4, "too many images"),
        (("<image>" * 3 + "boat " * 100, "a"), 3, "too long"),
    ],
)
def test_what_is_refused(renderer, texts, pictures, kind):
    with pytest.raises(Refused) as error:
        renderer(entry(*texts, pictures=pictures))
    assert error.value.kind == kind
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("texts", "notes"),
    [
        (ROUND * 9, (examples.CUT_TURNS,)),
        ((ROUND[0], "the boat is red. " * 20), (examples.CUT_TOKENS,)),
        ((*ROUND, "and?", ""), (examples.EMPTY_ANSWER,)),
        ((*ROUND, "and?", " \n"), (examples.EMPTY_ANSWER,)),
        (("what does </s> do?", "it ends."), (examples.TYPED_SPECIAL,)),
        (("what?", "it says USER: boat"), (examples.TYPED_ROLE,)),
        (("user: what?", "ASSISTANT says </s>"), (examples.TYPED_SPECIAL,)),
    ],
)
def test_what_is_repaired(renderer, texts, notes):
    example = renderer(entry(*texts))
    assert example.notes == notes
    assert example.tokens <= renderer.max_tokens
    assert example.learned > 0


def test_blanks_are_learned_no_more_than_nothing(renderer):
    nothing, blanks = (renderer(entry(*ROUND, "and?", answer)) for answer in ("", " \n"))
    assert blanks == nothing


def test_marks_without_letters_are_no_role_words(renderer):
    asks = with_template(renderer, "v0")
    assert asks(entry("what?", "SOLUTION: two\n###\nANSWER: A.")).notes == ()
    assert asks(entry("what?", "### Human: why?")).notes == (examples.TYPED_ROLE,)


def test_an_answer_before_any_question(renderer):
    turns = [{"from": "gpt", "value": "Hello"}, *conversation(*ROUND)]
    assert renderer(Entry("a", turns, ())).notes == (examples.LEADING_ANSWER,)
    assert with_template(renderer, "v0")(Entry("a", turns, ())).notes == ()  # v0 keeps it


def test_trusted_specials_are_no_repair(renderer):
    trusting = with_template(renderer, typed_specials=True)
    assert trusting(entry("what does </s> do?", "it ends.")).notes == ()


def test_cut_turns_take_their_pictures_along(renderer):
    texts = ("<image>\n" + ROUND[0], ROUND[1]) * 2
    first = renderer(entry(*texts[:2], pictures=1))
    short = dataclasses.replace(renderer, max_tokens=first.tokens + 10)
    example = short(entry(*texts, pictures=2))
    assert (example.pictures, example.turns, example.ids) == (1, 2, first.ids)


def test_the_papers_draw_is_one_for_each_conversation(renderer):
    drawing = with_template(renderer, image_at="random")
    turns = ("<image>\nwhat is red?", "boat")
    firsts = [drawing(entry(*turns, pictures=1, id=f"e{n}")).ids for n in range(40)]
    again = [drawing(entry(*turns, pictures=1, id=f"e{n}")).ids for n in range(40)]
    assert firsts == again
    places = [list(ids).index(-200) for ids in firsts]
    assert 10 < places.count(min(places)) < 30
    other = dataclasses.replace(drawing, seed=2)
    assert [other(entry(*turns, pictures=1, id=f"e{n}")).ids for n in range(40)] != firsts


def test_settings_tell_renderers_apart(renderer):
    said = renderer.settings()
    assert said == dataclasses.replace(renderer, seed=9).settings()  # nothing is drawn
    for change in (
        {"tokenizer_digest": "x"},
        {"template": template("v0")},
        {"template": template("v1", image_at="as_written")},
        {"tokens_per_image": 9},
        {"max_tokens": 60},
        {"max_images": 1},
        {"too_long": "drop"},
    ):
        assert dataclasses.replace(renderer, **change).settings() != said
    drawing = with_template(renderer, image_at="random")
    assert drawing.settings() != dataclasses.replace(drawing, seed=9).settings()
