"""A run's data as a whole: what is kept, what is refused, and what makes it another data set."""

import json
import shutil

import numpy as np
import pytest

from llava_jax.checkpoint import differences
from llava_jax.config import Source
from llava_jax.data import preparation
from llava_jax.data.dataset import open_dataset
from tests.data import small
from tests.tiny_tokenizer import write_tokenizer


def test_lengths_are_counted_once(tmp_path, monkeypatch):
    config = small.write(tmp_path)
    first = open_dataset(config)
    monkeypatch.setattr(preparation, "measure", lambda *args, **kwargs: pytest.fail("again"))
    again = open_dataset(config)
    np.testing.assert_array_equal(again.tokens_N, first.tokens_N)
    assert again.digest == first.digest
    with pytest.raises(pytest.fail.Exception):
        open_dataset(small.changed(config, data={"template": "v0"}))


def test_a_mixture(tmp_path):
    config = small.write(tmp_path)
    path = config.data.sources["small"].path
    images = config.data.sources["small"].images
    sources = {
        "some": Source(path, images, take="first:10", epochs=2),
        "drawn": Source(path, images, take="random:7"),
    }
    dataset = open_dataset(small.changed(config, data={"sources": sources}))
    assert len(dataset) == 27
    assert np.bincount(dataset.source_N).tolist() == [20, 7]
    assert dataset.entry_N[:20].tolist() == [*range(10), *range(10)]
    for example in range(27):
        name = dataset.names[dataset.source_N[example]]
        entry = dataset.sources[name][int(dataset.entry_N[example])]
        assert dataset.renderer(entry).tokens == dataset.tokens_N[example]


def test_refused_conversations_are_not_in_the_plan(tmp_path):
    made = small.entries(20)
    made[4]["conversations"] = []
    config = small.changed(small.write(tmp_path, made), data={"max_bad_fraction": 0.05})
    dataset = open_dataset(config)
    assert len(dataset) == 19
    assert 4 not in dataset.entry_N


def test_too_much_of_it_bad(tmp_path):
    made = small.entries(20)
    for n in (4, 8):  # without an image
        made[n]["conversations"] = []
    made[9]["image"] = "nowhere.png"
    config = small.write(tmp_path, made)
    with pytest.raises(ValueError, match="3 of 20 conversations refused or without") as error:
        open_dataset(small.changed(config, data={"max_bad_fraction": 0.14}))
    assert "2 × no turns, as e4 (entry 4)" in str(error.value)
    assert "1 × picture missing" in str(error.value)
    assert len(open_dataset(small.changed(config, data={"max_bad_fraction": 0.15}))) == 18


def test_pictures_are_looked_for_each_time(tmp_path):
    """What was missing may have come, and what was there may be gone; no length depends on it."""
    config = small.changed(small.write(tmp_path), data={"max_bad_fraction": 0.05})
    first = open_dataset(config)
    picture = tmp_path / "images/3.png"
    picture.rename(tmp_path / "3.png")
    with pytest.raises(ValueError, match="7 of 60 conversations refused or without"):
        open_dataset(config)
    assert open_dataset(config, check=None).digest == first.digest
    (tmp_path / "3.png").rename(picture)
    assert open_dataset(config).checked["small"].findings.count.total() == 0
    picture.write_text("<html>")
    assert not open_dataset(config).checked["small"].broken_N.any()
    with pytest.raises(ValueError, match="7 × picture unreadable"):
        open_dataset(config, check="open")


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
    config = small.write(tmp_path)
    real = preparation.measure

    def measure(*args, **kwargs):
        monkeypatch.setattr(preparation, "measure", real)
        open_dataset(config)
        return real(*args, **kwargs)

    monkeypatch.setattr(preparation, "measure", measure)
    assert len(open_dataset(config)) == 60


def test_nothing_to_learn_from(tmp_path):
    made = [{"id": "a", "conversations": []}]
    config = small.changed(small.write(tmp_path, made), data={"max_bad_fraction": 1.0})
    with pytest.raises(ValueError, match="source small: got nothing to learn from in 1"):
        open_dataset(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"sources": {}}}, "no config.data.sources"),
        ({"data": {"tokenizer": ""}}, "no config.data.tokenizer"),
        ({"data": {"tokenizer": "nowhere"}}, "nowhere, expected a folder with a tokenizer"),
        ({"data": {"conversation_tokens": 4000}}, "4000 for rows of config.batch.tokens = 320"),
        ({"data": {"image_size": 30}}, "image_size = 30, expected a multiple of"),
        ({"data": {"max_bad_fraction": 1.5}}, "max_bad_fraction = 1.5, expected 0 to 1"),
        ({"data": {"template": "v7"}}, "got template 'v7', expected one of"),
        ({"batch": {"conversations": 0}}, "config.batch.conversations = 0, expected 1 or more"),
        ({"batch": {"images": 0}}, "config.batch.images = 0, expected 1 or more"),
        ({"epochs": 0}, "config.epochs = 0, expected 1 or more"),
        ({"data": {"patch_size": 0}}, "config.data.patch_size = 0, expected 1 or more"),
        ({"data": {"patch_size": -14}}, "config.data.patch_size = -14, expected 1 or more"),
        ({"data": {"image_size": 0}}, "config.data.image_size = 0, expected 1 or more"),
        ({"data": {"threads": 0}}, "config.data.threads = 0, expected 1 or more"),
        ({"data": {"workers": -1}}, "config.data.workers = -1, expected 0 or more"),
        ({"data": {"prepared": ""}}, "no config.data.prepared"),
        ({"data": {"sources": {"a": Source("x", epochs=0)}}}, "sources.a.epochs = 0, expected 1"),
        ({"data": {"sources": {"a": Source("nowhere.json")}}}, "nowhere.json"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, says):
    with pytest.raises((ValueError, OSError)) as error:
        open_dataset(small.changed(small.write(tmp_path), **changes))
    assert says in str(error.value)


def test_start_and_end_tokens_the_tokenizer_lacks(tmp_path):
    config = small.changed(small.write(tmp_path), data={"start_end_tokens": True})
    open_dataset(config)
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).unlink()
    with pytest.raises(ValueError, match="no token '<im_start>'"):
        open_dataset(config)


CHANGES = [
    {"data": {"template": "v0"}},
    {"data": {"image_at": "as_written"}},
    {"data": {"text_restarts": False}},
    {"data": {"image_mode": "crop"}},
    {"data": {"image_size": 56}},
    {"data": {"conversation_tokens": 200}},
    {"data": {"too_long": "drop"}},
    {"batch": {"tokens": 400}},
    {"batch": {"images": 5}},
    {"batch": {"pack": False}},
    {"batch": {"conversations": 4}},
    {"seed": 8},
]


def test_another_data_set_has_another_fingerprint(tmp_path):
    config = small.write(tmp_path)
    first = open_dataset(config)
    digests = {first.digest}
    for change in CHANGES:
        other = open_dataset(small.changed(config, **change))
        digests.add(other.digest)
        assert differences(first.fingerprint, other.fingerprint)
    assert len(digests) == 1 + len(CHANGES)
    for change in ({"data": {"workers": 2, "threads": 5}}, {"epochs": 3}, {"name": "x"}):
        assert open_dataset(small.changed(config, **change)).digest == first.digest


def test_the_fingerprint_knows_the_data_and_the_tokenizer_but_not_where_they_lie(tmp_path):
    first = open_dataset(small.write(tmp_path / "a"))
    moved = open_dataset(small.write(tmp_path / "b"))
    assert moved.digest == first.digest
    config = small.write(tmp_path / "c", small.entries(59))
    (difference,) = differences(first.fingerprint, open_dataset(config).fingerprint)
    assert difference.startswith("source small: ")
    config = small.write(tmp_path / "d")
    (tmp_path / "d/tokenizer/added_tokens.json").unlink()
    file = tmp_path / "d/tokenizer/tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "legacy": True}))
    (difference,) = differences(first.fingerprint, open_dataset(config).fingerprint)
    assert difference.startswith("tokenizer: ")


def test_another_vocabulary_with_the_same_special_tokens(tmp_path):
    config = small.write(tmp_path)
    digests = set()
    for size in (512, 600):
        write_tokenizer(tmp_path / "tokenizer", vocab_size=size)
        (tmp_path / "tokenizer/added_tokens.json").unlink(missing_ok=True)
        digests.add(open_dataset(config).digest)
    assert len(digests) == 2


def test_fingerprints_survive_json(tmp_path):
    fingerprint = open_dataset(small.write(tmp_path)).fingerprint
    stored = json.loads(json.dumps(fingerprint, default=str))
    assert differences(fingerprint, stored) == []
    stored["seed"] = 9
    del stored["packed"]
    assert differences(fingerprint, stored) == [
        "packed: true here, nothing there",
        "seed: 7 here, 9 there",
    ]


def test_lengths_that_were_kept_and_damaged(tmp_path):
    config = small.write(tmp_path)
    open_dataset(config)
    (kept,) = (tmp_path / "prepared").iterdir()
    (kept / "lengths.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="remove the folder, and they are counted again"):
        open_dataset(config)
    shutil.rmtree(kept)
    assert len(open_dataset(config)) == 60
