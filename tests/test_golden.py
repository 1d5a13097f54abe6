"""Golden dialogues of ours: text, ids and masks of every template, prompts, cuts and refusals.

tests/golden/ says where the expectations come from; tests/tokenizer/test_reference.py compares with
the reference's own, where they are at hand.
"""

import json
import pickle
import shutil
from typing import Any

import pytest
import sentencepiece

from llava_jax.conversation import (
    UNFINISHED,
    Piece,
    Refused,
    Turn,
    gpt,
    parse,
    pieces,
    template,
)
from llava_jax.tokenizer import Tokenizer, fit, load, render
from tests.golden import oracle, write

LLAMA_NAMES = {"<unk>": 0, "<s>": 1, "</s>": 2}
LLAMA_ENDS = {"<im_start>": 32000, "<im_end>": 32001}


def golden(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (write.FOLDER / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[bool, Tokenizer]:
    """By the legacy flag."""
    made = {}
    for legacy in (False, True):
        folder = tmp_path_factory.mktemp("golden")
        shutil.copy(write.MODEL, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        added = {name: id for name, id in write.NAMES.items() if id >= 512}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        made[legacy] = load(folder)
    return made


def written(parts: list[Piece], brackets: bool = True) -> str:
    """One text of it all, «what is learned» in brackets."""
    names = {"image": "<image>", "bos": "<s>", "eos": "</s>"}
    text = ""
    for part in parts:
        words = names.get(part.kind, part.text)
        text += f"«{words}»" if part.supervised and brackets else words
    return text.replace("»«", "")


def images_of(row: dict[str, Any]) -> int:
    return sum(turn["value"].count("<image>") for turn in row["conversations"])


def test_dialogues_to_learn_from(tokenizers):
    rows = golden("training.jsonl")
    for row in rows:
        turns = parse(row["conversations"], images_of(row))
        how = template(row["template"], **row["changes"])
        parts = pieces(turns, how, image_last=row.get("image_last"))
        assert written(parts) == row["text"], row["note"]
        ids, mask = render(tokenizers[row["legacy"]], parts)
        assert ids == row["ids"], row["text"]
        labels = [id if yes else -100 for id, yes in zip(ids, mask, strict=True)]
        assert write.runs(labels) == row["learned"], row["text"]
    assert len(rows) == 276


def test_dialogues_that_do_not_fit(tokenizers):
    rows = golden("cuts.jsonl")
    for row in rows:
        got = fit(
            tokenizers[row["legacy"]],
            parse(row["conversations"], images_of(row)),
            template(row["template"], **row["changes"]),
            **{key: row[key] for key in ("max_tokens", "tokens_per_image", "too_long")},
        )
        labels = [id if yes else -100 for id, yes in zip(got.ids, got.mask, strict=True)]
        told = {key: row[key] for key in ("cut_turns", "cut_tokens", "dropped")}
        assert (got.ids, write.runs(labels)) == (row["ids"], row["learned"]), row
        assert {key: getattr(got, key) for key in told} == told, row
    assert len(rows) == 84
    assert {row["dropped"] for row in rows} == {False, True}
    assert any(row["cut_turns"] and row["cut_tokens"] for row in rows)


def asked(conversations: list[dict[str, Any]]) -> list[Turn]:
    turns = []
    for turn in conversations:
        if turn["from"] == "human":
            turns.append(Turn("human", tuple(turn["value"].split("<image>"))))
        else:
            turns.append(UNFINISHED if turn["value"] is None else gpt(turn["value"]))
    return turns


def test_prompts(tokenizers):
    rows = golden("prompts.jsonl")
    for row in rows:
        how = template(row["template"], **row["changes"])
        parts = pieces(asked(row["conversations"]), how)
        assert written(parts, brackets=False) == row["text"], row["note"]
        assert render(tokenizers[row["legacy"]], parts)[0] == row["ids"], row["text"]
        assert how.stop == (row["stop"],)
    assert len(rows) == 77


def test_refusals_have_a_kind_and_a_reason():
    rows = golden("refused.jsonl")
    for row in rows:
        with pytest.raises(Refused) as error:
            turns = parse(row["conversations"], row["images"])
            pieces(turns, template(row.get("template", "v1")))
        assert (error.value.kind, str(error.value)) == (row["kind"], row["says"])
        again = pickle.loads(pickle.dumps(error.value))  # workers are processes
        assert (again.kind, str(again)) == (row["kind"], row["says"])
    assert len({row["kind"] for row in rows}) == 14


# --- the golden files themselves ---


def test_the_files_are_what_the_oracles_say():
    for name, text in write.files().items():
        assert (write.FOLDER / name).read_text() == text, (
            f"{name} is not what its oracle writes: run python -m tests.golden.write, and look at "
            "the difference"
        )


def test_the_oracle_reads_the_references_training_rows(shared):
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(shared / "data/tokenizer.llama2")
    )
    lines = (shared / "data/golden/masks.jsonl").read_text().splitlines()
    compared = 0
    for row in map(json.loads, lines):
        names = LLAMA_NAMES | (LLAMA_ENDS if row["mm_use_im_start_end"] else {"[PAD]": 32000})
        how = oracle.Row(
            template=row["template"],
            conversations=row["conversations"],
            system=oracle.SYSTEMS[row["template"]],
            legacy=row["legacy"],
            names=names,
            start_end_tokens=row["mm_use_im_start_end"],
            typed_specials=True,
        )
        ids, labels = oracle.ids_and_labels(how, processor)
        if not row["has_image"]:
            most = row["model_max_length"]
            ids, labels = ids[:most], labels[:most]
        assert ids == row["input_ids"], row["note"]
        if "mismatch" not in row and "quirk" not in row:
            assert labels == row["labels"], row["note"]
            compared += 1
    assert compared == 32


def test_the_oracle_writes_the_references_prompts(shared):
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(shared / "data/tokenizer.llama2")
    )
    lines = (shared / "data/golden/prompts.jsonl").read_text().splitlines()
    compared = 0
    for row in map(json.loads, lines):
        plain = not any(message.get("as_tuple") for message in row["messages"])
        if row["fewshot_messages"] or not plain:
            continue
        kind = row["template"].split("-")[0].removesuffix("_mmtag")
        how = oracle.Row(
            template="llava_v0" if kind == "v0" else kind,  # its chat's words
            conversations=[
                {
                    "from": "gpt" if message["role"] == "assistant" else "human",
                    "value": message["content"],
                }
                for message in row["messages"]
            ],
            system=row["system"],
            legacy=row["legacy"],
            names=LLAMA_NAMES | (LLAMA_ENDS if row["mm_use_im_start_end"] else {}),
            image_at="as_written",
            typed_specials=True,
        )
        text = oracle.written(how).replace("«", "").replace("»", "")
        assert text == row["prompt"], row["note"]
        assert oracle.ids_and_labels(how, processor)[0] == row["input_ids"], row["note"]
        compared += 1
    assert compared == 38
