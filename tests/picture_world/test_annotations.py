"""COCO files: captions are true and various, boxes and categories are those of the pictures."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from llava_jax.picture_world.scenes import SPLITS
from tests.picture_world import oracle


def captions_by_image(world, split) -> dict[str, list[str]]:
    coco = world.json(f"annotations/captions_{split}.json")
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for row in coco["annotations"]:
        found[names[row["image_id"]]].append(row["caption"])
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_is_true_of_its_picture(world, split):
    for name, five in captions_by_image(world, split).items():
        seen = world.reading(f"{split}/{name}")
        assert len(set(five)) == 5
        assert all(oracle.says_true(text, seen) for text in five), (name, five)
        for thing in seen.things:
            assert thing.full in five[0]


def test_a_caption_of_another_picture_is_found_out(world):
    """The reader of captions must be able to say no."""
    found = captions_by_image(world, "train")
    names = list(found)
    told = [
        oracle.says_true(text, world.reading(f"train/{other}"))
        for name, other in itertools.pairwise(names)
        for text in found[name][:1]
    ]
    assert not any(told)


def test_captions_are_worded_in_many_ways(world):
    attributes = "|".join([*oracle.COLOURS, *oracle.CELLS, *oracle.SHAPES, "sign says [A-Z]+"])
    skeletons = Counter()
    for five in captions_by_image(world, "train").values():
        of_one = {re.sub(rf"\b({attributes}|small|big)\b", "_", text) for text in five}
        assert len(of_one) == 5
        skeletons.update(of_one)
    assert len(skeletons) > 100


@pytest.mark.parametrize("split", SPLITS)
def test_instances_are_what_the_pictures_show(world, split):
    coco = world.json(f"annotations/instances_{split}.json")
    assert {"info", "licenses", "images", "annotations", "categories"} <= coco.keys()
    categories = {row["id"]: row["name"] for row in coco["categories"]}
    assert sorted(categories.values()) == sorted([*oracle.SHAPES, "sign"])
    assert len({row["id"] for row in coco["annotations"]}) == len(coco["annotations"])
    assert coco["images"] == world.json(f"annotations/captions_{split}.json")["images"]
    boxes = {image["id"]: [] for image in coco["images"]}
    for row in coco["annotations"]:
        assert row["iscrowd"] == 0
        assert 0 < row["area"] <= row["bbox"][2] * row["bbox"][3]
        boxes[row["image_id"]].append(row)
    for image in coco["images"]:
        assert (image["width"], image["height"]) == (48, 48)
        seen = world.reading(f"{split}/{image['file_name']}")
        for thing, row in zip(seen.things, boxes[image["id"]], strict=True):
            assert categories[row["category_id"]] == thing.shape
            assert row["attributes"] == (
                {"text": thing.text} if thing.text else {"colour": thing.colour}
            )
            x, y, width, height = row["bbox"]
            # The reader leaves out faint edges, and JPEG adds some: a pixel on each side.
            assert np.abs(np.subtract((x, y, x + width, y + height), thing.box)).max() <= 1
