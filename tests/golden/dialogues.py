"""Dialogues of ours for the golden files, and with which settings each is to be read."""

import itertools
from collections.abc import Iterator
from typing import Any

FAMILY = "👩\u200d👩\u200d👧"  # several characters that show as one


def _talk(*values: str | None, first: str = "human") -> list[dict[str, Any]]:
    sides = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [
        {"from": side, "value": value}
        for side, value in zip(itertools.cycle(sides), values, strict=False)
    ]


DIALOGUES = {
    "image in front": _talk("<image>\nWhere is the blue boat?", "Left of the pier."),
    "image in the middle": _talk("In <image> what shows the hour?", "A brass sundial."),
    "image at the end": _talk("How many geese?\n<image>", "Two, and a third behind the reeds."),
    "text only": _talk("Is a ladder a chair?", "No."),
    "three rounds": _talk(
        "<image>\nIs it red?",
        "Yes.",
        "And what is behind it?",
        "A lantern.",
        "Lit?",
        "No, it is out.",
    ),
    "two images in a question": _talk("<image> against <image>: what differs?", "The moon."),
    "images in two questions": _talk("<image>\nHere?", "A mill.", "<image>\nAnd there?", "A barn."),
    "nothing but the image": _talk("<image>", "A bicycle under snow."),
    "empty answer": _talk("<image>\nWhat is missing?", ""),
    "empty answer in the middle": _talk("Name it.", "", "Again, please.", "A thimble."),
    "ends with a question": _talk("<image>\nIs it open?", "It is.", "Since when?"),
    "begins with an answer": _talk("Good evening.", "Who is there?", "An owl.", first="gpt"),
    "words of templates": _talk(
        "<image>\nSay USER: and ### Human: and [INST].",
        "USER: ASSISTANT: ### Assistant: [/INST] <<SYS>>",
        "Go on.",
        " ASSISTANT: ###",
    ),
    "special tokens typed": _talk("<image>\nWhat is </s> or <unk>?", "The end</s> and <s> a start"),
    "a special token between images": _talk("<image></s><image>", "</s>"),
    "many scripts": _talk("<image>\n¿Qué dice 漢字 שלום?", f"été ☂️ {FAMILY} 7½ → ∞"),
    "spaces and lines": _talk("  <image> \n\n what\tis it? ", " first\n\n  second \n"),
    "words of ours": _talk("Fill {system} and {} ▁here.", "{system} ▁ %s"),
}
TEMPLATES = ("v0", "v1", "llava_llama_2")
CAPTIONS = [
    name for name, turns in DIALOGUES.items() if len(turns) == 2 and "<image>" in turns[0]["value"]
]


def training() -> Iterator[dict[str, Any]]:
    """Every dialogue in every template, then the fields by which variants of a template differ."""
    for name, turns in DIALOGUES.items():
        pictured = any("<image>" in turn["value"] for turn in turns)
        for template, legacy, ends in itertools.product(
            (*TEMPLATES, "plain"), (False, True), (False, True) if pictured else (False,)
        ):
            if template != "plain" or name in CAPTIONS:
                changes = {"start_end_tokens": True} if ends else {}
                yield _row(name, template, legacy, turns, **changes)
    for template, legacy in itertools.product(TEMPLATES, (False, True)):
        name = "image in front"
        yield _row(name, template, legacy, DIALOGUES[name], system=None)
        name = "special tokens typed"
        yield _row(name, template, legacy, DIALOGUES[name], typed_specials=True)
    for name, legacy in itertools.product(
        (
            "image in the middle",
            "two images in a question",
            "images in two questions",
            "a special token between images",
        ),
        (False, True),
    ):
        turns = DIALOGUES[name]
        yield _row(name, "v1", legacy, turns, image_at="as_written")
        yield _row(name, "v1", legacy, turns, text_restarts=False)
        for last in (False, True):
            yield _row(name, "v1", legacy, turns, image_at="random") | {"image_last": last}


def cuts() -> Iterator[dict[str, Any]]:
    """Dialogues that do not fit: rounds, tokens, images, and all of it, are cut away."""
    room = {"three rounds": (200, 60, 45, 33, 20), "images in two questions": (70, 56, 50, 40, 9)}
    room |= {"begins with an answer": (30, 12), "ends with a question": (51, 40)}
    for name, sizes in room.items():
        for size, policy, template in itertools.product(
            sizes, ("cut_turns", "cut_tokens", "drop"), ("v0", "v1")
        ):
            fitting = {"max_tokens": size, "tokens_per_image": 12, "too_long": policy}
            yield _row(name, template, False, DIALOGUES[name]) | fitting


def prompts() -> Iterator[dict[str, Any]]:
    """What is asked of a model: the last answer is still to come."""
    chats = {
        "a question": _talk("<image>\nWhat floats there?", None),
        "text only": _talk("Is ice heavy?", None),
        "second round": _talk("<image>\nWhose hat?", "The postman's.", "What colour?", None),
        "two images": _talk("<image> or <image>?", None),
        "image in the second round": _talk("Ready?", "Yes.", "Then read <image> aloud.", None),
        "many scripts": _talk(f"<image>\n{FAMILY} 漢字\n\n été?", None),
        "no question of ours": _talk("<image>\nIs it late?", "Very."),
    }
    for (name, turns), template, legacy in itertools.product(
        chats.items(), ("v0", "llava_v0", "v1", "llava_llama_2"), (False, True)
    ):
        for ends in (False, True) if name in ("a question", "two images") else (False,):
            changes = {"start_end_tokens": True} if ends else {}
            yield _row(name, template, legacy, turns, image_at="as_written", **changes)
    for template in ("v0", "llava_v0", "v1", "llava_llama_2", "plain"):
        turns = chats["a question"]
        yield _row("as the template is", template, False, turns, system=None)


def _row(
    note: str, template: str, legacy: bool, turns: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """changes: of the template's fields. A short system sentence keeps the rows readable."""
    changes = {"system": "Be brief."} | changes
    if changes["system"] is None or template == "plain":
        del changes["system"]
    return {
        "note": note,
        "template": template,
        "legacy": legacy,
        "changes": changes,
        "conversations": turns,
    }
