"""The tokenizer of the small language model: LLaMA's kind, trained on the world's own words."""

import io
import json
import random
import re
from collections.abc import Iterator

import sentencepiece

from llava_jax.conversation import TEMPLATES
from llava_jax.picture_world import annotations, dialogues
from llava_jax.picture_world.scenes import comparison, generator, scene
from llava_jax.picture_world.towers.notes import notes

IDS = 768
_SCENES = 300
# Apart while pieces are learned, so that "ring" is one piece whatever follows it.
_PUNCTUATION = re.compile(r"([.,?!:;'<>#\n])")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-()[]/:#<>+=\n"


def files() -> dict[str, bytes]:
    """The tokenizer's files of a Hugging Face folder, by name: unk 0, bos 1, eos 2, pad is unk."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(id): {"content": name, **flags, "special": True}
            for id, name in enumerate(("<unk>", "<s>", "</s>"))
        },
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **names,
    }
    return {
        "tokenizer.model": _train(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(names, indent=2) + "\n").encode(),
    }


def _train() -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=(re.sub(" +", " ", _PUNCTUATION.sub(r" \1 ", line)) for line in _lines()),
        model_writer=file,
        model_type="bpe",
        vocab_size=IDS,
        hard_vocab_limit=True,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        # "top-left" is one word.
        split_by_unicode_script=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


def _lines() -> Iterator[str]:
    """The world's texts, the words between turns, the notes, and every letter there is."""
    rng = random.Random(0)
    for name in ("v0", "v1"):
        template = TEMPLATES[name]
        parts = [*template.begins, *template.first_human, *template.human_ends, *template.gpt]
        words = "".join(part.text for part in parts).replace("{system}", template.system)
        yield from [words] * 200
    for index in range(_SCENES):
        one, split = scene(0, "train", index), generator(0, "train", index, "vocabulary")
        yield from annotations.captions(one, split)
        entries = [
            dialogues.conversation("", "", one, split),
            dialogues.detail("", "", one, split),
            dialogues.reasoning("", "", one, split),
            dialogues.comparison("", ["", ""], comparison(0, "train", index)),
        ]
        for entry in entries:
            yield from (turn["value"].removeprefix("<image>\n") for turn in entry["conversations"])
        yield " ".join(word for note in notes(one, split) for word in note)
    for _ in range(60):
        yield " ".join(rng.sample(_LETTERS, len(_LETTERS)))
