"""What a demonstration came to: answers about unseen pictures, their scores, and its page.

Its folder holds world/, start/, stage1/, stage2/ and answers.json; launch/demo.py makes them.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from llava_jax import api, cli, files, metrics, optim, starting
from llava_jax import program as programs
from llava_jax.config import Config
from llava_jax.data import report
from llava_jax.evals import picture_world as exam
from llava_jax.evals.picture_world import Question
from llava_jax.pages import demo as pages
from llava_jax.pages.run_report import Part

SPLITS = {
    "test": (
        "Unseen scenes",
        "Questions with one right answer about scenes whose arrangements training has not seen.",
    ),
    "unseen_pairs": (
        "Unseen colour–shape pairs",
        "The same about objects whose pair of colour and shape no picture and no text of training "
        "has; the towers have not met them either.",
    ),
}
RULE = (
    "Of the test questions, in the order of their names' SHA-256: of each category the first that "
    "was answered rightly and the first that was answered wrongly. So wrong answers are shown more "
    "often than they occur: the tables above tell how often that is."
)

STAGES = {"stage1": "stage 1", "stage2": "stage 2"}

Said = Mapping[str, Mapping[str, Sequence[str]]]  # by split and row


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """configs: of "stage1" and "stage2". examined: scenes of each split, 0 = all."""

    folder: epath.Path
    configs: Mapping[str, Config]
    examined: int = 0

    @property
    def world(self) -> epath.Path:
        return self.folder / "world"

    @property
    def answers(self) -> epath.Path:
        return self.folder / "answers.json"

    @functools.cached_property
    def questions(self) -> dict[str, list[Question]]:
        return {split: exam.read(self.world, split, self.examined) for split in SPLITS}

    @functools.cached_property
    def said(self) -> Said:
        return json.loads(self.answers.read_text())

    @functools.cached_property
    def scores(self) -> dict[str, dict[str, exam.Score]]:
        return {
            split: {row: exam.score(asked, said) for row, said in self.said[split].items()}
            for split, asked in self.questions.items()
        }


def examine(demo: Demonstration) -> None:
    """Every row's answers to both splits' questions, kept whole."""
    model = api.load(demo.folder / "stage2" / "model")

    def generate(prompts: list[str], images: list[list[Any]]) -> list[str]:
        return model.generate(prompts, images, max_new_tokens=exam.ANSWER_TOKENS)

    questions = demo.questions
    with cli.Progress(3 * sum(map(len, questions.values())), "asking", "questions") as progress:
        said = {
            split: exam.examine(demo.world, asked, generate, on_answers=progress.advance)
            for split, asked in questions.items()
        }
    files.write_json(demo.answers, said)


def summary(demo: Demonstration) -> str:
    """Right answers of every row."""
    columns = [(split, group) for split in SPLITS for group in exam.GROUPS]
    head = ["right answers", *(f"{SPLITS[split][0].lower()}, {group}" for split, group in columns)]
    lines = []
    for row in exam.ROWS:
        shares = [demo.scores[split][row].get(group) for split, group in columns]
        lines.append((row, *(f"{share.share:.1%}" if share else "–" for share in shares)))
    return report.table(tuple(head), lines)


# The page.


def page(demo: Demonstration, steps: Sequence[pages.Step]) -> str:
    """steps: all that was done, the two stages under their names."""
    about = {step.name: f"{step.what[0].upper()}{step.what[1:]}." for step in steps}
    stages = [
        pages.Stage(
            STAGES[name],
            about[STAGES[name]],
            *metrics.read(demo.folder / name),
            _parts(config, demo.folder / name),
        )
        for name, config in demo.configs.items()
    ]
    exams = [pages.Exam(title, what, demo.scores[split]) for split, (title, what) in SPLITS.items()]
    return pages.page(
        steps=steps,
        stages=stages,
        exams=exams,
        groups=exam.GROUPS,
        samples=list(_samples(demo)),
        rule=RULE,
        facts=_facts(demo),
        go_on=_go_on(demo),
    )


def _samples(demo: Demonstration) -> Iterator[pages.Sample]:
    """As RULE says."""
    questions, said = demo.questions["test"], demo.said["test"]
    answers = said[exam.MODEL]
    for i in exam.chosen(questions, answers):
        question = questions[i]
        with Image.open(demo.world / question.scene) as picture:
            pixel_HW3 = np.asarray(picture.convert("RGB"))
        yield pages.Sample(
            pixel_HW3,
            question.category,
            question.text,
            question.answer,
            answers[i],
            exam.is_right(question, answers[i]),
            (f"with the {exam.MEAN}", said[exam.MEAN][i]),
        )


def _parts(config: Config, workdir: epath.Path) -> list[Part]:
    """What trained and what was frozen, from shapes alone."""
    layout = programs.layout_of(config.compute, jax.devices())
    start = starting.open_start(config, workdir)
    rows = layout.batch_parts * config.compute.parts
    program = programs.program(config, start.about.config, layout, steps=1, rows=rows)
    return [
        Part(part.name, part.parameters, part.trains, part.dtype, part.weight_bytes)
        for part in optim.parts(program.like.trainable, program.frozen_like)
    ]


def _facts(demo: Demonstration) -> dict[str, str | float]:
    config = demo.configs["stage2"]
    side, patch = config.data.image_size, config.data.patch_size
    steps = {name: len(metrics.read(demo.folder / name).steps) for name in demo.configs}
    return {
        "pictures to learn from": len(list((demo.world / "train").iterdir())),
        "a picture": f"{side} × {side} pixels, {(side // patch) ** 2} tokens",
        "steps of stage 1": steps["stage1"],
        "steps of stage 2": steps["stage2"],
        **{
            f"questions, {SPLITS[split][0].lower()}": len(asked)
            for split, asked in demo.questions.items()
        },
        "cores": os.cpu_count() or 0,
        "Python": sys.version.split()[0],
    }


def _go_on(demo: Demonstration) -> str:
    model, first = demo.folder / "stage2" / "model", demo.questions["test"][0]
    return f"""# ask it yourself, in Python
import llava_jax
model = llava_jax.load("{model}")
model.generate("{first.text}", images=["{demo.world / first.scene}"])

# hand it to PyTorch
python launch/convert.py export {model} {demo.folder / "hf"} --format hf

# the real ones; without weights and data at hand these say what to fetch
python launch/train.py --config configs/stage1.py:v1.5-7b
python launch/train.py --config configs/stage2.py:v1.5-7b"""
