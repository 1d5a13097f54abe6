"""ScienceQA's problems are put in the very words that released weights were trained with."""

import json
import pickle

import pytest

from llava_jax.conversation import Refused, parse
from llava_jax.data.science_qa import PROMPTS, ScienceQaSource, conversation_of, parse_problem
from llava_jax.data.source import open_source
from tests.data.sources import everything, problems, write_pictures, write_science_qa, write_zip

SPLITS = {"train": ["p1"], "val": ["p2"], "trainval": ["p2", "p1"], "numbers": [7]}

QCM = "Which is north?\nContext: Use the map.\nOptions: (A) the left (B) the right\n<image>"
CQM = "Context: N/A\nQuestion: Which is north?\nOptions: (A) the left (B) the right"


@pytest.fixture
def folder(tmp_path):
    return write_science_qa(tmp_path / "sqa", problems(**{"7": {"split": "test"}}), SPLITS)


def said(folder, split, prompt):
    found = ScienceQaSource(folder, (), split, prompt)[0]
    parse(found.conversations, len(found.pictures))
    assert isinstance(found.conversations, list)
    human, gpt = found.conversations
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    return human["value"], gpt["value"]


def test_prompts(folder):
    lecture, solution = "Maps have\nfour directions.", "Look at\nthe rose."
    assert said(folder, "train", "QCM-LEPA") == (
        QCM,
        f"LECTURE: {lecture}\nSOLUTION: {solution}\n###\nANSWER: B.",
    )
    assert said(folder, "train", "QCM-LEA") == (QCM, f"{lecture} {solution} The answer is B.")
    because = f"The answer is B. BECAUSE: {lecture} {solution}"
    assert said(folder, "train", "QCM-ALE") == (QCM, because)
    assert said(folder, "train", "QCM-A") == (QCM, "The answer is B.")
    assert said(folder, "val", "CQM-A") == (CQM, "The answer is B.")
    # Without a lecture its word is left out too.
    assert said(folder, "val", "QCM-LEPA")[1] == f"SOLUTION: {solution}\n###\nANSWER: B."
    assert said(folder, "val", "QCM-LEA")[1] == f"{solution} The answer is B."


@pytest.mark.parametrize(
    ("change", "prompt", "human", "gpt"),
    [
        # Three spaces become two, and so does what is left of an empty lecture and solution.
        ({"question": "a   b"}, "QCM-A", "a  b\nContext", "The answer is B."),
        ({"lecture": "", "solution": ""}, "QCM-LEA", "Which", " The answer is B."),
        ({"lecture": None, "solution": " "}, "QCM-LEPA", "Which", "###\nANSWER: B."),
        # The words in front are left out wherever they are, if they are in front.
        ({"hint": "Question: why?"}, "QCM-A", "Which is north?\nContext: why?\n", "The answer"),
        ({"hint": "Question: why?"}, "CQM-A", "Context: Question: why?\nQuestion: ", "The answer"),
        ({"lecture": "x Answer: y"}, "QCM-LEA", "Which", "x y Look at"),
        ({"lecture": "x Answer: y"}, "QCM-LEPA", "Which", "LECTURE: x Answer: y\n"),
    ],
)
def test_as_the_reference_wrote_them(change, prompt, human, gpt):
    problem = parse_problem("x", problems(x=change)["x"])
    asked, answered = conversation_of(problem, prompt)
    assert asked["value"].startswith(human)
    assert answered["value"].startswith(gpt)


def test_splits_and_pictures(folder):
    source = pickle.loads(pickle.dumps(open_source(folder, split="trainval", prompt="QCM-A")))
    assert [source[index].id for index in range(len(source))] == ["p2", "p1"]
    assert source[0].pictures == ()
    (found,) = source[1].pictures
    assert (found.name, found.read(), found.exists()) == (
        "p1/image.png",
        b"picture of p1",
        True,
    )
    assert open_source(folder, split="numbers")[0].id == "7"
    with pytest.raises(IndexError):
        source[2]


@pytest.mark.parametrize("name", ["p1/image.png", "train/p1/image.png"])
@pytest.mark.parametrize("zipped", [False, True])
def test_pictures_elsewhere(folder, tmp_path, name, zipped):
    (folder / "images/train/p1/image.png").unlink()
    (folder / "images/train/p1").rmdir()
    (folder / "images/train").rmdir()
    (folder / "images").rmdir()
    with pytest.raises(
        ValueError, match="problem 'p1' has a picture; expected images= with folders"
    ):
        open_source(folder)
    other = write_pictures(tmp_path / "other")
    (other / name).parent.mkdir(parents=True)
    (other / name).write_bytes(b"x")
    if zipped:
        other = write_zip(tmp_path / "other.zip", {name: b"x"})
    assert open_source(folder, images=[str(other)])[0].pictures[0].read() == b"x"
    assert open_source(folder, images=str(other))[0].pictures[0].exists()


def test_fingerprints(folder, tmp_path):
    found = {
        open_source(folder, split=split, prompt=prompt).fingerprint
        for split in ("train", "val")
        for prompt in PROMPTS
    }
    assert len(found) == 2 * len(PROMPTS)
    again = write_science_qa(tmp_path / "again", problems(**{"7": {"split": "test"}}), SPLITS)
    assert open_source(again).fingerprint in found
    (again / "pid_splits.json").write_text(json.dumps({**SPLITS, "more": ["p1"]}))
    assert open_source(again).fingerprint not in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (7, "int, expected an object"),
        (None, "NoneType, expected an object"),
        ({"question": 3}, "question 3, expected a text"),
        ({"question": " "}, "no question"),
        ({"hint": ["a"]}, r"hint \['a'\], expected a text"),
        ({"image": 5}, "image 5, expected a text"),
        ({"choices": "AB"}, "choices 'AB', expected a list"),
        ({"choices": []}, "expected a list of 1 to 26"),
        ({"choices": ["x"] * 27}, "expected a list of 1 to 26"),
        ({"choices": ["a", 2]}, "expected a list of texts"),
        ({"choices": None}, "choices None, expected a list"),
        ({"answer": 2}, "answer 2, expected a number from 0 to 1"),
        ({"answer": -1}, "answer -1, expected"),
        ({"answer": True}, "answer True, expected"),
        ({"answer": "A"}, "answer 'A', expected"),
    ],
)
def test_malformed_problems(tmp_path, change, reason):
    folder = write_science_qa(
        tmp_path / "sqa", problems(bad=change), {"train": ["p1", "bad", "gone"]}
    )
    source = open_source(folder)
    assert source[0].id == "p1"
    with pytest.raises(Refused, match=rf"problem bad with .*{reason}") as caught:
        source[1]
    assert caught.value.kind == "malformed problem"
    assert everything(source)[2][0] == "malformed problem"


def test_half_a_character(tmp_path):
    changed = {"p\ud83d": {}, "p3": {"hint": "\ud83d"}, "p4": {"image": "\ud83d.png"}}
    splits = {"train": [*changed], "a\ud83d": ["p3"]}
    folder = write_science_qa(tmp_path / "sqa", problems(**changed), splits)
    source = open_source(folder, images=tmp_path)
    with pytest.raises(
        Refused, match=r"problem p\\ud83d with half a character in its id"
    ) as caught:
        source[0]
    assert caught.value.kind == "malformed problem"
    with pytest.raises(Refused, match="half a character"):
        parse(source[1].conversations, 0)
    with pytest.raises(Refused, match=r"got image 'train/p4/\\ud83d\.png'"):
        source[2]
    with pytest.raises(ValueError, match="split 'dev'") as refused:
        open_source(folder, split="dev", images=tmp_path)
    str(refused.value).encode()
    bare = write_science_qa(
        tmp_path / "bare", {"p\ud83d": {"image": "a.png"}}, {"train": ["p\ud83d"]}
    )
    with pytest.raises(ValueError, match="has a picture; expected images=") as refused:
        open_source(bare)
    str(refused.value).encode()


def test_a_problem_that_leads_out(tmp_path):
    folder = write_science_qa(
        tmp_path / "sqa", problems(**{"../p3": {"image": "i.png"}}), {"train": ["../p3"]}
    )
    assert everything(open_source(folder, images=tmp_path))[0][0] == "image path outside its root"


def test_bad_folders(folder):
    with pytest.raises(ValueError, match=r"split 'dev' .* 'train', 'val', 'trainval', 'numbers'"):
        open_source(folder, split="dev")
    with pytest.raises(ValueError, match="prompt 'QCM', expected one of QCM-LEPA, QCM-LEA"):
        open_source(folder, prompt="QCM")
    (folder / "pid_splits.json").write_text('{"train": [], "val": "p1"}')
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=rf"no problems in '{split}'"):
            open_source(folder, split=split)
    for broken in ("[1]", '{"a": NaN}', "<html>", "", '{"a":'):
        (folder / "problems.json").write_text(broken)
        with pytest.raises(ValueError, match=r"problems\.json, (not JSON|a list; expected)"):
            open_source(folder)
