"""ScienceQA as a source: problems.json, pid_splits.json and images/{split}/{pid}/image.png.

A problem is put to the model, and answered, in one of five ways: in front of the dash the question
(Q question, C context, M choices, in this order), behind it the answer (L lecture, E or P solution,
A answer). The words are those that released weights were trained with.
"""

import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax import files
from llava_jax.conversation import IMAGE_TAG, Refused
from llava_jax.data import json_index
from llava_jax.data.entry import Entry, Picture
from llava_jax.data.pictures import Images, Roots, is_text, root_paths

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
PROMPTS = ("QCM-LEPA", "QCM-LEA", "QCM-ALE", "QCM-A", "CQM-A")

# Of a problem, as it is kept in a built data set. All are texts; `choices` and `answer` are not.
TEXTS = "question hint lecture solution grade subject topic category skill split".split()


class Problem(NamedTuple):
    """One problem, checked. texts: by the names in TEXTS. image: a file's name, or nothing."""

    id: str
    texts: Mapping[str, str]
    choices: tuple[str, ...]
    answer: int
    image: str


def parse_problem(pid: str, problem: object) -> Problem:
    if not isinstance(problem, Mapping):
        raise _refused(pid, f"{type(problem).__name__}, expected an object")
    if not is_text(pid):
        raise _refused(pid, "half a character in its id, expected a text")
    texts = {name: "" if problem.get(name) is None else problem[name] for name in TEXTS}
    image = problem.get("image") or ""
    for name, text in {**texts, "image": image}.items():
        if not isinstance(text, str):
            raise _refused(pid, f"{name} {text!r:.60}, expected a text")
    if not texts["question"].strip():
        raise _refused(pid, "no question, expected one")
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, Sequence) or not all(isinstance(choice, str) for choice in choices):
        raise _refused(pid, f"choices {choices!r:.60}, expected a list of texts")
    if isinstance(choices, str) or not 1 <= len(choices) <= 26:
        raise _refused(pid, f"choices {choices!r:.60}, expected a list of 1 to 26")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise _refused(
            pid, f"answer {answer!r:.60}, expected a number from 0 to {len(choices) - 1}"
        )
    return Problem(pid, texts, tuple(choices), answer, image)


def _refused(pid: str, what: str) -> Refused:
    return Refused("malformed problem", f"got problem {pid} with {what}")


def conversation_of(problem: Problem, prompt: str) -> list[dict[str, str]]:
    """The two turns of LLaVA's JSON."""
    asked, answered = prompt.split("-")
    texts = problem.texts
    letters = [chr(ord("A") + number) for number in range(len(problem.choices))]
    options = [
        f"({letter}) {choice}" for letter, choice in zip(letters, problem.choices, strict=True)
    ]
    lines = [f"Question: {texts['question']}", f"Context: {texts['hint'].strip() or 'N/A'}"]
    if asked == "CQM":
        lines.reverse()
    human = _without("Question: ", _tidy("\n".join([*lines, f"Options: {' '.join(options)}"])))
    if problem.image:
        human += f"\n{IMAGE_TAG}"
    lecture, solution = (texts[name].replace("\\n", "\n") for name in ("lecture", "solution"))
    letter = letters[problem.answer]
    if answered == "LEPA":
        gpt = f"LECTURE: {lecture}\n" if lecture.strip() else ""
        gpt += f"SOLUTION: {solution}\n" if solution.strip() else ""
        gpt += f"###\nANSWER: {letter}."
    elif answered == "LEA":
        gpt = f"Answer: {lecture} {solution} The answer is {letter}."
    elif answered == "ALE":  # the paper's ablation: the answer before its reasons
        gpt = f"Answer: The answer is {letter}. BECAUSE: {lecture} {solution}"
    else:
        gpt = f"Answer: The answer is {letter}."
    gpt = _without("Answer: ", _tidy(gpt))
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def _without(word: str, text: str) -> str:
    """A word at the front is left out, and then so are all of its kind: as weights were trained."""
    return text.replace(word, "") if text.startswith(word) else text


def check_prompt(prompt: str) -> None:
    if prompt not in PROMPTS:
        raise ValueError(f"got prompt {prompt!r}, expected one of {', '.join(PROMPTS)}")


def entry_of(problem: Problem, prompt: str, pictures: tuple[Picture, ...]) -> Entry:
    return Entry(problem.id, conversation_of(problem, prompt), pictures)


def fingerprint(text: str, split: str, prompt: str) -> str:
    """text: the fingerprint of both files."""
    return hashlib.sha256(json.dumps([text, split, prompt]).encode()).hexdigest()


class ScienceQaSource:
    """A split of ScienceQA's folder. Pictures lie in its folder `images`, or in one that is given,
    there as {split}/{pid}/image.png or {pid}/image.png."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        images: Images = (),
        split: str = "train",
        prompt: str = "QCM-LEPA",
    ):
        place = files.path(folder)
        check_prompt(prompt)
        problems, problems_sha256 = _read_object(str(place / PROBLEMS))
        splits, splits_sha256 = _read_object(str(place / SPLITS))
        if split not in splits:
            raise ValueError(
                f"got split {split!r} of {place}, expected one of {', '.join(map(ascii, splits))}"
            )
        pids = splits[split]
        if not isinstance(pids, list) or not pids:
            raise ValueError(f"got {place / SPLITS} with no problems in {split!r}; expected a list")
        self._pids = [str(pid) for pid in pids]
        self._problems = {pid: problems.get(pid) for pid in self._pids}
        self._split, self._prompt = split, prompt
        own = [str(place / "images")] if (place / "images").is_dir() else []
        self._roots = Roots([*own, *root_paths(images)])
        self.text_fingerprint = hashlib.sha256(
            (problems_sha256 + splits_sha256).encode()
        ).hexdigest()
        if not self._roots:
            self._check_no_picture(str(place))

    def _check_no_picture(self, folder: str) -> None:
        for pid, problem in self._problems.items():
            if isinstance(problem, Mapping) and problem.get("image"):
                raise ValueError(
                    f"got {folder} without a folder images, and problem {pid!a} has a picture; "
                    "expected images= with folders or zip files"
                )

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.text_fingerprint, self._split, self._prompt)

    def __len__(self) -> int:
        return len(self._pids)

    def __getitem__(self, index: int) -> Entry:
        problem = self.problem(index)
        return entry_of(problem, self._prompt, self.pictures(problem))

    def problem(self, index: int) -> Problem:
        """Raises conversation.Refused for what is none."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        pid = self._pids[index]
        return parse_problem(pid, self._problems[pid])

    def pictures(self, problem: Problem) -> tuple[Picture, ...]:
        if not problem.image:
            return ()
        name = f"{problem.id}/{problem.image}"
        split = problem.texts["split"] or self._split
        return (self._roots.picture(name, f"{split}/{name}", name),)


def _read_object(path: str) -> tuple[Mapping[str, Any], str]:
    value, sha256 = json_index.load(path)
    if not isinstance(value, Mapping):
        raise ValueError(f"got {path}, a {type(value).__name__}; expected an object of ScienceQA's")
    return value, sha256
