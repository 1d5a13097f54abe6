"""Added tokens written into a tokenizer's files, all of which may say what they are."""

import json
from collections.abc import Mapping
from typing import Any


def with_added(
    tokenizer: Mapping[str, bytes], added: Mapping[str, int], *, pad: str
) -> dict[str, bytes]:
    """The files with these special tokens, and `pad` to fill with, for Hugging Face's loaders.
    Without a tokenizer there is nothing to add to."""
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
        "pad_token": pad,
        "padding_side": "left",  # a batch of prompts ends together
        "processor_class": "LlavaProcessor",
    }
    for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        config.setdefault(name, token)
    special = {**_read(tokenizer, "special_tokens_map.json"), "pad_token": pad}
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
