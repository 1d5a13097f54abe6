"""Ids and masks of the running reference, on LLaMA 2's own tokenizer: shared/data/README.md."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llava_jax.conversation import UNFINISHED, Turn, gpt, human, parse, pieces, template
from llava_jax.tokenizer import Tokenizer, fit, load, render

ADDED = ("<im_start>", "<im_end>")


def golden(shared: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (shared / "data/golden" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def llama(shared: Path, tmp_path_factory):
    """Tokenizers of Meta's file, by legacy flag and added tokens."""
    made: dict[tuple, Tokenizer] = {}

    def get(legacy: bool, added: tuple[str, ...]) -> Tokenizer:
        if (legacy, added) not in made:
            folder = tmp_path_factory.mktemp("llama")
            shutil.copy(shared / "data/tokenizer.llama2", folder / "tokenizer.model")
            (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
            ids = {name: 32000 + i for i, name in enumerate(added)}
            (folder / "added_tokens.json").write_text(json.dumps(ids))
            made[legacy, added] = load(folder)
        return made[legacy, added]

    return get


def tokenizer_of(llama, row: dict) -> Tokenizer:
    if row["mm_use_im_start_end"]:
        return llama(row["legacy"], ADDED)
    return llama(row["legacy"], ("[PAD]",) if row["template"] == "v0" else ())


def test_training_rows_of_the_reference(shared, llama):
    compared = 0
    for row in golden(shared, "masks.jsonl"):
        tokenizer = tokenizer_of(llama, row)
        turns = parse(row["conversations"], int(row["has_image"]))
        how = template(
            row["template"], start_end_tokens=row["mm_use_im_start_end"], typed_specials=True
        )
        ids, mask = render(tokenizer, pieces(turns, how))
        if len(ids) > row["model_max_length"] and not row["has_image"]:
            fitted = fit(
                tokenizer,
                turns,
                how,
                max_tokens=row["model_max_length"],
                tokens_per_image=1,
                too_long="cut_tokens",
            )
            assert len(ids) == len(fitted.ids) + fitted.cut_tokens
            ids, mask = fitted.ids, fitted.mask
        assert ids == row["input_ids"], row["note"]

        learned = [id for id, yes in zip(ids, mask, strict=True) if yes]
        if "mismatch" not in row and "quirk" not in row:
            labels = [id if yes else -100 for id, yes in zip(ids, mask, strict=True)]
            assert labels == row["labels"], row["note"]
            compared += 1
        elif "mismatch" in row:
            answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
            expected: list[int] = []
            for answer in filter(None, answers):
                end = [tokenizer.eos_id]
                if row["template"] == "llava_llama_2":
                    end = [*tokenizer.encode(" ", "text"), *end]
                expected += tokenizer.encode(" " + answer, "text", parses=True) + end
            assert learned == expected, row["note"]
    assert compared == 32


def test_dialogues_the_reference_refuses(shared):
    for row in golden(shared, "mask_errors.jsonl"):
        with pytest.raises(ValueError, match=r"^(turn|got).*expected"):
            turns = parse(row["conversations"], int(row["has_image"]))
            pieces(turns, template(row["template"]))


def turns_of_prompt(row: dict) -> list[Turn]:
    turns = []
    if row["fewshot_messages"]:  # their text is only in the prompt
        _, question, rest = re.split("###Human: |###Assistant: ", row["prompt"])[:3]
        turns = [human(question), gpt(rest)]
    for message in row["messages"]:
        if message["content"] is None:
            turns.append(UNFINISHED)
        elif message["role"] == "assistant":
            turns.append(gpt(message["content"]))
        elif message.get("as_tuple") and "mmtag" in row["template"]:
            # These templates, which no released LLaVA of ours needs, show the image on its own.
            words = message["content"].replace("<image>", "").strip()
            turns += [Turn("human", ("<Image>", "</Image>")), gpt("Received."), human(words)]
        elif message.get("as_tuple"):
            turns.append(human(message["content"].replace("<image>", "").strip(), images=1))
        else:
            text = re.sub("<im_start>|<im_end>", "", message["content"])
            turns.append(Turn("human", tuple(text.split("<image>"))))
    return turns


def test_prompts_of_the_reference(shared, llama):
    rows = golden(shared, "prompts.jsonl")
    for row in rows:
        kind = row["template"].split("-")[0].removesuffix("_mmtag")
        how = template(
            "llava_v0" if kind == "v0" else kind,  # its chat's words, not its training's
            system=row["system"],
            image_at="as_written",
            start_end_tokens=row["mm_use_im_start_end"],
        )
        parts = pieces(turns_of_prompt(row), how)
        tags = {"image": "<image>", "bos": "<s>", "eos": "</s>"}
        text = "".join(tags.get(part.kind, part.text) for part in parts)
        assert text == row["prompt"], row["note"]
        added = ADDED if row["mm_use_im_start_end"] else ()
        ids, _ = render(llama(row["legacy"], added), parts)
        assert ids == row["input_ids"], row["note"]
        # <s> is what its command line waits for with LLaMA 2; a model that ends says </s>.
        assert how.stop == (("</s>",) if kind == "llava_llama_2" else (row["stop"],))
    assert len(rows) == 44
