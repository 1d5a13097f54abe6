"""A LLaMA-like sentencepiece tokenizer of a few hundred ids, trained in a fraction of a second."""

import functools
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# <unk> <s> </s>, the bytes and the letters take about 360 ids; merges fill what is left.
SMALLEST, LARGEST = 384, 2000

_WORDS = (
    "A chat between curious human user assistant USER: ASSISTANT: Human: ### INST the picture "
    "shows boat boats lantern ladder goose geese red green blue bicycle harbour what is how many "
    "describe unusual answer question yes no left right of on and two three helpful detailed "
    "polite gives artificial intelligence image Ünder été señor"
).split()


@functools.cache
def model_bytes(vocab_size: int = 512) -> bytes:
    """A sentencepiece model file with exactly `vocab_size` ids: unk 0, bos 1, eos 2, no pad.

    Trained as LLaMA's was: BPE, text taken as it is, unknown characters as bytes, digits apart.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ValueError(f"got vocab_size {vocab_size}, expected {SMALLEST} to {LARGEST}")
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-()[]/:#<>"
    lines = [" ".join(rng.choices(_WORDS, k=12)) for _ in range(300)]
    lines += ["".join(rng.choices(letters, k=8)) for _ in range(600)]
    lines += [" ".join(letters)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines),
        model_writer=file,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=True,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


def write_tokenizer(
    folder: Path, added: Sequence[str] = (), *, vocab_size: int = 512, legacy: bool = False
) -> dict[str, int]:
    """Writes the tokenizer files of a released LLaVA into `folder`; the ids of `added`, by name.

    Added tokens take the ids behind the vocabulary, in order, as <image> 32000 and <pad> 32001 do
    in llava-hf's folders, and <im_patch> 32000, <im_start> 32001, <im_end> 32002 in LLaVA v1's.
    Padding is <pad> or [PAD] if added, else <unk>.
    """
    ids = {name: vocab_size + i for i, name in enumerate(added)}
    pad = next((name for name in ("<pad>", "[PAD]") if name in ids), "<unk>")

    def flags(name: str) -> dict:
        return {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }

    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(id): {**flags(name), "special": True}
            for name, id in {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}.items()
        },
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": legacy,
        "model_max_length": 2048,
        "pad_token": pad,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    special = {
        "bos_token": flags("<s>"),
        "eos_token": flags("</s>"),
        "pad_token": flags(pad),
        "unk_token": flags("<unk>"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_bytes(vocab_size))
    for name, value in (("tokenizer_config", config), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2))
    if ids:
        (folder / "added_tokens.json").write_text(json.dumps(ids, indent=2))
    return ids
