"""Dialogues to ids and labels the plain way: the whole text first, then tokenised, then searched.

Written from how the reference is described to behave, without a line of the package. A text is
joined from (words, learned?) pairs; what is no text stands in it as one character of a private
plane. A token is learned if its first byte is.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import sentencepiece

IMAGE_ID = -200
_PLANE = 0xF0000


def mark(id: int) -> str:
    """The character that stands for a token."""
    return chr(_PLANE + id)


IMAGE = "\ue000"
BOS, EOS = mark(1), mark(2)
_MARKS = f"[{IMAGE}{chr(_PLANE)}-{chr(0x10FFFD)}]"

Spelled = list[tuple[str, bool]]


class Row(NamedTuple):
    """The settings of one golden row, with the defaults that most rows have."""

    template: str
    conversations: Sequence[dict[str, Any]]
    system: str
    legacy: bool
    names: dict[str, int]  # special tokens; those of the vocabulary included
    start_end_tokens: bool = False
    image_at: str = "first"
    image_last: bool = False
    text_restarts: bool = True
    typed_specials: bool = False


def curious(who: str) -> str:
    return (
        f"A chat between a curious {who} and an artificial intelligence assistant. The assistant "
        f"gives helpful, detailed, and polite answers to the {who}'s questions."
    )


SYSTEMS = {
    "v0": curious("human"),
    "llava_v0": curious("human"),
    "v1": curious("user"),
    "llava_llama_2": (
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using "
        "natural language."
    ),
    "plain": "",
}
STOPS = {"v0": "###", "llava_v0": "###", "v1": "</s>", "llava_llama_2": "</s>", "plain": "\n"}


def spell(row: Row) -> Spelled:
    """The whole text of a row's dialogue."""
    turns: list[tuple[str, str | None]] = []
    last = row.image_last
    for turn in row.conversations:
        words = turn["value"]
        if words is not None:
            words = words.replace("<image>", IMAGE)
            if row.typed_specials:
                for name in sorted(row.names, key=len, reverse=True):
                    words = words.replace(name, mark(row.names[name]))
            if turn["from"] == "human" and row.template == "plain":
                words = IMAGE * words.count(IMAGE)
            elif turn["from"] == "human" and IMAGE in words and row.image_at != "as_written":
                words = _moved(words, last)
            if row.start_end_tokens:
                around = (mark(row.names[name]) for name in ("<im_start>", "<im_end>"))
                words = words.replace(IMAGE, IMAGE.join(around))
        if turn["from"] == "human":
            last = False
        turns.append((turn["from"], words))
    if turns[0][0] == "gpt" and "v0" not in row.template:
        turns = turns[1:]
    return list(_WRITERS[row.template](row.system, turns))


def _moved(words: str, last: bool) -> str:
    images = "\n".join(IMAGE * words.count(IMAGE))
    bare = words.replace(IMAGE, "").strip()
    return (f"{bare}\n{images}" if last else f"{images}\n{bare}").strip()


def _v0(system: str, turns: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, bool]]:
    yield f"{system}\n\n", False
    for side, words in turns:
        if side == "human":
            yield "###", True
            yield f" Human: {words}\n", False
        else:
            yield "### Assistant:", True
            if words is not None:
                yield f" {words}\n", True
    if turns[-1][1] is not None:
        yield "### ", True


def _llava_v0(system: str, turns: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, bool]]:
    yield f"{system}###", False
    for side, words in turns:
        if side == "human":
            yield f"Human: {words}###", False
        else:
            yield "Assistant:", True
            if words is not None:
                yield f" {words}###", True


def _v1(system: str, turns: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, bool]]:
    yield f"{system} ", False
    for side, words in turns:
        if side == "human":
            yield f"USER: {words} ", False
        else:
            yield "ASSISTANT:", False
            if words:
                yield f" {words}{EOS}", True


def _llama_2(system: str, turns: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, bool]]:
    front = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
    for side, words in turns:
        if side == "human":
            yield f"{front}{words} [/INST]", False
            front = f"{BOS}[INST] "
        elif words:
            yield f" {words} {EOS}", True


def _plain(system: str, turns: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, bool]]:
    for side, words in turns:
        if side == "human":
            yield f"{words}", False
        elif words is not None:
            yield f"{words}\n", True


_WRITERS = {
    "v0": _v0,
    "llava_v0": _llava_v0,
    "v1": _v1,
    "llava_llama_2": _llama_2,
    "plain": _plain,
}


def written(row: Row) -> str:
    """The text for people: names in place of marks, «what is learned» in brackets."""
    names = {mark(id): name for name, id in row.names.items()} | {IMAGE: "<image>"}
    text = ""
    for words, learned in spell(row):
        words = re.sub(_MARKS, lambda found: names[found[0]], words)
        text += f"«{words}»" if learned and words else words
    return text.replace("»«", "")


def ids_and_labels(
    row: Row, processor: sentencepiece.SentencePieceProcessor
) -> tuple[list[int], list[int]]:
    """An image is one id. Labels are the ids, and -100 where nothing is learned."""
    spelled = spell(row)
    text = "".join(words for words, _ in spelled)
    learned = [yes for words, yes in spelled for _ in words]
    ids, labels = [1], [-100]
    prefix = True
    for found in re.finditer(f"{_MARKS}|(?:(?!{_MARKS}).)+", text, re.DOTALL):
        part = found[0]
        if re.match(_MARKS, part):
            new = [(IMAGE_ID if part == IMAGE else ord(part) - _PLANE, 0)]
            prefix = row.legacy or (part == IMAGE and row.text_restarts)
        else:
            new = _tokens(processor, part, prefix)
        for id, place in new:
            ids.append(id)
            labels.append(id if learned[found.start() + place] and id != IMAGE_ID else -100)
    return ids, labels


def _tokens(
    processor: sentencepiece.SentencePieceProcessor, text: str, prefix: bool
) -> Iterable[tuple[int, int]]:
    """Ids of a text and the character each begins with; a ▁ put in front begins with the first."""
    text = text.replace("▁", " ")
    shown = " " + text if prefix else text
    ids = processor.encode("\n" + shown)[2:]  # behind ▁ and a line break nothing is put in front
    starts = [at for at, letter in enumerate(text) for _ in letter.encode()]
    at = -1 if prefix else 0
    out = []
    for id in ids:
        out.append((id, starts[max(at, 0)]))
        piece = processor.id_to_piece(id)
        at += 1 if processor.is_byte(id) else len(piece.replace("▁", " ").encode())
    assert at == len(starts), f"the ids of {text!r} do not add up to it"
    return out


class Cut(NamedTuple):
    ids: list[int]
    labels: list[int]
    cut_turns: int
    cut_tokens: int
    dropped: bool


def cut(
    row: Row,
    processor: sentencepiece.SentencePieceProcessor,
    *,
    max_tokens: int,
    tokens_per_image: int,
    too_long: str,
) -> Cut:
    """What is left of a dialogue in `max_tokens`, each image counting as its features."""

    def size(ids: Sequence[int]) -> int:
        return sum(tokens_per_image if id == IMAGE_ID else 1 for id in ids)

    turns = list(row.conversations)
    wanted = [len(turns)]
    ids, labels, kept = [], [], 0
    if too_long == "cut_turns":
        wanted += [n for n in range(len(turns) - 1, 1, -1) if turns[n - 1]["from"] == "gpt"]
    for kept in wanted:
        ids, labels = ids_and_labels(row._replace(conversations=turns[:kept]), processor)
        if size(ids) <= max_tokens:
            return Cut(ids, labels, len(turns) - kept, 0, False)
    end = len(ids)
    while size(ids[:end]) > max_tokens:
        end -= 1
    if too_long == "drop" or all(label == -100 for label in labels[:end]):
        return Cut([], [], 0, 0, True)
    return Cut(ids[:end], labels[:end], len(turns) - kept, size(ids) - size(ids[:end]), False)
