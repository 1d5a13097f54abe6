"""An entry of a source to the ids a model learns from: the same for preparation, rows and pages.

Nothing is lost silently. What cannot be learned from is Refused, with a kind; what is repaired by a
rule is noted, by a name to count it by.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax import conversation, tokenizer
from llava_jax.conversation import Refused, Template, Turn
from llava_jax.data.entry import Entry
from llava_jax.tokenizer import IMAGE, Tokenizer, TooLong

RENDERING = 1  # raised when the same settings come to give other ids: part of the fingerprint

LEADING_ANSWER = "an answer before any question, left out"
EMPTY_ANSWER = "an empty answer, nothing learned from it"
TYPED_SPECIAL = "special tokens spelled out, kept as text"
TYPED_ROLE = "role words of the template, kept as text"
CUT_TURNS = "too long, turns at the end left out"
CUT_TOKENS = "too long, the end cut off"


@dataclasses.dataclass(frozen=True)
class Example:
    """ids: IMAGE stands for a picture. pictures: how many of the entry's are left, from the front.

    tokens: with the pictures' features counted. notes: what was repaired.
    """

    ids: Sequence[int]
    mask: Sequence[bool]
    tokens: int
    pictures: int
    turns: int
    notes: tuple[str, ...] = ()

    @property
    def learned(self) -> int:
        return sum(self.mask)


class Question(NamedTuple):
    """ids: up to where the answer begins, IMAGE for each picture."""

    ids: list[int]
    text: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Renderer:
    """All that decides which ids an entry becomes. max_images: picture slots of a row."""

    tokenizer: Tokenizer
    tokenizer_digest: str
    template: Template
    tokens_per_image: int
    max_tokens: int
    max_images: int
    too_long: TooLong
    seed: int

    def __call__(self, entry: Entry) -> Example:
        parsed = conversation.parse(entry.conversations, len(entry.pictures))
        # Blanks alone are no answer: a model would learn to say nothing.
        turns = [
            conversation.gpt("") if turn.role == "gpt" and not turn.texts[0].strip() else turn
            for turn in parsed
        ]
        fitted = tokenizer.fit(
            self.tokenizer,
            turns,
            self.template,
            max_tokens=self.max_tokens,
            tokens_per_image=self.tokens_per_image,
            too_long=self.too_long,
            image_last=self._image_last(entry.id),
        )
        if fitted.dropped:
            raise Refused("too long", f"expected at most {self.max_tokens} tokens")
        if not any(fitted.mask):
            raise Refused("nothing to learn", "got no answer with words in it, expected one")
        pictures = fitted.ids.count(IMAGE)
        if pictures > self.max_images:
            raise Refused(
                "too many images",
                f"got {pictures} images, expected at most {self.max_images}: raise "
                "config.batch.images",
            )
        notes = list(self._repairs(turns))
        notes += [CUT_TURNS] * bool(fitted.cut_turns) + [CUT_TOKENS] * bool(fitted.cut_tokens)
        return Example(
            ids=fitted.ids,
            mask=fitted.mask,
            tokens=len(fitted.ids) + pictures * (self.tokens_per_image - 1),
            pictures=pictures,
            turns=len(turns) - fitted.cut_turns,
            notes=tuple(notes),
        )

    def question(self, entry: Entry) -> Question:
        """The entry's first question, to be answered by a model."""
        turns = conversation.parse(entry.conversations, len(entry.pictures))
        while turns[0].role != "human":
            turns = turns[1:]
        asked, answer = turns[:2]
        pieces = conversation.pieces(
            [asked, conversation.UNFINISHED], self.template, image_last=self._image_last(entry.id)
        )
        ids, _ = tokenizer.render(self.tokenizer, pieces)
        return Question(ids, conversation.IMAGE_TAG.join(asked.texts), answer.texts[0])

    def _image_last(self, id: str) -> bool | None:
        """The paper's draw, the same in every epoch, whatever else the mixture holds."""
        if self.template.image_at != "random":
            return None
        return bool(hashlib.sha256(f"{self.seed}/{id}".encode()).digest()[0] & 1)

    def _repairs(self, turns: Sequence[Turn]) -> Iterator[str]:
        if turns[0].role == "gpt" and not self.template.keeps_leading_gpt:
            yield LEADING_ANSWER
        if any(turn.role == "gpt" and turn.texts == ("",) for turn in turns):
            yield EMPTY_ANSWER
        text = "\n".join(text for turn in turns for text in turn.texts)
        if not self.template.typed_specials and any(map(text.__contains__, self._specials)):
            yield TYPED_SPECIAL
        if any(map(text.__contains__, self._role_words)):
            yield TYPED_ROLE

    @functools.cached_property
    def _specials(self) -> list[str]:
        return [name for name in self.tokenizer.specials if name != conversation.IMAGE_TAG]

    @functools.cached_property
    def _role_words(self) -> list[str]:
        pieces = (*self.template.first_human, *self.template.human, *self.template.gpt)
        words = {piece.text.strip() for piece in pieces}
        # Without letters it is a mark such as ###, which ScienceQA's own answers have.
        return sorted(word for word in words if any(map(str.isalpha, word)))

    def settings(self) -> Mapping[str, Any]:
        """For the fingerprint: plain values, by name."""
        return {
            "tokenizer": self.tokenizer_digest,
            "template": dataclasses.asdict(self.template),
            "tokens of an image": self.tokens_per_image,
            "tokens of a conversation": self.max_tokens,
            "images of a row": self.max_images,
            "too long": self.too_long,
            "seed": self.seed if self.template.image_at == "random" else None,
            "version of the rendering": RENDERING,
        }
