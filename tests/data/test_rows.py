"""Rows of the plan: what stands where, held to an independent reading, and broken pictures."""

import dataclasses
import errno

import numpy as np
import pytest

from llava_jax import conversation, image, tokenizer
from llava_jax.batch import Batch, validate
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.pictures import RootedPicture
from llava_jax.data.rows import Row, read_row
from tests.data import small

P = (small.SIZE // small.PATCH) ** 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return open_dataset(small.write(tmp_path_factory.mktemp("small")))


def batched(rows: list[Row]) -> Batch:
    return Batch._make(np.stack(arrays) for arrays in zip(*(r.arrays for r in rows), strict=True))


def test_every_row_keeps_the_batchs_promises(dataset):
    plan = dataset.plan(epoch=0)
    rows = [read_row(dataset, plan[r]) for r in range(len(plan))]
    validate(batched(rows), tokens_per_image=P, image_size=small.SIZE, vocab_size=514)
    ids = sorted(segment.id for row in rows for segment in row.segments)
    assert ids == sorted(entry["id"] for entry in small.entries())
    assert sum(int((row.arrays.segment_RT > 0).sum()) for row in rows) == dataset.tokens_N.sum()


def test_a_row_token_by_token(dataset):
    """Against plain lists, filled one token after another."""
    plan = dataset.plan(epoch=0)
    for r in range(len(plan)):
        row = read_row(dataset, plan[r])
        token, target, segment, position, weight, index, pictures = [], [], [], [], [], [], []
        for number, example in enumerate(plan[r], 1):
            entry = small.entries()[dataset.entry_N[example]]
            names = entry.get("image", [])
            names = [names] if isinstance(names, str) else names
            rest = iter(names)
            turns = conversation.parse(entry["conversations"], len(names))
            pieces = conversation.pieces(turns, conversation.template("v1"))
            ids, mask = tokenizer.render(dataset.renderer.tokenizer, pieces)
            flat = []
            for id, learned in zip(ids, mask, strict=True):
                if id != tokenizer.IMAGE:
                    flat.append((id, learned, -1))
                    continue
                flat += [(0, False, len(pictures) * P + feature) for feature in range(P)]
                pictures.append(next(rest))
            for t, (id, _, feature) in enumerate(flat):
                following = flat[t + 1] if t + 1 < len(flat) else (0, False, -1)
                token.append(id)
                target.append(following[0])
                weight.append(float(following[1]))
                segment.append(number)
                position.append(t)
                index.append(feature)
        got = row.arrays
        n = len(token)
        assert got.token_RT[:n].tolist() == token
        assert got.target_RT[:n].tolist() == target
        assert got.segment_RT[:n].tolist() == segment
        assert got.position_RT[:n].tolist() == position
        assert got.loss_weight_RT[:n].tolist() == weight
        assert got.image_index_RT[:n].tolist() == index
        assert not got.segment_RT[n:].any()
        assert not got.loss_weight_RT[n:].any()
        assert [name for s in row.segments for name in s.pictures] == pictures
        folder = dataset.config.data.sources["small"].images[0]
        for k, name in enumerate(pictures):
            expected = image.ImageProcessing("pad", small.SIZE).process(f"{folder}/{name}")
            np.testing.assert_array_equal(got.pixel_RKHW3[k], expected[0])


def test_no_examples_at_all(dataset):
    row = read_row(dataset, [])
    validate(batched([row]), tokens_per_image=P, image_size=small.SIZE, vocab_size=514)
    assert not any(array.any() for array in row.arrays[:-1])
    assert (row.arrays.image_index_RT == -1).all()
    assert row.segments == ()


@pytest.mark.parametrize("broken", ["missing", "damaged", "folder", "html"])
@pytest.mark.filterwarnings("ignore:::PIL")
def test_a_broken_picture_costs_its_conversation_and_no_other(tmp_path, broken):
    dataset = open_dataset(small.write(tmp_path))
    plan = dataset.plan(epoch=0)
    number = next(n for n in range(len(plan)) if dataset.pictures_N[plan[n]].any())
    before = read_row(dataset, plan[number])
    at = next(n for n, segment in enumerate(before.segments) if segment.pictures)
    name = before.segments[at].pictures[0]
    file = tmp_path / "images" / name
    whole = file.read_bytes()
    file.unlink()
    if broken == "damaged":
        file.write_bytes(whole[: len(whole) // 2])
    elif broken == "html":
        file.write_text("<html>404</html>")
    elif broken == "folder":
        file.mkdir()
    after = read_row(dataset, plan[number])
    again = read_row(dataset, plan[number])
    for first, second in zip(after.arrays, again.arrays, strict=True):
        np.testing.assert_array_equal(first, second)
    segment_T = before.arrays.segment_RT
    lost = [n for n, s in enumerate(before.segments, 1) if name in s.pictures]
    assert [n for n, s in enumerate(after.segments, 1) if s.skipped] == lost
    assert name.split("/")[-1] in str(after.segments[at].skipped)
    weight_T = np.where(np.isin(segment_T, lost), 0, before.arrays.loss_weight_RT)
    np.testing.assert_array_equal(after.arrays.loss_weight_RT, weight_T)
    names = [name for s in before.segments for name in s.pictures]
    for k, shown in enumerate(names):
        if shown == name:
            assert (after.arrays.pixel_RKHW3[k] == (122, 116, 104)).all()
        else:
            np.testing.assert_array_equal(after.arrays.pixel_RKHW3[k], before.arrays.pixel_RKHW3[k])
    for field in ("token_RT", "segment_RT", "position_RT", "image_index_RT", "target_RT"):
        np.testing.assert_array_equal(getattr(after.arrays, field), getattr(before.arrays, field))


def test_a_disk_that_fails_is_no_broken_picture(dataset, monkeypatch):
    """Else a run on a bad day would learn nothing, and never say so."""

    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(RootedPicture, "read", fail)
    plan = dataset.plan(epoch=0)
    with pytest.raises(OSError, match=r"cannot read \S+\.(png|jpg) of e\d+: .*Input/output"):
        for r in range(len(plan)):
            read_row(dataset, plan[r])


def test_data_that_changed_since_it_was_prepared(dataset):
    longer = dataclasses.replace(dataset, tokens_N=dataset.tokens_N + 1)
    with pytest.raises(ValueError, match=r"entry \d+ \(e\d+\): got .* as prepared: the data chang"):
        read_row(longer, [3])
