"""What the frozen features hold: a linear reading of them, on scenes the tower never saw.

For each object, one patch's features, the one at its middle, by ridge regression onto one-hot
answers; the count from the mean over patches. Four in five scenes fit the reading, and the figures
are of the others. A tower that was never trained stands beside it: colours leak through anything.

Dims: S scenes, P patches, E width of features, A answers.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from llava_jax.models.clip_vit import ClipConfig, ClipVit
from llava_jax.optim import Params
from llava_jax.picture_world import drawing
from llava_jax.picture_world.scenes import (
    CELLS,
    COLOURS,
    SHAPES,
    SIGN,
    SIGN_TEXTS,
    SIZES,
    Thing,
    scene,
)
from llava_jax.picture_world.towers.seeing import COMPUTE

# What is read of an object, and of which objects: all, shapes, or signs.
_READ: Mapping[str, tuple[tuple[str, ...], Callable[[Thing], str], Callable[[Thing], bool]]] = {
    "colour": (COLOURS, lambda thing: thing.colour, lambda thing: not thing.is_sign),
    "shape": ((*SHAPES, SIGN), lambda thing: thing.shape, lambda thing: True),
    "size": (SIZES, lambda thing: thing.size, lambda thing: not thing.is_sign),
    "position": (CELLS, lambda thing: thing.cell, lambda thing: True),
    "sign": (SIGN_TEXTS, lambda thing: thing.text, lambda thing: thing.is_sign),
}
# What a tower must reach before it is worth freezing.
GATE = {"colour": 0.98, "shape": 0.93, "size": 0.95, "position": 0.97, "count": 0.85}
_FITS = 0.8  # of the scenes
_RIDGE = 1e-3


def probe(
    config: ClipConfig, vision: Params, *, layer: int = -2, split: str, seed: int, scenes: int
) -> dict[str, float]:
    """Share of right readings, by attribute."""
    seen = [scene(seed, split, index) for index in range(scenes)]
    pixels = [np.asarray(drawing.draw(one, config.image_size)) for one in seen]
    feature_SPE = features(config, vision, np.stack(pixels), layer)
    fits = int(_FITS * scenes)
    found = {}
    for name, (answers, of, wanted) in _READ.items():
        at = [(s, thing) for s, one in enumerate(seen) for thing in one.things if wanted(thing)]
        x = np.stack([feature_SPE[s, _patch(thing, config.grid)] for s, thing in at])
        y = np.array([answers.index(of(thing)) for _, thing in at])
        found[name] = _read(x, y, len(answers), np.array([s < fits for s, _ in at]))
    count = np.array([len(one.things) - 1 for one in seen])
    found["count"] = _read(feature_SPE.mean(axis=1), count, 4, np.arange(scenes) < fits)
    return found


def features(config: ClipConfig, vision: Params, pixel_SHW3: np.ndarray, layer: int) -> np.ndarray:
    """The patches' features as LLaVA reads them. vision: all blocks, or as many as are needed."""
    config = dataclasses.replace(config, select_layers=(layer,), select="patch")
    layers = jax.tree.map(lambda leaf: leaf[: config.num_blocks], vision["layers"])
    tower = ClipVit(config, COMPUTE)
    apply = jax.jit(lambda params, pixel_IHW3: tower.apply({"params": params}, pixel_IHW3))
    return np.asarray(apply({**vision, "layers": layers}, pixel_SHW3))


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Figures in per cent, a line for each tower."""
    names = [*_READ, "count"]
    lines = [f"{'frozen features of':<22}" + "".join(f"{name:>10}" for name in names)]
    for label, found in rows.items():
        lines.append(f"{label:<22}" + "".join(f"{100 * found[name]:>10.1f}" for name in names))
    return "\n".join(lines)


def _patch(thing: Thing, grid: int) -> int:
    column, row = (min(grid - 1, int(place * grid)) for place in thing.centre)
    return row * grid + column


def _read(x_SE: np.ndarray, y_S: np.ndarray, answers: int, fits_S: np.ndarray) -> float:
    mean, spread = x_SE[fits_S].mean(axis=0), x_SE[fits_S].std(axis=0) + 1e-6
    x_SE = np.append((x_SE - mean) / spread, np.ones((len(x_SE), 1)), axis=1)
    target_SA = np.eye(answers)[y_S]
    own = x_SE[fits_S]
    square = own.T @ own + _RIDGE * len(own) * np.eye(own.shape[1])
    weight_EA = np.linalg.solve(square, own.T @ target_SA[fits_S])
    return float(((x_SE @ weight_EA).argmax(axis=1) == y_S)[~fits_S].mean())
