"""A model's folder to its Tokenizer: which files count, and what each of them says."""

import json
import os
from typing import Any

from llava_jax import files
from llava_jax.tokenizer.ids import HuggingFace, SentencePiece, Tokenizer

_FEWEST_IDS = 32  # fewer cannot spell: transformers makes 3-token files out of a wrong call


def load(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model's folder, local or in a bucket."""
    folder = files.path(folder)
    if not folder.is_dir():
        raise ValueError(f"got {folder}, expected a folder with a tokenizer in it")
    config = _read_json(folder / "tokenizer_config.json")
    names = _read_json(folder / "special_tokens_map.json")
    names |= {key: value for key, value in config.items() if value is not None}
    if (folder / "tokenizer.model").exists():
        tokenizer = _load_sentencepiece(folder, config, names)
    elif (folder / "tokenizer.json").exists():
        tokenizer = _load_hugging_face(folder, config, names)
    else:
        raise ValueError(
            f"got {folder} with neither tokenizer.model nor tokenizer.json, expected one of them: "
            "copy the tokenizer files of the model's repository there"
        )
    if tokenizer.num_ids < _FEWEST_IDS:
        raise ValueError(
            f"got a tokenizer of {tokenizer.num_ids} ids in {folder}, expected one that can spell "
            "(LLaMA's has 32000): copy the model repository's own tokenizer files"
        )
    return tokenizer


def _load_sentencepiece(folder: Any, config: dict, names: dict) -> Tokenizer:
    file = folder / "tokenizer.model"
    proto = file.read_bytes()
    try:
        model = SentencePiece(proto)
    except RuntimeError as error:
        raise ValueError(
            f"got {file} of {len(proto)} bytes beginning with {proto[:20]!r}, expected a whole "
            "sentencepiece model (LLaMA's has 499723 bytes): fetch the file again"
        ) from error
    processor = model.processor
    if (got := processor.normalize(" a  b")) != "▁a▁▁b":
        raise ValueError(
            f"got {file}, which reads ' a  b' as {got!r}, expected '▁a▁▁b' as LLaMA's does: is "
            "the file complete, and a LLaMA tokenizer?"
        )
    ids = {name: getattr(processor, f"{name}_id")() for name in ("unk", "bos", "eos")}
    if absent := [name for name, id in ids.items() if id < 0]:
        raise ValueError(f"got {file} without {absent[0]}, expected unk, bos and eos as in LLaMA's")
    specials = {processor.id_to_piece(id): id for id in ids.values()}
    specials |= _added_tokens(folder, config)
    return Tokenizer(
        model=model,
        vocab_size=processor.get_piece_size(),
        specials=specials,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unk"],
        pad_id=specials.get(_content(names.get("pad_token")) or "", ids["unk"]),
        # Folders older than the flag are of the time when there was only this behaviour.
        legacy=config.get("legacy") is not False,
        adds_bos=config.get("add_bos_token") is not False,
    )


def _load_hugging_face(folder: Any, config: dict, names: dict) -> Tokenizer:
    file = folder / "tokenizer.json"
    spec = _read_json(file)
    specials = _token_list(file, spec)
    bos, eos, unk, pad = (
        specials.get(_content(names.get(f"{name}_token")) or "")
        for name in ("bos", "eos", "unk", "pad")
    )
    if eos is None:
        raise ValueError(
            f"got {folder} with eos_token {names.get('eos_token')!r}, expected the name of one of "
            "tokenizer.json's added_tokens in tokenizer_config.json: answers must end"
        )
    try:
        model = HuggingFace(json.dumps(spec))
    except ValueError:
        raise
    except Exception as error:  # the library's own kind, without a name
        raise ValueError(f"got {file}: {error}; expected a tokenizer.json of tokenizers") from error
    return Tokenizer(
        model=model,
        vocab_size=model.vocab_size,
        specials=specials,
        bos_id=bos,
        eos_id=eos,
        unk_id=unk,
        pad_id=next(id for id in (pad, unk, eos) if id is not None),
        legacy=model.prefixes_behind(_content(names["eos_token"]) or ""),
        adds_bos=bos is not None and config.get("add_bos_token", model.begins_with(bos)),
    )


def _read_json(file: Any) -> dict:
    """What a JSON file holds; nothing, if there is none."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"got {file}, which is no JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"got {file} with a {type(value).__name__}, expected an object: {{…}}")
    return value


def _content(token: Any) -> str | None:
    """The name of a token that is written as a text, or as an object with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(folder: Any, config: dict) -> dict[str, int]:
    """Named tokens beside a tokenizer.model, from wherever the folder tells of them."""
    file = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise ValueError(f"got added_tokens_decoder {decoder!r} in {file}, expected an object")
    found = _ids(file, [(_content(token), id) for id, token in decoder.items()])
    file = folder / "added_tokens.json"
    for name, id in _ids(file, list(_read_json(file).items())).items():
        if found.setdefault(name, id) != id:
            raise ValueError(
                f"got id {id} for {name} in {file}, expected {found[name]} as in "
                "tokenizer_config.json: one of the two belongs to another model"
            )
    if not found:
        file = folder / "tokenizer.json"
        found = _token_list(file, _read_json(file))
    return found


def _token_list(file: Any, spec: dict) -> dict[str, int]:
    pairs = []
    for token in spec.get("added_tokens", []):
        pairs.append((_content(token), token.get("id") if isinstance(token, dict) else None))
    return _ids(file, pairs)


def _ids(file: Any, pairs: list[tuple[Any, Any]]) -> dict[str, int]:
    for name, id in pairs:
        if not isinstance(name, str) or not name or not str(id).isdecimal():
            raise ValueError(
                f"got token {name!r} with id {id!r} in {file}, expected a name and an id"
            )
    return {name: int(id) for name, id in pairs}
