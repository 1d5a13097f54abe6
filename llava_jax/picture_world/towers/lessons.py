"""What the small language model reads: chats about scenes that are told in words, no picture.

Most are conversations with a scene's notes (notes.py) where the picture would stand: questions of
every category of which none answers another, captions, descriptions, reasoning. Some tell the scene
in sentences, in an order of their own, in front of the first question. A third are drills: notes,
and triples out of them, "colour cross pink where cross top-left". There what an object is asked by
stands right before what is asked of it; in a question there are words and a turn between the two,
and a small model that reads questions alone goes for thousands of steps without finding that one
has to do with the other (docs/log.md). Every word is learned, answers most.

Dims: R rows, T tokens of a row.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llava_jax import conversation, tokenizer
from llava_jax.batch import PADDING, TEXT, Batch
from llava_jax.conversation import Turn
from llava_jax.picture_world import annotations, dialogues, questions, scenes
from llava_jax.picture_world.questions import Question
from llava_jax.picture_world.scenes import Scene, generator, scene
from llava_jax.picture_world.towers.notes import SIDE, WORDS, Note, notes
from llava_jax.tokenizer import Tokenizer

PLACES = SIDE * SIDE
_ROUNDS = 6
_TRIPLES = 20
_DRILLS = 0.35
# Of the other lessons: conversations, captions, descriptions, reasoning; the rest is in sentences.
_SHARES = (0.72, 0.06, 0.04, 0.08)
_WITH_BLANKS = 0.5
# Weight of the tokens that are no answers: as in any language model's pre-training they count.
_OTHERS = 0.2
_WAITING = 12  # lessons that are at hand to fill a row with


_ATTRIBUTES = {*scenes.COLOURS, *scenes.SHAPES, *scenes.CELLS, *scenes.SIGN_TEXTS}


class Lesson(NamedTuple):
    """token_T, which of them are learned, and which are notes: note 0, 1, …, or TEXT.

    A note's words are in token_T and more_T, two in each: see `paired`.
    """

    token_T: np.ndarray
    mask_T: np.ndarray
    note_T: np.ndarray
    more_T: np.ndarray


def paired(first, second, num_ids: int):
    """Two ids as one number: an id alone is itself, as 0 stands for none."""
    return first + num_ids * second


def apart(pair, num_ids: int):
    return pair % num_ids, pair // num_ids


@dataclasses.dataclass(frozen=True)
class Reader:
    """Scenes to lessons, for one tokenizer."""

    tokenizer: Tokenizer
    max_tokens: int

    def lesson(self, one: Scene, rng: random.Random) -> Lesson:
        """A lesson of a kind that is drawn."""
        if rng.random() < _DRILLS:
            return self.drill(one, rng)
        told = rng.random()
        limits = np.cumsum(_SHARES)
        if told < limits[0]:
            return self.chat(_human_and_gpt(_rounds(one, rng)), self._notes(one, rng))
        if told < limits[1]:
            turns = _human_and_gpt([("", rng.choice(annotations.captions(one, rng)))])
            return self.chat(turns, self._notes(one, rng), "plain")
        if told < limits[2]:
            return self.chat(_turns(dialogues.detail("", "", one, rng)), self._notes(one, rng))
        if told < limits[3]:
            return self.chat(_turns(dialogues.reasoning("", "", one, rng)), self._notes(one, rng))
        return self.chat(_human_and_gpt(_in_sentences(one, rng)))

    def question(self, one: Scene, asked: Question) -> Lesson:
        """One question about a scene's notes, whole ones: the answer is what would be learned."""
        told = notes(one, random.Random(asked.text))
        return self.chat(_human_and_gpt([(asked.text, asked.answer)]), told)

    def drill(self, one: Scene, rng: random.Random) -> Lesson:
        """Notes, then triples out of them; the last word of each is its answer."""
        asked = [
            (id, is_answer)
            for *question, answer in _triples(one, rng)
            for text, is_answer in ((" ".join(question), False), (answer, True))
            for id in self.tokenizer.encode(text)
        ]
        start = 1 + PLACES
        token_T = np.array([self.tokenizer.bos_id, *[0] * PLACES, *(id for id, _ in asked)])
        mask_T = np.array([False] * start + [is_answer for _, is_answer in asked])
        note_T = np.full_like(token_T, TEXT)
        note_T[1:start] = np.arange(PLACES)
        return self._noted(token_T, mask_T, note_T, self._notes(one, rng))

    def chat(
        self, turns: Sequence[Turn], told: Sequence[Note] = (), template: str = "v1"
    ) -> Lesson:
        """Turns as ids; the first begins with the notes, if there are any."""
        if told:
            first = conversation.human(turns[0].texts[0], images=1)
            turns = [first, *turns[1:]]
        fitted = tokenizer.fit(
            self.tokenizer,
            turns,
            conversation.template(template),
            max_tokens=self.max_tokens,
            tokens_per_image=PLACES,
            too_long="cut_turns",
        )
        return self._noted(*tokenizer.expand(fitted.ids, fitted.mask, PLACES), told)

    def _noted(
        self, token_T: np.ndarray, mask_T: np.ndarray, note_T: np.ndarray, told: Sequence[Note]
    ) -> Lesson:
        more_T = np.zeros_like(token_T)
        if told:
            id_PW = np.array([self._ids(note) for note in told])
            num_ids = self.tokenizer.num_ids
            token_T[note_T != TEXT] = paired(id_PW[:, 0], id_PW[:, 1], num_ids)
            more_T[note_T != TEXT] = paired(id_PW[:, 2], id_PW[:, 3], num_ids)
        return Lesson(token_T, mask_T, note_T, more_T)

    def _notes(self, one: Scene, rng: random.Random) -> list[Note]:
        return notes(one, rng, blanks=rng.random() < _WITH_BLANKS)

    def _ids(self, note: Note) -> list[int]:
        ids = [id for word in note for id in self.tokenizer.encode(word)]
        assert len(ids) == len(note), note  # each word is one id
        return [*ids, *[0] * (WORDS - len(ids))]


def batches(reader: Reader, *, seed: int, rows: int, first: int = 0) -> Iterator[Batch]:
    """Rows of lessons about scenes of the train split, `first` and those after it, without end."""
    waiting: list[Lesson] = []
    numbers = itertools.count(first)
    while True:
        batch = empty(rows, reader.max_tokens)
        for row in range(rows):
            end, segment = 0, 0
            while True:
                for number in itertools.islice(numbers, _WAITING - len(waiting)):
                    rng = generator(seed, "train", number, "lesson")
                    waiting.append(reader.lesson(scene(seed, "train", number), rng))
                room = reader.max_tokens - end
                fitting = [place for place, one in enumerate(waiting) if len(one.token_T) <= room]
                if not fitting:
                    break
                # The one that has waited longest, then what leaves the least room.
                place = fitting[0]
                if end:
                    place = max(fitting, key=lambda at: len(waiting[at].token_T))
                lesson, segment = waiting.pop(place), segment + 1
                put(batch, row, end, segment, lesson, others=_OTHERS)
                end += len(lesson.token_T)
        yield batch


def empty(rows: int, tokens: int) -> Batch:
    zeros_RT = np.zeros((rows, tokens), np.int32)
    return Batch(
        token_RT=zeros_RT,
        target_RT=zeros_RT.copy(),
        segment_RT=np.full((rows, tokens), PADDING, np.int32),
        position_RT=zeros_RT.copy(),
        source_RT=zeros_RT.copy(),
        loss_weight_RT=np.zeros((rows, tokens), np.float32),
        pixel_RKHW3=np.zeros((rows, 0, 1, 1, 3), np.uint8),
        image_index_RT=np.full((rows, tokens), TEXT, np.int32),
    )


def put(
    batch: Batch, row: int, start: int, segment: int, lesson: Lesson, *, others: float = 0.0
) -> None:
    """Writes a lesson into a row. others: the weight of what is no answer."""
    stop = start + len(lesson.token_T)
    batch.token_RT[row, start:stop] = lesson.token_T
    batch.target_RT[row, start : stop - 1] = np.where(
        lesson.note_T[1:] == TEXT, lesson.token_T[1:], 0
    )
    batch.segment_RT[row, start:stop] = segment
    batch.position_RT[row, start:stop] = np.arange(stop - start)
    is_text_T = lesson.note_T[1:] == TEXT
    weight_T = np.where(lesson.mask_T[1:], 1.0, others * is_text_T)
    batch.loss_weight_RT[row, start : stop - 1] = weight_T
    batch.image_index_RT[row, start:stop] = lesson.note_T
    batch.source_RT[row, start:stop] = lesson.more_T


def _triples(one: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(what is asked, of what, answer), in any order, of what no other object shares."""
    found = [("shape", cell, "nothing") for cell in one.empty_cells]
    told = [
        {"colour": thing.colour, "shape": thing.shape, "where": thing.cell, "size": thing.size}
        for thing in one.shapes
    ]
    for words in told:
        for by in ("colour", "shape", "where"):
            if sum(other[by] == words[by] for other in told) == 1:
                found += [(what, words[by], answer) for what, answer in words.items() if what != by]
    rng.shuffle(found)
    return found[:_TRIPLES]


Round = tuple[str, str]


def _human_and_gpt(rounds: Sequence[Round]) -> list[Turn]:
    return [
        turn
        for question, answer in rounds
        for turn in (conversation.human(question), conversation.gpt(answer))
    ]


def _turns(entry: dict) -> list[Turn]:
    values = [turn["value"].replace(conversation.IMAGE_TAG, "") for turn in entry["conversations"]]
    return _human_and_gpt([(q.strip(), a) for q, a in zip(values[::2], values[1::2], strict=True)])


def _rounds(one: Scene, rng: random.Random) -> list[Round]:
    """Questions of any category and objects to describe, none of which another one answers: what
    was said before would be copied, and the notes not read."""
    asked = questions.closed(one, rng)
    found = [(question.text, question.answer) for question in asked]
    found += [questions.describe(thing, rng) for thing in one.things]
    rng.shuffle(found)
    kept: list[Round] = []
    for question, answer in found:
        if not any(_tells(before, question, answer) for before in kept):
            kept.append((question, answer))
    return kept[:_ROUNDS]


def _tells(before: Round, question: str, answer: str) -> bool:
    """Whether what was said has something of the answer together with what is asked about."""
    said = _attributes(" ".join(before))
    asked, answered = _attributes(question), _attributes(answer)
    if answered:
        return bool(said & answered) and (not asked or bool(said & asked))
    return len(said & asked) > 1


def _attributes(text: str) -> set[str]:
    words = text.replace(",", " ").replace("?", " ").replace(".", " ").split()
    return _ATTRIBUTES.intersection(words)


def _in_sentences(one: Scene, rng: random.Random) -> list[Round]:
    sentences = annotations.description(one).removesuffix(".").split(". ")
    rng.shuffle(sentences)
    (question, answer), *rounds = _rounds(one, rng)
    return [(f"{'. '.join(sentences)}.\n{question}", answer), *rounds]
