"""What COCO would say of a scene: five captions, each worded in another way, and instance boxes."""

import random
from collections.abc import Sequence
from typing import Any

from llava_jax.picture_world.drawing import Box
from llava_jax.picture_world.scenes import SHAPES, SIGN, SIZES, Scene
from llava_jax.picture_world.words import a, counted, full, listing

CATEGORIES = (*SHAPES, SIGN)  # in COCO's files, number 1 is the first


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five. The first names every object with its size and place; the others are drawn."""
    kinds = [_counted, _grouped, _by_size, _one_first]
    if any(_neighbours(scene)):
        kinds.append(_related)
    if scene.empty_cells:
        kinds.append(_with_a_gap)
    if len(scene.shapes) > 1:
        kinds.append(_colours)
    return [_places(scene), *(kind(scene, rng) for kind in rng.sample(kinds, 4))]


def description(scene: Scene) -> str:
    """Everything there is to say of a scene, in sentences."""
    sentences = [f"there {_is(len(scene.things))} {counted(len(scene.things), 'object')}"]
    sentences[0] += f" on a {scene.background} background."
    sentences += [f"at the {thing.cell} is {full(thing)}." for thing in scene.things]
    if scene.empty_cells:
        empty = [f"the {cell}" for cell in scene.empty_cells]
        sentences.append(f"{listing(empty)} {_is(len(empty))} empty.")
    sentences.append(f"the drawing is {scene.style}.")
    return " ".join(sentences)


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _places(scene: Scene) -> str:
    return listing([f"{full(thing)} at the {thing.cell}" for thing in scene.things])


def _counted(scene: Scene, rng: random.Random) -> str:
    things = rng.sample(scene.things, len(scene.things))
    number = counted(len(things), "object")
    return f"{number} on a {scene.background} background: {listing([a(t) for t in things])}"


def _grouped(scene: Scene, rng: random.Random) -> str:
    present = [thing.shape for thing in scene.things]
    groups = [counted(present.count(shape), shape) for shape in dict.fromkeys(present)]
    return f"a {scene.style} drawing of {listing(groups)}"


def _by_size(scene: Scene, rng: random.Random) -> str:
    present = [thing.size for thing in scene.shapes]
    groups = [counted(present.count(size), f"{size} thing") for size in SIZES if size in present]
    if len(scene.things) > len(scene.shapes):
        groups.append("a sign")
    return f"a picture with {listing(groups)}"


def _one_first(scene: Scene, rng: random.Random) -> str:
    first = rng.choice(scene.things)
    others = len(scene.things) - 1
    end = f", and {counted(others, 'more object')}" if others else ", and nothing more"
    return f"there is {full(first)} at the {first.cell}{end}"


def _neighbours(scene: Scene) -> list[str]:
    found = []
    for one in scene.things:
        for other in scene.things:
            if one.row == other.row and one.column < other.column:
                found += [f"{a(one)} to the left of {a(other)}"]
                found += [f"{a(other)} to the right of {a(one)}"]
            if one.column == other.column and one.row < other.row:
                found += [f"{a(one)} above {a(other)}", f"{a(other)} below {a(one)}"]
    return found


def _related(scene: Scene, rng: random.Random) -> str:
    return rng.choice(_neighbours(scene))


def _with_a_gap(scene: Scene, rng: random.Random) -> str:
    thing = rng.choice(scene.things)
    return f"nothing at the {rng.choice(scene.empty_cells)}, but {a(thing)} at the {thing.cell}"


def _colours(scene: Scene, rng: random.Random) -> str:
    colours = list(dict.fromkeys(thing.colour for thing in scene.shapes))
    rng.shuffle(colours)
    number = counted(len(colours), "colour")
    return f"{number} on a {scene.background} background: {listing(colours)}"


def coco(
    names: Sequence[str], size: int, boxes: Sequence[Sequence[Box]], scenes: Sequence[Scene]
) -> dict[str, Any]:
    """A split's instances file: COCO's layout, box [x, y, width, height] in pixels."""
    annotations = []
    for image, (found, scene) in enumerate(zip(boxes, scenes, strict=True), 1):
        for box, thing in zip(found, scene.things, strict=True):
            about = {"text": thing.text} if thing.is_sign else {"colour": thing.colour}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": CATEGORIES.index(thing.shape) + 1,
                    "bbox": [box.x, box.y, box.width, box.height],
                    "area": box.area,
                    "iscrowd": 0,
                    "attributes": about,
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": SIGN if name == SIGN else "shape"}
        for number, name in enumerate(CATEGORIES, 1)
    ]
    return {**_about(names, size), "annotations": annotations, "categories": categories}


def coco_captions(
    names: Sequence[str], size: int, captions: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """A split's captions file."""
    annotations = [
        {"image_id": image, "id": 5 * (image - 1) + number, "caption": caption}
        for image, five in enumerate(captions, 1)
        for number, caption in enumerate(five, 1)
    ]
    return {**_about(names, size), "annotations": annotations}


def _about(names: Sequence[str], size: int) -> dict[str, Any]:
    images = [
        {"id": image, "file_name": name, "width": size, "height": size, "license": 1}
        for image, name in enumerate(names, 1)
    ]
    return {
        "info": {"description": "llava_jax picture world", "version": "1.0"},
        "licenses": [{"id": 1, "name": "free of rights: drawn by a program", "url": ""}],
        "images": images,
    }
