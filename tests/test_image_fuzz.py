"""Damaged picture files: every one is decoded or refused in words, quickly, in little memory."""

import io
import resource
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava_jax.image import ImageProcessing, check, load
from tests.image_mutations import HEIGHT, WIDTH, corpus, damaged

MOST_PIXELS = 10**6
CROP = ImageProcessing("crop", 24, max_pixels=MOST_PIXELS)
PAD = ImageProcessing("pad", 24, max_pixels=MOST_PIXELS, exif="apply")
TILES = ImageProcessing("anyres", 24, pinpoints=((24, 48), (48, 24)), max_pixels=MOST_PIXELS)


@pytest.mark.parametrize("name", sorted(corpus()))
def test_whole_files_are_decoded(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = load(corpus()[name])
        assert check(corpus()[name]) == (WIDTH, HEIGHT)
    assert got.shape == (HEIGHT, WIDTH, 3)
    assert got.std() > 10 or name.startswith("bmp four") or name == "bmp downwards"  # no pattern
    if name == "png palette clear":
        whole = Image.open(io.BytesIO(corpus()[name])).convert("RGBA").convert("RGB")
        np.testing.assert_array_equal(got, np.asarray(whole))


def decodes(data: bytes, processing: ImageProcessing) -> bool:
    """Whether a file is decoded; else it is refused in words. Anything else goes through."""
    try:
        pixels = processing.process(data)
    except ValueError as error:
        if "expected" not in str(error):
            raise
        return False
    assert (pixels.shape[1:], pixels.dtype) == ((24, 24, 3), np.uint8)
    return True


def peak_mib() -> float:
    kib = 1024 if sys.platform == "darwin" else 1  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kib / 1024


@pytest.mark.parametrize("seeds", [range(at, at + 250) for at in range(0, 1500, 250)])
def test_damaged_files_are_decoded_or_refused(seeds):
    before, counts, slowest = peak_mib(), Counter(), 0.0
    for seed in seeds:
        what, data = damaged(seed)
        start = time.monotonic()
        with warnings.catch_warnings():
            # Pillow warns of what is wrong in a file, or, asked to, raises: either way it is said.
            warnings.simplefilter("error" if seed % 2 else "ignore")
            try:
                for processing in (CROP, PAD, TILES):
                    counts[decodes(data, processing)] += 1
            except Exception as error:
                raise AssertionError(f"{what}: {error!r}") from error
        slowest = max(slowest, time.monotonic() - start)
    assert min(counts[True], counts[False]) > 120, counts
    assert slowest < 3
    assert peak_mib() - before < 200


def test_a_jpeg_of_endless_scans():
    whole = corpus()["jpeg progressive"]
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert load(whole[:-2] + 20 * last + whole[-2:]).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match=r"a JPEG of .* scans, expected at most 100"):
        load(whole[:-2] + 10_000 * last + whole[-2:])


def test_a_strip_whose_square_would_take_minutes():
    strip = Image.new("RGB", (1, 3000))
    assert PAD.process(strip.crop((0, 0, 1, 2828))).shape == (1, 24, 24, 3)
    with pytest.raises(ValueError, match="1×3000, which on its way becomes 3000×3000, expected"):
        PAD.process(strip)
    assert ImageProcessing("pad", 24).process(strip).shape == (1, 24, 24, 3)
