"""Drawings: an independent reader sees in them what the scene says; boxes hold the drawn pixels."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from llava_jax.picture_world.drawing import boxes, draw, encode
from llava_jax.picture_world.scenes import SHAPES, SIZES, SPLITS, Scene, Thing, scene
from tests.picture_world import oracle

SOME = [(split, index) for split in SPLITS for index in range(15)]


@pytest.mark.parametrize(("size", "suffix"), [(48, ".jpg"), (48, ".png"), (100, ".jpg")])
def test_a_reader_of_pixels_sees_what_the_scene_says(size, suffix):
    for split, index in SOME:
        one = scene(1, split, index)
        with Image.open(io.BytesIO(encode(draw(one, size), suffix))) as picture:
            seen = oracle.read(picture)
        assert (seen.background, seen.style) == (one.background, one.style)
        found = [(cell, t.colour, t.shape, t.size, t.text) for cell, t in seen.at.items()]
        assert found == [(t.cell, t.colour, t.shape, t.size, t.text) for t in one.things]


@pytest.mark.parametrize("size", [32, 48, 77, 200])
def test_boxes_enclose_exactly_the_drawn_pixels(size):
    for split, index in SOME[:: 5 if size == 200 else 2]:
        one = scene(2, split, index)
        whole_HW3 = np.asarray(draw(one, size), int)
        for thing, box in zip(one.things, boxes(one, size), strict=True):
            rest = dataclasses.replace(one, things=tuple(t for t in one.things if t != thing))
            changed_HW = (whole_HW3 != np.asarray(draw(rest, size), int)).any(-1)
            rows, columns = np.flatnonzero(changed_HW.any(1)), np.flatnonzero(changed_HW.any(0))
            assert (box.x, box.y) == (columns[0], rows[0])
            assert (box.width, box.height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
            # Edges are covered in part, so the area is a little less than the pixels changed.
            assert 0.45 * changed_HW.sum() < box.area <= changed_HW.sum()


def alone(shape: str, size: str, colour: str = "red") -> Scene:
    return Scene((Thing(shape, colour, size, "top-left", (0.0, 0.0)),), "dark", "flat", 0)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_differ_within_one_patch(size):
    """What a patch of 8 pixels at the object's middle shows, at 48: the small ViT sees no more."""
    patch_HW = {
        shape: np.asarray(draw(alone(shape, size), 48), float)[8:16, 8:16, 0] / 222
        for shape in SHAPES
    }
    for one, other in itertools.combinations(SHAPES, 2):
        # Least: 0.098, a big circle and the middle of a big cross; all others 0.26 and more.
        assert np.abs(patch_HW[one] - patch_HW[other]).mean() > 0.09, (one, other)


def test_the_area_of_a_circle():
    [small], [big] = boxes(alone("circle", "small"), 480), boxes(alone("circle", "big"), 480)
    # Measured worst 0.06 %: a polygon of 64 corners, and edges in quarters of a pixel.
    assert small.area == pytest.approx(np.pi * (0.12 * 480) ** 2, rel=0.002)
    assert big.area == pytest.approx(np.pi * (0.20 * 480) ** 2, rel=0.002)


def test_drawing_twice_gives_the_same_bytes():
    one = scene(0, "train", 5)
    for suffix, kind in ((".png", "PNG"), (".jpg", "JPEG")):
        data = encode(draw(one, 48), suffix)
        assert data == encode(draw(one, 48), suffix)
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, picture.mode, picture.size) == (kind, "RGB", (48, 48))
            change = np.abs(np.asarray(picture, int) - np.asarray(draw(one, 48), int))
        # JPEG: measured worst 2.9 of 100 scenes, mostly the grain; PNG has no loss.
        assert change.mean() < (4 if kind == "JPEG" else 1e-9)
