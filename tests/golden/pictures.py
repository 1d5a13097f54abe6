"""Pictures of ours, what transformers' processors make of them, and which tiles anyres chooses.

The choice follows LLaVA's published rule, step by step, sharing no line with the package.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

SHAPES = ((1, 1), (5, 9), (90, 64), (61, 90), (224, 224), (337, 335), (400, 31), (640, 413))
DRAWN = ("RGB", "RGBA", "L", "P")
SIZES = {"crop": (56, 224, 336), "pad": (56, 224, 336), "anyres": (336,)}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PATCHES = 24  # along a side of a tile
TILED = (
    (1, 1), (30, 20), (20, 30), (336, 336), (337, 336), (640, 480), (480, 640), (672, 672),
    (700, 233), (233, 700), (1000, 300), (300, 1000), (1024, 1023), (1920, 1080), (1080, 1920),
    (2000, 100), (77, 1500), (4000, 3000), (335, 1009), (50, 49), (2500, 30), (31, 2600),
)  # fmt: skip


def drawn(width: int, height: int, mode: str) -> Image.Image:
    """Whole numbers only, so it is the same everywhere: slopes, stripes, and a kind of noise."""
    row, column = np.arange(height)[:, None], np.arange(width)[None, :]
    noise = (row * 7919 + column * 104729 + row * column * 31) % 61
    red = (column * 255 // max(width - 1, 1) + noise) % 256
    green = ((row * 255 // max(height - 1, 1)) ^ noise) % 256
    blue = np.where((row // 7 + column // 5) % 2, 230 - noise, noise)
    if mode == "L":
        return Image.fromarray(red.astype(np.uint8))
    if mode == "P":
        picture = Image.fromarray((red // 4).astype(np.uint8)).convert("P")
        picture.putpalette([(at * step) % 256 for at in range(256) for step in (3, 101, 57)])
        return picture
    alpha = (row * 5 + column * 3) % 256
    planes = (red, green, blue, alpha) if mode == "RGBA" else (red, green, blue)
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(row: dict[str, Any]) -> bytes:
    """A row's picture as a PNG file."""
    file = io.BytesIO()
    width, height = row["picture"]
    drawn(width, height, row["drawn"]).save(file, "PNG")
    return file.getvalue()


def pixels() -> Iterator[dict[str, Any]]:
    for (mode, sizes), shape in itertools.product(SIZES.items(), SHAPES):
        for size, kind in itertools.product(sizes, DRAWN):
            if kind == "RGB" or shape == (90, 64):
                yield {"picture": list(shape), "drawn": kind, "mode": mode, "size": size}


def by_transformers(row: dict[str, Any]) -> np.ndarray:
    """uint8 NSS3, as transformers' processors make it with Pillow."""
    import transformers

    size = row["size"]
    how: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "do_rescale": False,
        "do_normalize": False,
    }
    if row["mode"] == "crop":
        processor = transformers.CLIPImageProcessorPil(**how)
    elif row["mode"] == "pad":
        processor = transformers.LlavaImageProcessorPil(do_pad=True, **how)
    else:
        # Its pinpoints are (height, width).
        points = [[height, width] for width, height in PINPOINTS]
        processor = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=points, **how)
    picture = Image.open(io.BytesIO(encoded(row))).convert("RGB")
    values = np.asarray(processor(picture, return_tensors="np")["pixel_values"])
    return values.reshape(-1, 3, size, size).transpose(0, 2, 3, 1).astype(np.uint8)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def tiles() -> Iterator[dict[str, Any]]:
    backwards = PINPOINTS[::-1]  # of equals the smallest, not the first
    for points, sizes in ((PINPOINTS, TILED), (backwards, TILED[:5])):
        for width, height in sizes:
            row = {"size": [width, height], "pinpoints": [list(point) for point in points]}
            yield row | tiling(width, height, points)


def tiling(
    width: int, height: int, pinpoints: Sequence[tuple[int, int]] = PINPOINTS
) -> dict[str, Any]:
    """The pinpoint, its grid, the features left, and the order they are read in (-1: a line ends).

    Rows and columns of features in the border go; each row left is followed by a line end.
    """
    best, most_kept, least_wasted = (0, 0), -1, 0
    for across, down in pinpoints:
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (across, down), kept, wasted

    columns, rows = best[0] // 336, best[1] // 336
    wide, high = columns * PATCHES, rows * PATCHES
    left = top = 0
    if width / height > wide / high:
        top = (high - int(height * (wide / width))) // 2
    else:
        left = (wide - int(width * (high / height))) // 2
    order = list(range(PATCHES * PATCHES))
    for y in range(top, high - top):
        for x in range(left, wide - left):
            tile = 1 + (y // PATCHES) * columns + x // PATCHES
            order.append(tile * PATCHES**2 + (y % PATCHES) * PATCHES + x % PATCHES)
        order.append(-1)
    text = json.dumps(order, separators=(",", ":"))
    return {
        "best_resolution": list(best),
        "grid": [columns, rows],
        "tiles": columns * rows,
        "unpadded": [max(high - 2 * top, 0), max(wide - 2 * left, 0)],
        "tokens": len(order),
        "order_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
