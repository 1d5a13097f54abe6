"""Pictures to pixels: one loader for training, evaluation and serving. NumPy and Pillow.

Nothing is trusted: the size is read before anything is decoded, only the formats named here are
tried, and whatever a decoder dies of becomes a ValueError that names the picture.

Resizing is Pillow's bicubic on bytes, which the released weights were trained with, bit for bit.

Dims: H height, W width, 3 RGB; N tiles of an image (1, but for anyres), S the tower's image size.
"""

import dataclasses
import io
import math
import os
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from llava_jax import files
from llava_jax.batch import ROW_END

Source = bytes | str | os.PathLike[str] | Image.Image

# Others stay shut: Pillow would run Ghostscript for some, and parse with libraries for others.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Where Pillow begins to warn of decompression bombs: a quarter of a GiB in RGB.
MAX_PIXELS = 2**30 // 4 // 3

_BAND_PIXELS = 2**22  # of a padded picture, these exist at one time
_PADDED = 8  # times max_pixels: more of a strip's square takes many seconds to resize
_MOST_SCANS = 100  # of a JPEG: some 10 are usual, and each costs a look at every pixel

Mode = Literal["crop", "pad", "anyres"]
Exif = Literal["ignore", "apply"]
Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ImageProcessing:
    """How a picture becomes what the vision tower sees. Plain values, for a model's llava.json.

    mode: 'crop' = shortest side to `size`, then the middle. 'pad' = made square with `background`,
    then to `size`. 'anyres' = the whole, squeezed, and behind it tiles of the picture at the one of
    `pinpoints` (width, height) that suits it best, on black.
    """

    mode: Mode
    size: int
    background: Colour = (122, 116, 104)  # CLIP's mean
    pinpoints: tuple[tuple[int, int], ...] = (
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )
    exif: Exif = "ignore"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        for field, known in (("mode", get_args(Mode)), ("exif", get_args(Exif))):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"got image {field} {getattr(self, field)!r}, expected one of {known}"
                )
        if self.size < 1:
            raise ValueError(f"got image size {self.size}, expected 1 or more pixels")
        # JSON has no tuples.
        object.__setattr__(self, "background", tuple(self.background))
        object.__setattr__(self, "pinpoints", tuple(map(tuple, self.pinpoints)))
        if len(self.background) != 3 or not all(0 <= c <= 255 for c in self.background):
            raise ValueError(f"got background {self.background}, expected three of 0 to 255")
        if self.mode == "anyres":
            for point in self.pinpoints or ((0, 0),):
                if len(point) != 2 or min(point) < 1 or any(side % self.size for side in point):
                    raise ValueError(
                        f"got pinpoint {point} for tiles of {self.size}, expected (width, height), "
                        "both multiples of it"
                    )

    def process(self, source: "Source | np.ndarray") -> np.ndarray:
        """uint8 NSS3. An array is what `load` returned."""
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
                raise ValueError(
                    f"got an array {source.dtype} {source.shape}, expected uint8 [height, width, 3]"
                )
            source = Image.fromarray(source)
        image = _open(source, self.exif, self.max_pixels)
        if self.mode == "crop":
            pictures = [_crop(image, self.size, self.max_pixels)]
        elif self.mode == "pad":
            pictures = [_pad(image, self.size, self.background, self.max_pixels)]
        else:
            pictures = _tiles(image, self.size, best_resolution(*image.size, self.pinpoints))
        return np.stack([np.asarray(picture) for picture in pictures])

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of an anyres picture's tiles; the whole, squeezed, comes on top."""
        best_width, best_height = best_resolution(width, height, self.pinpoints)
        return best_width // self.size, best_height // self.size

    def tiles(self, width: int, height: int) -> int:
        """How many tiles a picture becomes, the squeezed whole among them."""
        if self.mode != "anyres":
            return 1
        columns, rows = self.grid(width, height)
        return 1 + columns * rows

    def feature_index(self, width: int, height: int, patches_per_side: int) -> np.ndarray:
        """int32: in which order a picture's features are read, ROW_END after each row of anyres.

        Counted through all tiles, each of patches_per_side² features. Rows and columns that lie
        wholly in anyres' black border are left out. As in the reference, a picture some 48 times
        longer than wide loses all its rows or columns that way, and keeps the squeezed whole.
        """
        P = patches_per_side**2
        base = np.arange(P, dtype=np.int32)
        if self.mode != "anyres":
            return base
        columns, rows = self.grid(width, height)
        tile_CHW = P + np.arange(columns * rows * P).reshape(-1, patches_per_side, patches_per_side)
        sides = (rows, columns, patches_per_side, patches_per_side)
        whole = tile_CHW.reshape(sides).swapaxes(1, 2)
        whole_HW = whole.reshape(rows * patches_per_side, columns * patches_per_side)
        whole_HW = _without_border(whole_HW, width, height)
        ends = np.full((len(whole_HW), 1), ROW_END)
        return np.concatenate([base, np.hstack([whole_HW, ends]).ravel()]).astype(np.int32)


def load(source: Source, *, exif: Exif = "ignore", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 HW3, RGB, of an encoded picture, its path (local or gs://), or a Pillow image.

    The first frame of a moving one. Transparency is dropped, as in the reference: hidden colours
    show. exif='apply' turns a photograph the way its camera was held; the reference does not.
    """
    return np.asarray(_open(source, exif, max_pixels))


def check(source: Source, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height, by the header alone. What `load` would refuse of it is refused."""
    image, name = _identify(source, max_pixels)
    _check_size(image, name, max_pixels)
    return image.size


def _open(source: Source, exif: Exif, max_pixels: int) -> Image.Image:
    image, name = _identify(source, max_pixels)
    return _decode(image, name, exif, max_pixels)


def _identify(source: Source, max_pixels: int) -> tuple[Image.Image, str]:
    """A picture whose header was read, and what messages call it."""
    name = "the picture"
    if isinstance(source, Image.Image):
        return source, name
    if not isinstance(source, bytes):
        name = str(source)
        source = files.path(source).read_bytes()
    if not source:
        raise ValueError(f"got {name} with 0 bytes, expected {_expected()}")
    try:
        image = Image.open(io.BytesIO(source), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"got {name}: {error}; expected at most {max_pixels} pixels") from error
    except Exception as error:
        raise ValueError(
            f"got {name} of {len(source)} bytes beginning with {source[:12]!r}, "
            f"expected {_expected()}"
        ) from error
    # The marker of a scan; within a scan no such bytes occur.
    if image.format in ("JPEG", "MPO") and (scans := source.count(b"\xff\xda")) > _MOST_SCANS:
        raise ValueError(
            f"got {name}, a JPEG of {scans} scans, expected at most {_MOST_SCANS}: save it anew"
        )
    return image, name


def _expected() -> str:
    return f"a picture ({', '.join(FORMATS)})"


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ValueError(
            f"got {name} with {width}×{height} = {width * height} pixels, expected 1 to "
            f"{max_pixels}: make it smaller"
        )


def _decode(image: Image.Image, name: str, exif: Exif, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    try:
        if exif == "apply":
            image = ImageOps.exif_transpose(image)
        if isinstance(image.info.get("transparency"), bytes):
            # It is dropped anyway, and Pillow would warn of a file that has nothing wrong.
            image = image.copy()
            del image.info["transparency"]
        if image.mode.startswith("I;16"):
            # Pillow would clip, to a white picture. Of 16-bit colours it takes the high byte too.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decoders die in many ways: of bad data, none is a bug of ours
        raise ValueError(f"got {name}: {error}; expected a complete picture") from error


def _crop(image: Image.Image, size: int, max_pixels: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    resized = (int(size * width / short), int(size * height / short))
    _check_shape(image.size, resized, max_pixels)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_shape(size: tuple[int, int], between: tuple[int, int], max_pixels: int) -> None:
    if between[0] * between[1] > max_pixels:
        raise ValueError(
            f"got a picture of {size[0]}×{size[1]}, which on its way becomes {between[0]}×"
            f"{between[1]}, expected at most {max_pixels} pixels: cut it, it is too long a strip"
        )


def _pad(image: Image.Image, size: int, background: Colour, max_pixels: int) -> Image.Image:
    """Made square, then resized: the very pixels, but a panorama's square never exists whole.

    Pillow resizes along rows, rounds to bytes, then along columns. So bands of rows may be
    padded and resized on their own, and the columns all at once.
    """
    width, height = image.size
    side = max(width, height)
    _check_shape(image.size, (size, side), max_pixels)
    _check_shape(image.size, (side, height), _PADDED * max_pixels)
    rows = max(1, _BAND_PIXELS // side)
    if height == side <= rows:  # one band is all: both ways in one call
        wide = _widened(image, side, background)
        return wide.resize((size, size), Image.Resampling.BICUBIC)
    narrow = Image.new("RGB", (size, side), background)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        band = image if rows >= height else image.crop((0, start, width, stop))
        band = _widened(band, side, background)
        band = band.resize((size, stop - start), Image.Resampling.BICUBIC)
        narrow.paste(band, (0, (side - height) // 2 + start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _widened(image: Image.Image, width: int, background: Colour) -> Image.Image:
    if image.width == width:
        return image
    wide = Image.new("RGB", (width, image.height), background)
    wide.paste(image, ((width - image.width) // 2, 0))
    return wide


def _tiles(image: Image.Image, size: int, resolution: tuple[int, int]) -> list[Image.Image]:
    """The whole, squeezed, and the tiles by rows of the letterboxed picture."""
    width, height = _fitted(*image.size, resolution)
    box = Image.new("RGB", resolution)
    at = ((resolution[0] - width) // 2, (resolution[1] - height) // 2)
    box.paste(image.resize((width, height), Image.Resampling.BICUBIC), at)
    corners = [
        (left, top)
        for top in range(0, resolution[1], size)
        for left in range(0, resolution[0], size)
    ]
    whole = image.resize((size, size), Image.Resampling.BICUBIC)
    return [whole, *(box.crop((left, top, left + size, top + size)) for left, top in corners)]


def _fitted(width: int, height: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same shape inside `resolution`; what is broken counts as whole."""
    across, down = resolution[0] / width, resolution[1] / height
    if across < down:
        return resolution[0], min(math.ceil(height * across), resolution[1])
    return min(math.ceil(width * down), resolution[0]), resolution[1]


def best_resolution(
    width: int, height: int, pinpoints: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """The pinpoint that keeps most of a picture's pixels, and of those the smallest."""

    def merit(point: tuple[int, int]) -> tuple[int, int]:
        scale = min(point[0] / width, point[1] / height)
        # Enlarging a picture adds nothing to see.
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -point[0] * point[1]

    return max(pinpoints, key=merit)


def _without_border(index_HW: np.ndarray, width: int, height: int) -> np.ndarray:
    """The features that see the picture, of a letterboxed one of width × height."""
    rows, columns = index_HW.shape
    # Rounded as in the reference, which goes by features, not by the pixels that were pasted.
    if width / height > columns / rows:
        border = (rows - int(height * (columns / width))) // 2
        return index_HW[border : rows - border]
    border = (columns - int(width * (rows / height))) // 2
    return index_HW[:, border : columns - border]
