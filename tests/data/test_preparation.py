"""One look at all the data: lengths that are right, and everything odd counted and named."""

import dataclasses
import json

import numpy as np
import pytest

from llava_jax.data import examples, preparation, spreading
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.source import open_source
from tests.data import small
from tests.data.small import conversation


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return open_dataset(small.write(tmp_path_factory.mktemp("small")))


def opened(folder, made) -> Dataset:
    config = small.write(folder, [*small.entries(3), *made])
    return open_dataset(small.changed(config, data={"max_bad_fraction": 1.0}), check=None)


def measured(folder, made, processes=1):
    dataset = opened(folder, made)
    source = dataset.sources["small"]
    entry_N = np.arange(len(source))
    return preparation.measure(source, entry_N, dataset.renderer, processes=processes)


def test_lengths_are_those_of_the_rows(dataset):
    lengths = dataset.lengths["small"]
    for place, index in enumerate(lengths.entry_N):
        example = dataset.renderer(dataset.sources["small"][int(index)])
        assert lengths.tokens_N[place] == example.tokens
        assert lengths.learned_N[place] == example.learned
        assert lengths.pictures_N[place] == example.pictures
        assert lengths.turns_N[place] == example.turns
    assert len(lengths.entry_N) == 60
    assert not lengths.refused.count


def bad_entries() -> list:
    def entry(*texts: str, **fields) -> dict:
        return {"id": f"bad{len(texts)}", "conversations": conversation(*texts), **fields}

    return [
        7,
        {"id": "x"},
        {"id": "x", "conversations": {}},
        entry("q", "a", image="0.png"),
        entry("<image> q", "a"),
        entry("q", "<image> a", image="0.png"),
        entry("", "a"),
        entry("q", ""),
        {"id": "x", "conversations": [{"from": "human", "value": "q"}] * 2},
        {"id": "x", "conversations": [{"from": "gpt", "value": "a"}]},
        {"id": "x", "conversations": [{"from": "system", "value": "a"}]},
        {"id": "x", "conversations": [{"from": "human", "value": 3}]},
        {"id": "x", "conversations": []},
        entry("<image>q", "a", image="/etc/passwd"),
        entry("<image>q", "a", image="../chat.json"),
        entry("<image>q", "a", image=3),
    ]


def test_what_is_refused_is_counted_by_kind_and_named(tmp_path):
    lengths = measured(tmp_path, bad_entries())
    assert lengths.refused.count.total() == len(bad_entries())
    assert lengths.usable.tolist() == [True] * 3 + [False] * len(bad_entries())
    assert lengths.refused.count["image path outside its root"] == 2
    for kind in (
        "image without <image>",
        "<image> without an image",
        "<image> in an answer",
        "empty question",
        "nothing to learn",
        "same side twice",
        "only an answer",
        "unknown role",
        "turn without text",
        "no turns",
    ):
        assert lengths.refused.count[kind] == 1, kind
    for kind, first in lengths.refused.first.items():
        assert all("entry " in example for example in first), kind


def test_repairs_and_repetitions_are_counted(tmp_path):
    typed = {"id": "t", "conversations": conversation("what is </s>?", "USER: nothing")}
    lengths = measured(tmp_path, [typed, typed, {**typed, "id": "other"}])
    assert lengths.repaired.count == {examples.TYPED_SPECIAL: 3, examples.TYPED_ROLE: 3}
    assert lengths.repeated.count == {
        "an id that came before": 1,
        "a conversation that came before": 2,
    }


def test_processes_find_what_one_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(spreading, "_CHUNK", 7)
    made = [*small.entries(40), *bad_entries()]
    one, several = (measured(tmp_path, made, processes=n) for n in (1, 2))
    for name in ("entry_N", "tokens_N", "learned_N", "pictures_N", "turns_N"):
        np.testing.assert_array_equal(getattr(several, name), getattr(one, name))
    for name in ("refused", "repaired", "repeated"):
        assert getattr(several, name) == getattr(one, name)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    lengths = measured(tmp_path / "data", bad_entries())
    preparation.save(lengths, tmp_path / "kept")
    loaded = preparation.load(tmp_path / "kept")
    assert loaded is not None
    for name in ("entry_N", "tokens_N", "learned_N", "pictures_N", "turns_N"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(lengths, name))
        assert getattr(loaded, name).dtype == getattr(lengths, name).dtype
    assert loaded.refused == lengths.refused
    assert preparation.load(tmp_path / "nothing") is None


def test_what_was_kept_and_edited(tmp_path):
    lengths = measured(tmp_path / "data", [])
    preparation.save(lengths, tmp_path / "kept")
    with (tmp_path / "kept/lengths.npz").open("wb") as file:
        np.savez(file, entry_N=lengths.entry_N, tokens_N=lengths.tokens_N + 1)
    with pytest.raises(ValueError, match=r"is not what was written.*remove the folder"):
        preparation.load(tmp_path / "kept")


@pytest.mark.parametrize("name", ["lengths.npz", "report.json"])
def test_what_was_kept_and_damaged(tmp_path, name):
    preparation.save(measured(tmp_path / "data", []), tmp_path / "kept")
    whole = (tmp_path / "kept" / name).read_bytes()
    (tmp_path / "kept" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"kept, which cannot be read.*remove the folder"):
        preparation.load(tmp_path / "kept")


def test_the_key_is_of_all_that_lengths_depend_on(dataset, tmp_path):
    source, renderer = dataset.sources["small"], dataset.renderer
    entry_N = np.arange(5)
    said = preparation.key(source, entry_N, renderer)
    (tmp_path / "other.json").write_text(json.dumps(small.entries(59)))
    others = [
        preparation.key(source, np.arange(6), renderer),
        preparation.key(open_source(tmp_path / "other.json", images=[tmp_path]), entry_N, renderer),
        preparation.key(
            dataset.sources["small"], entry_N, dataclasses.replace(renderer, max_tokens=9)
        ),
    ]
    assert len({said, *others}) == 4
    assert preparation.key(source, np.arange(5), renderer) == said
