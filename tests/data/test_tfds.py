"""A built set says what its source says, entry for entry, and needs no TensorFlow."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_jax.data.built_source import BuiltSource
from llava_jax.data.source import open_source
from tests.data.sources import (
    TALK,
    everything,
    problems,
    walk,
    write_json,
    write_pictures,
    write_science_qa,
    write_zip,
)

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

from llava_jax.data import tfds_builders  # noqa: E402
from llava_jax.data.tfds_builders import LlavaInstruct, Recipe, build  # noqa: E402

CHECKOUT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def chat(tmp_path):
    write_pictures(tmp_path / "images")
    return write_json(tmp_path / "chat.json")


def build_chat(chat, **how):
    how = {"builder": "llava_instruct", "name": "x", "data_dir": chat.parent / "built"} | how
    return build(chat, images=[chat.parent / "images"], **how)


@pytest.mark.parametrize("builder", ["llava_instruct", "llava_pretrain"])
@pytest.mark.parametrize("shards", [1, 4, 99])
def test_the_same_entries(chat, builder, shards):
    built = build_chat(chat, builder=builder, shards=shards)
    assert built.folder == str(chat.parent / "built" / builder / "x" / "1.0.0")
    plain = open_source(chat, images=[chat.parent / "images"])
    source = pickle.loads(pickle.dumps(open_source(built.folder)))
    assert source.fingerprint == plain.fingerprint
    # The folder that is no picture: the built set has no folders, and says it by a ValueError.
    assert everything(source) == everything(plain)
    files = [name for name in walk(Path(built.folder)) if "array_record" in name]
    assert len(files) == min(shards, len(plain))
    pictures = [picture for i in (0, 5) for picture in source[i].pictures]
    assert [(p.exists(), p.nearest()) for p in pictures] == [(True, None), (False, None)]


def test_from_zips_and_lines(tmp_path):
    lines = tmp_path / "lines"
    lines.write_text('{"image": "sub/b.png", "conversations": []}\n\n{"id": "b"}\n')
    zipped = write_zip(tmp_path / "images.zip")
    built = build(lines, images=zipped, builder="llava_pretrain", name="z", data_dir=tmp_path)
    assert everything(open_source(built.folder)) == everything(open_source(lines, images=zipped))


def test_what_was_lost_is_counted(chat):
    seen = []
    built = build_chat(chat, shards=3, progress=lambda done, total: seen.append((done, total)))
    report = built.report["train"]
    assert (report["entries"], report["pictures"]) == (18, 8)
    assert {kind: noted["count"] for kind, noted in report["refused"].items()} == {
        "id is not a text": 1,
        "image path outside its root": 1,
        "entry is not an object": 2,
    }
    assert report["refused"]["entry is not an object"]["first"][1].startswith("entry 17: got None")
    assert {kind: noted["count"] for kind, noted in report["broken"].items()} == {
        "missing": 1,
        "unreadable": 1,
    }
    assert "no picture sub/gone.png in" in report["broken"]["missing"]["first"][0]
    assert seen == [(done, 18) for done in range(1, 19)]


def test_what_lies_beside_a_missing_picture_is_kept(tmp_path):
    images = write_pictures(tmp_path / "images")
    file = write_json(tmp_path / "a", [{"image": ["a.png", "sub/é.jpg", "b.jpg", "a.jpg"]}])
    where = {"builder": "llava_instruct", "name": "x", "data_dir": tmp_path / "built"}
    built = build(file, images=images, **where)
    found = open_source(built.folder)[0].pictures
    assert [picture.nearest() for picture in found] == ["a.jpg", "sub/é.JPG", None, None]
    plain = open_source(file, images=images)[0].pictures
    assert [picture.nearest() for picture in plain] == ["a.jpg", "sub/é.JPG", None, None]
    first = built.report["train"]["broken"]["missing"]["first"]
    assert [said.partition("; ")[2] for said in first] == [
        "there is a.jpg",
        "there is sub/é.JPG",
        "",
    ]


def test_threads(tmp_path):
    made = [{"id": str(i), "conversations": TALK * (i % 9)} for i in range(400)]
    file = write_json(tmp_path / "a", made)
    built = build(file, builder="llava_instruct", name="x", data_dir=tmp_path, shards=3)
    source = open_source(built.folder)
    order = random.Random(0).sample(range(400), 400)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(source.__getitem__, order))
    assert [(e.id, e.conversations) for e in found] == [
        (made[i]["id"], made[i]["conversations"]) for i in order
    ]
    for index in (-1, 400):
        with pytest.raises(IndexError):
            source[index]


def test_shards_by_bytes(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_bytes(os.urandom(10_000))
    file = write_json(tmp_path / "a", [{"image": f"{number}.jpg"} for number in range(30)])
    monkeypatch.setattr(tfds_builders, "_SHARD_BYTES", 100_000)
    build(file, images=tmp_path, builder="llava_instruct", name="x", data_dir=tmp_path / "built")
    assert sum("array_record" in name for name in walk(tmp_path / "built")) == 4


def test_a_shard_is_not_held_in_memory(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(2**20))
    file = write_json(tmp_path / "a", [{"image": f"{number}.jpg"} for number in range(30)])
    tracemalloc.start()
    where = {"name": "x", "data_dir": tmp_path / "built", "shards": 1}
    build(file, images=tmp_path, builder="llava_instruct", **where)
    # Measured 10.7 MiB with what TFDS imports; all pictures are 30.
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_tfds_reads_it(chat):
    config = Recipe(name="y", source=str(chat), images=(str(chat.parent / "images"),))
    builder = LlavaInstruct(config=config, data_dir=str(chat.parent / "built"))
    builder.download_and_prepare()
    assert everything(open_source(builder.data_dir)) == everything(
        open_source(chat, images=[chat.parent / "images"])
    )
    (first, second) = list(tfds.builder_from_directory(builder.data_dir).as_data_source("train"))[
        :2
    ]
    assert first["id"] == b"first"
    assert first["pictures"]["name"] == [b"a.jpg"]
    assert first["pictures"]["bytes"] == [b"\xff\xd8a\0\0"]
    assert second["conversations"]["from"] == [b"human", b"gpt"]
    assert second["conversations"]["value"] == [turn["value"].encode() for turn in TALK]


# Whole or not at all.


def test_again(chat, capsys):
    first = build_chat(chat)
    before = {name: (Path(first.folder) / name).stat() for name in walk(Path(first.folder))}
    again = build_chat(chat)
    assert (first.reused, again.reused) == (False, True)
    assert again.report == first.report
    after = {name: (Path(first.folder) / name).stat() for name in walk(Path(first.folder))}
    assert after == before
    chat.write_text('[{"id": "other"}]')
    with pytest.raises(ValueError, match=r"built of another text .* expected a new name"):
        build_chat(chat)
    assert len(open_source(build_chat(chat, name="x2").folder)) == 1
    assert capsys.readouterr().out == ""


def test_broken_off(chat):
    def fail(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_chat(chat, shards=4, progress=fail)
    assert list(walk(chat.parent / "built")) == []
    assert len(open_source(build_chat(chat).folder)) == 18


def test_killed(chat):
    code = (
        "import os, signal\n"
        "from llava_jax.data.tfds_builders import build\n"
        "die = lambda done, total: done < 7 or os.kill(os.getpid(), signal.SIGKILL)\n"
        f"build({str(chat)!r}, images=[{str(chat.parent / 'images')!r}], name='x', shards=4,\n"
        f"    builder='llava_instruct', data_dir={str(chat.parent / 'built')!r}, progress=die)"
    )
    assert run(code).returncode == -signal.SIGKILL
    above = chat.parent / "built/llava_instruct/x"
    (left,) = above.iterdir()
    assert left.name.startswith("incomplete.")
    with pytest.raises(ValueError, match="a folder; expected a JSON list"):
        open_source(left)
    built = build_chat(chat)
    assert built.unfinished == (str(left),)
    assert len(open_source(built.folder)) == 18
    with pytest.raises(ValueError, match=r"give the folder 1\.0\.0 in it"):
        open_source(above)


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )


def test_without_tensorflow_and_jax(chat):
    code = (
        "import sys\n"
        "from llava_jax.data.source import open_source\n"
        "from llava_jax.data.tfds_builders import build\n"
        f"built = build({str(chat)!r}, images=[{str(chat.parent / 'images')!r}], name='x',\n"
        f"    builder='llava_instruct', data_dir={str(chat.parent / 'built')!r})\n"
        "source = open_source(built.folder)\n"
        "assert source[0].pictures[0].read()\n"
        "assert not {'tensorflow', 'jax', 'flax'} & sys.modules.keys()"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_without_the_extra(chat, monkeypatch):
    folder = build_chat(chat).folder
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'llava-jax\[data\]'"):
        open_source(folder)
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from llava_jax.data import tfds_builders"
    )
    assert "ValueError: built data sets need an extra: pip install" in run(code).stderr


# ScienceQA.


@pytest.fixture
def sqa(tmp_path):
    made = problems(
        odd={"choices": ["\ud800", "b"], "image": "gone.png"},
        nulls=dict.fromkeys(["hint", "lecture", "solution", "split", "grade"]),
        bad={"answer": 9},
        outside={"image": "../../x"},
        number=5,
    )
    splits = {"train": ["p1", "odd", "nulls", "bad", "outside", "number", "gone"], "val": ["p2"]}
    return write_science_qa(tmp_path / "sqa", made, splits)


def test_science_qa(sqa, tmp_path):
    built = build(sqa, split="train+val", builder="science_qa", name="s", data_dir=tmp_path)
    assert built.folder == str(tmp_path / "science_qa/s/1.0.0")
    for split in ("train", "val"):
        for prompt in ("QCM-LEPA", "QCM-LEA", "QCM-A", "CQM-A"):
            plain = open_source(sqa, split=split, prompt=prompt)
            source = open_source(built.folder, split=split, prompt=prompt)
            assert source.fingerprint == plain.fingerprint
            assert everything(source) == everything(plain)
    assert built.report["train"]["refused"]["malformed problem"]["count"] == 3
    assert built.report["train"]["broken"]["missing"]["count"] == 1
    with pytest.raises(ValueError, match=r"split 'test' .*expected one of train, val"):
        open_source(built.folder, split="test")
    with pytest.raises(ValueError, match="prompt 'x'"):
        open_source(built.folder, prompt="x")
    raw = tfds.builder_from_directory(built.folder).as_data_source("val")[0]
    kept = json.loads((sqa / "problems.json").read_text())["p2"]
    assert raw["choices"] == [choice.encode() for choice in kept["choices"]]
    assert raw["answer"] == kept["answer"]
    for name in "question hint lecture solution grade subject topic category skill split".split():
        assert raw[name] == kept[name].encode()


def test_science_qa_again(sqa, tmp_path):
    where = {"builder": "science_qa", "name": "s", "data_dir": tmp_path}
    build(sqa, split="train", **where)
    assert build(sqa, split="train", **where).reused
    with pytest.raises(ValueError, match=r"built of another text"):
        build(sqa, split="val", **where)


# Bad input.


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"builder": "llava"}, "builder 'llava', expected one of llava_pretrain, llava_instruct"),
        ({"name": "a/b"}, "name 'a/b' for a data set"),
        ({"name": ".."}, "name '..' for a data set"),
        ({"name": "1.0.0"}, "name '1.0.0' for a data set"),
        ({"shards": 0}, "shards 0, expected 1 or more"),
        ({"data_dir": "gs://bucket/x"}, "expected a local folder: build there"),
    ],
)
def test_bad_arguments(chat, how, reason):
    with pytest.raises(ValueError, match=reason.replace(".", r"\.")):
        build_chat(chat, **how)


def test_bad_sources(chat, tmp_path):
    chat.write_text("<html>")
    with pytest.raises(ValueError, match="begins with '<'"):
        build_chat(chat)
    with pytest.raises(ValueError, match="a folder; expected"):
        build_chat(tmp_path / "images")
    assert list(walk(tmp_path / "built")) == []
    with pytest.raises(ValueError, match="copy it to one, or mount the bucket"):
        BuiltSource("gs://bucket/built")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("0-of-00002", lambda data: data[: len(data) // 2], "was the set copied whole"),
        ("0-of-00002", lambda data: None, "with 0 bytes, expected .* copied whole"),
        ("0-of-00002", lambda data: bytes(len(data)), "entry 0 of .*, unreadable"),
        ("dataset_info.json", lambda data: b"{", "cannot be read"),
        ("features.json", lambda data: b"{", "cannot be read"),
        ("metadata.json", lambda data: b"{", r"metadata\.json, not JSON"),
        ("metadata.json", lambda data: b"{}", "a data set of others; expected one that llava_jax"),
        ("metadata.json", lambda data: None, "a data set of others; expected one that llava_jax"),
    ],
)
def test_damaged_sets(chat, file, content, reason):
    folder = Path(build_chat(chat, shards=2).folder)
    (found,) = folder.glob(f"*{file}")
    if (data := content(found.read_bytes())) is None:
        found.unlink()
    else:
        found.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        open_source(folder)[0]


def test_a_set_may_move(chat, tmp_path):
    folder = build_chat(chat).folder
    before = everything(open_source(folder))
    shutil.move(folder, tmp_path / "elsewhere")
    assert everything(open_source(tmp_path / "elsewhere")) == before
