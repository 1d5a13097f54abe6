"""A tokenizer's files for Hugging Face's loaders: added tokens, and tokenizer.json.

transformers 5 reads a LLaVA's tokenizer.json and nothing else, and makes a wrong one out of a
tokenizer.model that stands alone. So it is made here, with the ids that sentencepiece gives.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import sentencepiece


def with_added(
    tokenizer: Mapping[str, bytes], added: Mapping[str, int], *, pad: str | None = None
) -> dict[str, bytes]:
    """The files with these special tokens in them; pad: the one of them all to fill with, if it is
    another than before. Without a tokenizer there is nothing to add to."""
    if not tokenizer.keys() & {"tokenizer.model", "tokenizer.json"}:
        return dict(tokenizer)
    config = _read(tokenizer, "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder") or {
        str(id): _flags(name) for name, id in _read(tokenizer, "added_tokens.json").items()
    }
    config |= {
        "added_tokens_decoder": decoder | {str(id): _flags(name) for name, id in added.items()},
        # transformers 5 writes a class of its own here, which older readers do not know.
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": config.get("add_bos_token", True),
        "add_eos_token": config.get("add_eos_token", False),
        # Absent means the reference's days, when there was no other.
        "legacy": config.get("legacy", True),
    }
    for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        config.setdefault(name, token)
    special = _read(tokenizer, "special_tokens_map.json")
    if pad is not None:
        config["pad_token"] = special["pad_token"] = pad
    tokens = {**_read(tokenizer, "added_tokens.json"), **added}
    files = dict(tokenizer)
    files["tokenizer_config.json"] = _written(config)
    files["special_tokens_map.json"] = _written(special)
    files["added_tokens.json"] = _written(tokens)
    if "tokenizer.json" in files:
        fast = _read(tokenizer, "tokenizer.json")
        known = [t for t in fast.get("added_tokens", []) if t["content"] not in added]
        new = [{"id": id, **_flags(name)} for name, id in added.items()]
        files["tokenizer.json"] = _written({**fast, "added_tokens": known + new})
    return files


def _flags(name: str) -> dict[str, Any]:
    return {
        "content": name,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return json.loads(files[name]) if name in files else {}


def _written(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def for_hugging_face(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files as its loaders want them: the processor named, and a tokenizer.json."""
    if not files:
        return {}
    config = _read(files, "tokenizer_config.json") | {
        "padding_side": "left",  # a batch of prompts ends together
        "processor_class": "LlavaProcessor",
    }
    return with_tokenizer_json({**files, "tokenizer_config.json": _written(config)})


def with_tokenizer_json(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files with a tokenizer.json, made from tokenizer.model where there is none."""
    if "tokenizer.json" in files or "tokenizer.model" not in files:
        return dict(files)
    model = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    config = _read(files, "tokenizer_config.json")
    names = {model.id_to_piece(i): i for i in (model.unk_id(), model.bos_id(), model.eos_id())}
    for id, flags in config.get("added_tokens_decoder", {}).items():
        names[flags["content"]] = int(id)
    names |= _read(files, "added_tokens.json")
    legacy = config.get("legacy", True)
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, **_flags(name)} for name, id in sorted(names.items(), key=lambda x: x[1])
        ],
        **(_PREFIX_EVERYWHERE if legacy else _PREFIX_AT_THE_START),
        "post_processor": _bos_first(model) if config.get("add_bos_token", True) else None,
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {model.id_to_piece(i): i for i in range(model.get_piece_size())},
            "merges": list(_merges(model)),
        },
    }
    return {**files, "tokenizer.json": _written(fast)}


def prefixes_behind_specials(files: Mapping[str, bytes]) -> bool:
    """Whether a text behind a special token gets a ▁ in front, by what Hugging Face reads."""
    if "tokenizer.json" not in files:
        return _read(files, "tokenizer_config.json").get("legacy", True)
    spec = _read(files, "tokenizer.json")
    written = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return '"Prepend"' in written or '"always"' in written


# Where a text gets its ▁: behind every special token too (legacy), or at its very start only.
_PREFIX_EVERYWHERE: dict[str, Any] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
}
_PREFIX_AT_THE_START: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    },
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def _bos_first(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    bos = model.id_to_piece(model.bos_id())

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
    }


def _merges(model: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """Pairs in the order in which they join: sentencepiece joins what makes the piece of the
    highest score, and pieces were learned in that order."""
    pieces = {
        model.id_to_piece(i): i
        for i in range(model.get_piece_size())
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    for piece in sorted(pieces, key=lambda piece: -model.get_score(pieces[piece])):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
        for left, right in sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]])):
            yield f"{left} {right}"
