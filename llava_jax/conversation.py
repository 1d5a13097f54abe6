"""Conversations as text: turns go in, pieces of (text, supervised?) come out. Pure strings.

A template is data: the words between the turns, and which of them a model learns to say. Training,
evaluation, chat and the server build their text here and nowhere else, so none can drift away
from what the weights were trained on.

    >>> turns = [human("What is unusual?", images=1), UNFINISHED]
    >>> pieces(turns, template("v1"))     # text, image, text: a prompt ending in "ASSISTANT:"

Special tokens (end of answer, <im_start>, …) are pieces of their own kind. Text is only ever text:
a user who types </s> gets four characters, unless `typed_specials` trusts the data.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

IMAGE_TAG = "<image>"  # marks a picture's place in LLaVA's JSON files
IM_START, IM_END = "<im_start>", "<im_end>"

Kind = Literal["text", "token", "bos", "eos", "image"]
Role = Literal["human", "gpt"]


class Piece(NamedTuple):
    """kind 'text': words. 'token': the added token called `text`. 'bos', 'eos', 'image': no text.

    parses: whether special tokens spelled out in a text become their ids.
    restarts: whether the text behind an image is tokenised as if it began there (▁ in front).
    """

    kind: Kind
    text: str = ""
    supervised: bool = False
    parses: bool = False
    restarts: bool = True


class Turn(NamedTuple):
    """What one side says. An image stands between each two `texts`: ("", "\\nHi") = image, text.

    No texts at all: an answer still to come.
    """

    role: Role
    texts: tuple[str, ...]

    @property
    def images(self) -> int:
        return max(len(self.texts) - 1, 0)


UNFINISHED = Turn("gpt", ())


class Refused(ValueError):
    """A conversation that nothing can be learned from, or not what was meant. kind: to count by."""

    def __init__(self, kind: str, message: str):
        # Half a character, by \ud83d in JSON, could not be written to a log or a report.
        super().__init__(message.encode(errors="backslashreplace").decode())
        self.kind = kind

    def __reduce__(self):
        return Refused, (self.kind, str(self))


def human(text: str, images: int = 0) -> Turn:
    """A question about `images` pictures, which stand in front of it."""
    return Turn("human", _images_first(text, images) if images else (text,))


def gpt(text: str) -> Turn:
    return Turn("gpt", (text,))


@dataclasses.dataclass(frozen=True)
class Template:
    """The words around turns, what is learned of them, and how a variant differs from others.

    A conversation reads: begins (human… human_ends gpt answer_starts… answer_ends)* ends. The
    first human turn has `first_human` in front instead of `human`. "{system}" stands for the
    system sentence.
    """

    name: str
    system: str
    begins: tuple[Piece, ...]
    first_human: tuple[Piece, ...]
    human: tuple[Piece, ...]
    human_ends: tuple[Piece, ...]
    gpt: tuple[Piece, ...]
    answer_starts: str
    answer_ends: tuple[Piece, ...]
    ends: tuple[Piece, ...]
    stop: tuple[str, ...]  # where generation ends, if the end token has not come before

    keeps_leading_gpt: bool = False  # else an answer to nothing, at the front, is left out
    keeps_questions: bool = True  # else of a human turn only the images stay: captions
    ends_empty_answers: bool = False  # else an empty answer has no end either: nothing to learn

    # How variants of one template differ; the defaults are those of v1.0 and v1.5.
    start_end_tokens: bool = False  # <im_start> and <im_end> around each image
    text_restarts: bool = True  # a lone ▁ behind an image, from tokenising text chunk by chunk
    image_at: Literal["first", "as_written", "random"] = "first"
    typed_specials: bool = False  # "</s>" in the data is the token, as in the reference's training

    def __post_init__(self):
        if self.image_at not in ("first", "as_written", "random"):
            raise ValueError(
                f"got image_at {self.image_at!r}, expected 'first', 'as_written' or 'random'"
            )


def _given(text: str) -> tuple[Piece, ...]:
    return (Piece("text", text),)


def _learned(text: str) -> tuple[Piece, ...]:
    return (Piece("text", text, supervised=True),)


_END = (Piece("eos", supervised=True),)

_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)

_V0 = Template(
    # Learns its role tag and the ### of the next turn: that is how it stops.
    name="v0",
    system=_CURIOUS.format("human"),
    begins=_given("{system}\n\n"),
    first_human=_learned("###") + _given(" Human: "),
    human=_learned("###") + _given(" Human: "),
    human_ends=_given("\n"),
    gpt=_learned("### Assistant:"),
    answer_starts=" ",
    answer_ends=_learned("\n"),
    ends=_learned("### "),
    stop=("###",),
    keeps_leading_gpt=True,
    ends_empty_answers=True,
)

_V1 = Template(
    name="v1",
    system=_CURIOUS.format("user"),
    begins=_given("{system} "),
    first_human=_given("USER: "),
    human=_given("USER: "),
    human_ends=_given(" "),
    gpt=_given("ASSISTANT:"),
    answer_starts=" ",
    answer_ends=_END,
    ends=(),
    stop=("</s>",),
)

_TEMPLATES = (
    _V0,
    # What the reference's chat shows a v0 model, in other words than it was trained on.
    dataclasses.replace(
        _V0,
        name="llava_v0",
        begins=_given("{system}###"),
        first_human=_given("Human: "),
        human=_given("Human: "),
        human_ends=_given("###"),
        gpt=_given("Assistant:"),
        answer_ends=_learned("###"),
        ends=(),
    ),
    _V1,
    Template(
        name="llava_llama_2",
        system=(
            "You are a helpful language and vision assistant. You are able to understand the "
            "visual content that the user provides, and assist the user with a variety of tasks "
            "using natural language."
        ),
        begins=(),
        first_human=_given("[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"),
        human=(Piece("bos"), *_given("[INST] ")),
        human_ends=_given(" [/INST]"),
        gpt=(),
        answer_starts=" ",
        answer_ends=_learned(" ") + _END,
        ends=(),
        stop=("</s>",),
    ),
    Template(
        name="plain",
        system="",
        begins=(),
        first_human=(),
        human=(),
        human_ends=(),
        gpt=(),
        answer_starts="",
        answer_ends=_learned("\n"),
        ends=(),
        stop=("\n",),
        keeps_questions=False,
        ends_empty_answers=True,
    ),
)
TEMPLATES: Mapping[str, Template] = {template.name: template for template in _TEMPLATES}


def template(name: str, **changes: Any) -> Template:
    """The template called `name`, with fields changed: template("v1", image_at="as_written")."""
    if name not in TEMPLATES:
        raise ValueError(f"got template {name!r}, expected one of {', '.join(TEMPLATES)}")
    fields = {field.name for field in dataclasses.fields(Template)}
    if unknown := sorted(changes.keys() - fields):
        raise ValueError(
            f"got {unknown[0]!r} for template {name}, expected one of {', '.join(sorted(fields))}"
        )
    return dataclasses.replace(TEMPLATES[name], **changes)


def parse(conversations: object, images: int) -> tuple[Turn, ...]:
    """Turns of one entry of a LLaVA JSON file, which comes with so many images.

    conversations: [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": "…"}, …]
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise Refused(
            "not a list of turns",
            f"got conversations of type {type(conversations).__name__}, expected a list of turns",
        )
    turns = tuple(_parse_turn(number, turn) for number, turn in enumerate(conversations, 1))
    found = sum(turn.images for turn in turns)
    if found != images:
        raise Refused(
            "<image> without an image" if found > images else "image without <image>",
            f"got {found} {IMAGE_TAG} in the text for {images} images, expected as many",
        )
    _check(turns)
    return turns


def _parse_turn(number: int, turn: object) -> Turn:
    if not isinstance(turn, Mapping):
        raise Refused(
            "turn without from and value",
            f"turn {number}: got {_short(turn)}, expected {{'from': …, 'value': …}}",
        )
    role, value = turn.get("from"), turn.get("value")
    if role not in ("human", "gpt"):
        raise Refused(
            "unknown role",
            f"turn {number}: got from {_short(role)}, expected 'human' or 'gpt'",
        )
    if not isinstance(value, str):
        raise Refused(
            "turn without text", f"turn {number}: got value {_short(value)}, expected a text"
        )
    return Turn(role, tuple(value.split(IMAGE_TAG)))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _check(turns: Sequence[Turn]) -> None:
    if not turns:
        raise Refused("no turns", "got no turns, expected at least one of a human")
    for number, turn in enumerate(turns, 1):
        for text in turn.texts:
            _check_unicode(number, text)
        previous = turns[number - 2].role if number > 1 else None
        if turn.role == previous:
            other = "human" if previous == "gpt" else "gpt"
            raise Refused(
                "same side twice", f"turn {number}: got {turn.role} again, expected {other}"
            )
        if turn.role == "gpt" and turn.images:
            raise Refused(
                "<image> in an answer",
                f"turn {number}: got {IMAGE_TAG} in an answer, expected text",
            )
        if turn.role == "human" and not turn.images and not "".join(turn.texts).strip():
            raise Refused(
                "empty question",
                f"turn {number}: got an empty question, expected words or an image",
            )
        if not turn.texts and number < len(turns):
            raise Refused(
                "unfinished answer",
                f"turn {number}: got an unfinished answer, expected it last",
            )
    if all(turn.role == "gpt" for turn in turns):
        raise Refused("only an answer", "got only an answer (gpt), expected a human turn before it")


def _check_unicode(number: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a tokenizer could do nothing with it
        shown = text[max(error.start - 20, 0) : error.start + 20]
        raise Refused(
            "text is not Unicode",
            f"turn {number}: got {shown!r} with half a character, expected whole ones",
        ) from None


def pieces(
    turns: Sequence[Turn], template: Template, *, image_last: bool | None = None
) -> list[Piece]:
    """The conversation's text; behind UNFINISHED the model goes on.

    image_last: with image_at="random", the draw for this conversation: its first question has the
    images at its end rather than at its front.
    """
    _check(turns)
    if (image_last is None) is (template.image_at == "random"):
        raise ValueError(
            f"got image_last {image_last} with image_at {template.image_at!r}: expected a draw "
            "with 'random', and none otherwise"
        )
    if turns[0].role == "gpt" and not template.keeps_leading_gpt:
        turns = turns[1:]
    if not template.keeps_questions:
        _check_caption(turns, template)
    out: list[Piece] = []
    _add(out, template, _fill(template.begins, template))
    opening = _fill(template.first_human, template)
    for turn in turns:
        if turn.role == "human":
            _add(out, template, opening)
            _add(out, template, _question(turn, template, bool(image_last)))
            _add(out, template, template.human_ends)
            opening, image_last = template.human, False
        else:
            _add(out, template, template.gpt)
            if turn.texts and (turn.texts[0] or template.ends_empty_answers):
                _add(out, template, _learned(template.answer_starts + turn.texts[0]))
                _add(out, template, template.answer_ends)
    if turns[-1].texts:
        _add(out, template, template.ends)
    return out


def _check_caption(turns: Sequence[Turn], template: Template) -> None:
    if len(turns) > 2:
        raise Refused(
            "no caption",
            f"got {len(turns)} turns for template {template.name!r}, expected image, caption",
        )
    if not turns[0].images:
        raise Refused(
            "caption of no image",
            f"got a question without {IMAGE_TAG} for template {template.name!r}, expected an image "
            "(the question's words are not used)",
        )


def _question(turn: Turn, template: Template, image_last: bool) -> Iterable[Piece]:
    texts = turn.texts
    if not template.keeps_questions:
        texts = ("",) * len(texts)
    elif turn.images and template.image_at != "as_written":
        texts = _images_first("".join(texts).strip(), turn.images)
        if image_last:
            words = texts[-1].removeprefix("\n")
            texts = (words + "\n" if words else "", *texts[1:-1], "")
    image = (Piece("image", restarts=template.text_restarts),)
    if template.start_end_tokens:
        image = (Piece("token", IM_START), *image, Piece("token", IM_END))
    yield from _given(texts[0])
    for text in texts[1:]:
        yield from image
        yield from _given(text)


def _images_first(text: str, images: int) -> tuple[str, ...]:
    return ("", *["\n"] * (images - 1), "\n" + text if text else "")


def _fill(parts: Iterable[Piece], template: Template) -> list[Piece]:
    return [part._replace(text=part.text.replace("{system}", template.system)) for part in parts]


def _add(out: list[Piece], template: Template, more: Iterable[Piece]) -> None:
    """Appends pieces. Text supervised alike is joined, because it is tokenised as one."""
    for piece in more:
        if piece.kind != "text":
            out.append(piece)
        elif out and out[-1].kind == "text" and out[-1].supervised == piece.supervised:
            out[-1] = out[-1]._replace(text=out[-1].text + piece.text)
        elif piece.text:
            out.append(piece._replace(parses=template.typed_specials))
