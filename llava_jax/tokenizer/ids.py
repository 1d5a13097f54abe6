"""A tokenizer: text to ids and back, knowing what came before. Two kinds of files can be behind it.

LLaMA's tokenizer.model is read with sentencepiece itself: transformers 5 differs from what the
released weights were trained with (leading spaces). A Hugging Face tokenizer.json serves where
there is no tokenizer.model.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import sentencepiece

# What comes before a text: nothing, a special token, or more text of which it is the rest.
After = Literal["start", "special", "text"]


class Model(Protocol):
    """Plain text to ids and back. No special token is ever found in a text.

    prefix: with the ▁ in front of the text that this kind of tokenizer puts there, if it does.
    """

    def encode(self, text: str, *, prefix: bool) -> list[int]: ...
    def decode(self, ids: list[int], *, prefix: bool) -> str: ...
    def piece(self, id: int) -> str | bytes: ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """vocab_size: ids of the original vocabulary. added: ids of the tokens that came later.

    specials: every named token, those of the original vocabulary (<s>, </s>, <unk>) included.
    legacy: whether a text behind a special token gets a ▁ in front, as any other text does.
    """

    model: Model
    vocab_size: int
    specials: Mapping[str, int]
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int
    legacy: bool
    adds_bos: bool = True

    @property
    def added(self) -> dict[str, int]:
        return {name: id for name, id in self.specials.items() if id >= self.vocab_size}

    @property
    def num_ids(self) -> int:
        """One more than the largest id."""
        return max([self.vocab_size, *(id + 1 for id in self.specials.values())])

    def id(self, name: str) -> int:
        if name not in self.specials:
            raise ValueError(
                f"the tokenizer has no token {name!r}; expected one of "
                f"{', '.join(self.specials)}: is this the tokenizer of the model's own folder?"
            )
        return self.specials[name]

    def encode(self, text: str, after: After = "start", *, parses: bool = False) -> list[int]:
        """Ids of a text, without BOS. parses: special tokens spelled out in it become their ids."""
        return self.encode_next(text, after, parses)[0]

    def encode_next(self, text: str, after: After, parses: bool) -> tuple[list[int], After]:
        """Ids of a text, and what the text that follows it comes after."""
        parts = re.split(self._any_special, text) if parses else [text]
        ids: list[int] = []
        for part in parts:
            if parses and part in self.specials:
                ids.append(self.specials[part])
                after = "special"
            elif part:
                ids += self.model.encode(part, prefix=self._prefixes(after))
                after = "text"
        return ids, after

    @functools.cached_property
    def _any_special(self) -> str:
        # Where several fit, the longest.
        names = sorted(self.specials, key=len, reverse=True)
        return f"({'|'.join(map(re.escape, names))})"

    def _prefixes(self, after: After) -> bool:
        return after == "start" or (after == "special" and self.legacy)

    def decode(self, ids: Sequence[int], after: After = "start", *, specials: bool = False) -> str:
        """Text of ids; special tokens are left out, or spelled. after="text" keeps a leading space.

        An unfinished character at the end gives U+FFFD.
        """
        names = {id: name for name, id in self.specials.items()}
        text = ""
        for special, run in itertools.groupby(map(int, ids), lambda id: id in names):
            if special:
                text += "".join(names[id] for id in run) if specials else ""
                after = "special"
                continue
            run = list(run)
            if wrong := [id for id in run if not 0 <= id < self.vocab_size]:
                raise ValueError(f"got id {wrong[0]}, expected 0 to {self.num_ids - 1}")
            text += self.model.decode(run, prefix=self._prefixes(after))
            after = "text"
        return text

    def piece(self, id: int) -> str | bytes:
        """How an id is spelled, for people: '▁the', '<0x0A>', '</s>'; bytes where it works so."""
        named = next((name for name, other in self.specials.items() if other == id), None)
        return self.model.piece(id) if named is None else named


class SentencePiece:
    """A tokenizer.model. Pickles by its bytes, for worker processes."""

    # Protocol buffers that follow each other merge: this one says add_dummy_prefix = false, so
    # that a text can continue another. The prefix is put there by hand where it belongs.
    _NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, proto: bytes):
        self._proto = proto
        as_it_is = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._prefix = " " if as_it_is.normalize("a") == "▁a" else ""
        self.processor = sentencepiece.SentencePieceProcessor(
            model_proto=proto + self._NO_DUMMY_PREFIX
        )

    def __reduce__(self):
        return (SentencePiece, (self._proto,))

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        return self.processor.encode(self._prefix + text if prefix else text)

    def decode(self, ids: list[int], *, prefix: bool) -> str:
        text = self.processor.decode(ids)
        return text.removeprefix(self._prefix) if prefix else text

    def piece(self, id: int) -> str:
        return self.processor.id_to_piece(id)


class HuggingFace:
    """A tokenizer.json. Pickles by its text, for worker processes."""

    def __init__(self, spec: str):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise ValueError(
                "got a folder with a tokenizer.json and no tokenizer.model: reading it needs one "
                "more package; run pip install tokenizers"
            ) from error
        self._spec = spec
        data = json.loads(spec)
        for token in data.get("added_tokens", ()):
            token["special"] = True  # one switch then turns the search for all of them off
        self._starting = tokenizers.Tokenizer.from_str(json.dumps(data))
        self._continuing = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(data)))
        self._whole = tokenizers.Tokenizer.from_str(spec)
        for tokenizer in (self._starting, self._continuing, self._whole):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        for tokenizer in (self._starting, self._continuing):
            tokenizer.encode_special_tokens = True
        self._anchor = self.encode("a", prefix=False)
        self._prefix = " " if self._anchor != self.encode("a", prefix=True) else ""
        self.vocab_size: int = self._whole.get_vocab_size(with_added_tokens=False)
        self._in_bytes = '"type": "ByteLevel"' in json.dumps(data.get("decoder"))

    def __reduce__(self):
        return (HuggingFace, (self._spec,))

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        tokenizer = self._starting if prefix else self._continuing
        return tokenizer.encode(text, add_special_tokens=False).ids

    def prefixes_behind(self, name: str) -> bool:
        """Whether a text behind the special token `name` is read as though it stood alone."""
        behind = self._whole.encode(name + "a", add_special_tokens=False).ids[1:]
        return behind == self.encode("a", prefix=True)

    def begins_with(self, id: int) -> bool:
        """Whether it puts `id` in front of what it encodes, when asked for special tokens."""
        return self._whole.encode("a").ids[:1] == [id]

    def decode(self, ids: list[int], *, prefix: bool) -> str:
        # Decoders strip a leading space. With an id in front, the text's own is not leading.
        front = self._continuing.decode(self._anchor)
        text = self._continuing.decode([*self._anchor, *ids]).removeprefix(front)
        return text.removeprefix(self._prefix) if prefix else text

    def piece(self, id: int) -> str | bytes:
        spelled = self._whole.id_to_token(id) or ""
        return bytes(map(_LETTER_BYTES.__getitem__, spelled)) if self._in_bytes else spelled


# How tokenizers of bytes spell them: a printable one as itself, the others in order from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_LETTER_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(256)) - {*_PRINTABLE}))
}


def _without_prefix(spec: Any) -> Any:
    """A tokenizer.json, or a part of one, that puts no space in front of a text."""
    if isinstance(spec, list):
        kept = (part for part in spec if not _is(part, "Prepend"))
        return [_without_prefix(part) for part in kept]
    if not isinstance(spec, dict):
        return spec
    spec = {key: None if _is(part, "Prepend") else part for key, part in spec.items()}
    if _is(spec, "Metaspace"):
        spec |= {"prepend_scheme": "never"}
    if _is(spec, "ByteLevel"):
        spec |= {"add_prefix_space": False}
    steps = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
    return spec | {key: _without_prefix(spec[key]) for key in steps if key in spec}


def _is(spec: Any, kind: str) -> bool:
    return isinstance(spec, dict) and spec.get("type") == kind
