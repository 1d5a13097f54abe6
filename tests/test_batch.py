"""The Batch contract: fake batches are valid, and each broken promise says got and expected."""

from typing import Any

import jax
import numpy as np
import pytest

from llava_jax import batch as batches
from llava_jax.batch import ROW_END, TEXT, Batch, fake_batch, shape_batch, validate

MODEL: dict[str, Any] = {"tokens_per_image": 4, "image_size": 28, "vocab_size": 300}


def make(**changes) -> Batch:
    settings = {"rows": 4, "tokens": 48, "images": 3, "segments": 2, **MODEL, **changes}
    return fake_batch(**settings)


def row_with_two_images() -> Batch:
    """One row by hand: segment 1 = image 0 and 3 ids; segment 2 = 2 ids and image 1; 2 padding."""
    image = [[0, 1, 2, 3], [4, 5, 6, 7]]
    return Batch(
        token_RT=np.array([[0, 0, 0, 0, 11, 12, 13, 21, 22, 0, 0, 0, 0, 0, 0]], np.int32),
        target_RT=np.array([[0, 0, 0, 11, 12, 13, 0, 22, 0, 0, 0, 0, 0, 0, 0]], np.int32),
        segment_RT=np.array([[1] * 7 + [2] * 6 + [0] * 2], np.int32),
        position_RT=np.array([[*range(7), *range(6), 0, 0]], np.int32),
        source_RT=np.zeros((1, 15), np.int32),
        loss_weight_RT=np.array([[0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]], np.float32),
        pixel_RKHW3=np.zeros((1, 2, 28, 28, 3), np.uint8),
        image_index_RT=np.array([[*image[0], *[TEXT] * 5, *image[1], TEXT, TEXT]], np.int32),
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"images": 0}, {"images": 1, "segments": 1}, {"segments": 5}, {"rows": 9, "images": 2}],
)
def test_a_fake_batch_is_valid(changes):
    batch = make(**changes)
    validate(batch, **MODEL)
    assert (batch.loss_weight_RT > 0).any(axis=1).all()
    assert (batch.segment_RT[:, -1] == batches.PADDING).all()


def test_fake_batches_put_images_first_and_last():
    batch = make(rows=6)
    is_image = batch.image_index_RT != TEXT
    last = np.count_nonzero(batch.segment_RT, axis=1) - 1
    assert is_image[:, 0].any()
    assert is_image[np.arange(6), last].any()
    assert not is_image[:, 0].all()


def test_the_row_by_hand_is_valid():
    validate(row_with_two_images(), **MODEL)


def test_a_batch_is_a_pytree_without_knowing_jax():
    doubled = jax.tree.map(lambda leaf: leaf * 2, make())
    assert isinstance(doubled, Batch)


def test_a_shape_batch_has_the_shapes_and_no_memory():
    real, shapes = make(), shape_batch(rows=4, tokens=48, images=3, image_size=28)
    for got, want in zip(shapes, real, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
    pod = shape_batch(rows=4096, tokens=2048, images=8, image_size=336)
    assert pod.pixel_RKHW3.strides == (0, 0, 0, 0, 0)  # 11 GB that are one byte


def change(name, at, value):
    def apply(batch: Batch) -> Batch:
        array = getattr(batch, name).copy()
        array[at] = value
        return batch._replace(**{name: array})

    return apply


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda b: b._replace(token_RT=b.token_RT[0]), r"got shape \(15,\), expected \[rows"),
        (
            lambda b: b._replace(target_RT=b.target_RT[:, 1:]),
            r"target_RT: got shape \(1, 14\), expected \(1, 15\)",
        ),
        (
            lambda b: b._replace(pixel_RKHW3=b.pixel_RKHW3[:, :, :14]),
            r"pixel_RKHW3: got shape \(1, 2, 14, 28, 3\), expected \(1, 2, 28, 28, 3\)",
        ),
        (
            lambda b: b._replace(pixel_RKHW3=b.pixel_RKHW3.astype(np.float32)),
            "got dtype float32, expected uint8",
        ),
        (
            lambda b: b._replace(token_RT=b.token_RT.astype(np.int64)),
            "token_RT: got dtype int64, expected int32",
        ),
        (change("token_RT", (0, 4), 300), "token 4: got token id 300, expected 0 to 299"),
        (change("token_RT", (0, 0), -200), "got token id -200"),  # the reference's image id
        (change("target_RT", (0, 4), -100), "got target id -100"),  # and its ignored label
        (change("loss_weight_RT", (0, 4), np.nan), "got loss weight nan, expected a finite"),
        (change("loss_weight_RT", (0, 4), -1), "got loss weight -1.0"),
        (change("segment_RT", (0, slice(7)), 3), "got segments 3×7 2×6 0×2, expected 1, 2"),
        (change("segment_RT", (0, slice(0, 2)), 0), "got segments 0×2 1×5 2×6 0×2"),
        (change("position_RT", (0, 8), 8), "token 8: got position 8 in segment 2, expected 1"),
        (change("loss_weight_RT", (0, 14), 1), "on padding, expected 0"),
        (change("loss_weight_RT", (0, 6), 1), "on the last of segment 1, expected 0"),
        (change("target_RT", (0, 4), 11), "got target 11, expected the next token, 12"),
        (change("loss_weight_RT", (0, 1), 1), "where an image's feature comes next"),
        (change("image_index_RT", (0, 4), 8), r"got image_index 8, expected -1 .* 0 to 7 \(2 slo"),
        (change("image_index_RT", (0, 4), ROW_END), "got image_index -2, expected -1"),
        (
            change("image_index_RT", (0, 3), TEXT),
            "image slot 0: got 3 placeholders for 4 features",
        ),
        (change("image_index_RT", (0, 4), 0), "image slot 0: got 5 placeholders for 4"),
        (change("image_index_RT", (0, slice(4)), [0, 2, 1, 3]), "out of order or twice"),
        (change("image_index_RT", (0, slice(4)), [0, 1, 1, 3]), "out of order or twice"),
        (
            lambda b: change("image_index_RT", (0, slice(4)), [TEXT, 1, 2, 3])(
                change("image_index_RT", (0, 8), 0)(b)
            ),
            "image slot 0: got",
        ),
        (change("image_index_RT", (0, 13), 0), "got an image in padding"),
        (change("source_RT", (0, 3), -1), "got source -1, expected numbers from 0"),
        (
            lambda b: change("image_index_RT", (0, slice(1, 5)), [TEXT, 1, 2, 3])(b),
            "image slot 0: got text between its features",
        ),
    ],
)
def test_each_broken_promise_is_named(breaks, message):
    with pytest.raises(ValueError, match=message):
        validate(breaks(row_with_two_images()), **MODEL)


def test_tiles_may_lose_features_where_row_ends_are_learned():
    batch = row_with_two_images()
    batch = change("image_index_RT", (0, 2), ROW_END)(batch)
    batch = change("image_index_RT", (0, 3), TEXT)(batch)
    validate(batch._replace(loss_weight_RT=0 * batch.loss_weight_RT), row_end=True, **MODEL)
    with pytest.raises(ValueError, match="got image_index -2"):
        validate(batch, **MODEL)
    with pytest.raises(ValueError, match="got an image in padding"):
        validate(change("image_index_RT", (0, 14), ROW_END)(batch), row_end=True, **MODEL)


def test_a_fake_batch_says_when_its_images_do_not_fit():
    with pytest.raises(ValueError, match="expected room for the images"):
        make(tokens=16, images=8)
