"""Pictures to pixels: the reference's own, every kind of file, and files that want to do harm."""

import dataclasses
import hashlib
import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_jax import files, image
from llava_jax.batch import ROW_END
from llava_jax.image import ImageProcessing, Mode, best_resolution, load

BICUBIC = Image.Resampling.BICUBIC
GREY = (122, 116, 104)
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MODES: dict[str, Mode] = {"square": "crop", "pad": "pad", "anyres": "anyres"}
PINPOINTS = ImageProcessing("anyres", 336).pinpoints


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise on a slope, so that every pixel of a wrong resize would differ."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 180, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    noise = rng.integers(0, 36, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# --- the running reference: shared/data/README.md ---


def test_pixels_of_the_reference(shared):
    with np.load(shared / "data/golden/pixels.npz") as golden:
        for key in golden.files:
            name, size, mode = key.split("|")
            processing = ImageProcessing(MODES[mode], int(size))
            got = processing.process(shared / "data/photos" / name)
            expected = golden[key]
            np.testing.assert_array_equal(got, expected.reshape(-1, *expected.shape[-3:]), key)
        assert len(golden.files) == 34


def test_tiles_of_the_reference(shared):
    golden = json.loads((shared / "data/golden/anyres.json").read_text())
    pinpoints = golden["grid_pinpoints"]
    processing = ImageProcessing("anyres", golden["image_size"], pinpoints=pinpoints)
    assert processing == ImageProcessing("anyres", 336)
    for case in golden["cases"]:
        width, height = size = case["size"]
        assert best_resolution(width, height, PINPOINTS) == tuple(case["best_resolution"]), size
        assert processing.grid(width, height) == tuple(case["grid"]), size
        assert processing.tiles(width, height) == case["tiles"] + 1, size
        index = processing.feature_index(width, height, golden["patches_per_side"])
        assert len(index) == case["tokens"], size
        order = np.where(index == ROW_END, -1, index).tolist()
        text = json.dumps(order, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == case["order_sha256"], size


# --- resizing ---

SHAPES = [(1, 1), (7, 5), (224, 224), (225, 223), (640, 427), (101, 733), (900, 60), (3, 500)]


def square(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    out = Image.new("RGB", (side, side), GREY)
    out.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return out


@pytest.mark.parametrize("band", [1, 2000, image._BAND_PIXELS])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_in_bands_is_padding(shape, band, monkeypatch):
    monkeypatch.setattr(image, "_BAND_PIXELS", band)
    got = ImageProcessing("pad", 56).process(picture(*shape))
    whole = square(picture(*shape)).resize((56, 56), BICUBIC)
    np.testing.assert_array_equal(got, np.asarray(whole)[None])


def test_another_background():
    processing = ImageProcessing("pad", 8, background=(1, 2, 3))
    assert processing.process(picture(16, 8))[0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [56, 224])
def test_crop_and_pad_against_transformers(shape, size):
    transformers = pytest.importorskip("transformers")
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    bytes_out = {"do_rescale": False, "do_normalize": False}
    theirs: dict[Mode, Any] = {
        "crop": transformers.CLIPImageProcessorPil(**sizes, **bytes_out),
        "pad": transformers.LlavaImageProcessorPil(do_pad=True, **sizes, **bytes_out),
    }
    for mode, processor in theirs.items():
        pixels = processor(picture(*shape), return_tensors="np")["pixel_values"]
        got = ImageProcessing(mode, size).process(picture(*shape))
        np.testing.assert_array_equal(got, pixels.transpose(0, 2, 3, 1), mode)


@pytest.mark.parametrize("mode", ["crop", "pad", "anyres"])
def test_what_is_loaded_can_be_processed(mode):
    processing = ImageProcessing(mode, 336)
    data = encoded(picture(50, 40), "PNG")
    got = processing.process(load(data))
    np.testing.assert_array_equal(got, processing.process(data))
    assert (got.shape, got.dtype) == ((processing.tiles(50, 40), 336, 336, 3), np.uint8)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"got an array .*expected uint8 \[height, width, 3\]"):
            processing.process(wrong)


def test_strips_that_would_grow_beyond_measure():
    for mode in ("crop", "pad"):
        with pytest.raises(ValueError, match=r"9000×1, which on its way becomes .* expected at mo"):
            ImageProcessing(mode, 336, max_pixels=10**6).process(picture(9000, 1))
    assert ImageProcessing("anyres", 336).process(picture(9000, 1)).shape == (3, 336, 336, 3)


# --- tiles ---


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((640, 480), (672, 672)),
        ((336, 336), (336, 672)),  # all keep every pixel; of the smallest, the first
        ((1000, 300), (1008, 336)),
        ((300, 1000), (336, 1008)),
        ((600, 300), (672, 336)),
        ((1, 1), (336, 672)),
    ],
)
def test_the_resolution_that_suits(size, best):
    width, height = size
    assert best_resolution(width, height, PINPOINTS) == best


def test_tiles_are_the_letterboxed_picture():
    tiles = ImageProcessing("anyres", 336).process(picture(500, 420))
    assert tiles.shape == (5, 336, 336, 3)
    np.testing.assert_array_equal(
        tiles[0], np.asarray(picture(500, 420).resize((336, 336), BICUBIC))
    )
    joined = np.vstack([np.hstack([*tiles[1:3]]), np.hstack([*tiles[3:5]])])
    whole = picture(500, 420).resize((672, 565), BICUBIC)  # 564.48, rounded up
    np.testing.assert_array_equal(joined[53 : 53 + 565], np.asarray(whole))
    assert not joined[:53].any()
    assert not joined[53 + 565 :].any()


def test_the_order_features_are_read_in():
    processing = ImageProcessing("anyres", 2, pinpoints=((4, 4), (4, 2)))
    # Two tiles of 2×2 features behind the whole's four; a row ends behind both.
    index = processing.feature_index(4, 2, 2)
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, ROW_END, 6, 7, 10, 11, ROW_END]
    # 5 × 3 on 4 × 4: int(2.4) rows see the picture, one row of border on either side.
    index = processing.feature_index(5, 3, 2)
    assert index.tolist() == [0, 1, 2, 3, 6, 7, 10, 11, ROW_END, 12, 13, 16, 17, ROW_END]
    index = processing.feature_index(3, 5, 2)
    assert index.tolist()[4:] == [5, 8, -2, 7, 10, -2, 13, 16, -2, 15, 18, -2]
    assert index.dtype == np.int32
    for mode in ("crop", "pad"):
        assert ImageProcessing(mode, 2).feature_index(9, 1, 2).tolist() == [0, 1, 2, 3]


# --- files of every kind ---


@pytest.mark.parametrize("kind", KINDS)
def test_formats_from_anywhere(kind, tmp_path):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(40, 30), kind, **options)
    path = tmp_path / "picture.bin"  # the content counts, not the name
    path.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (data, path, str(path), files.path(path), Image.open(path)):
        got = load(source)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.uint8
    if kind in ("PNG", "BMP", "WEBP"):
        np.testing.assert_array_equal(expected, np.asarray(picture(40, 30)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (load(data) == [255, 0, 0]).all()


def test_a_phones_jpeg_with_a_second_picture():
    pair = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    data = encoded(pair[0], "MPO", save_all=True, append_images=pair[1:])
    assert (load(data) == 255).all()


def test_transparency_is_dropped():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert (load(encoded(clear, kind, **options)) == [10, 20, 30]).all()
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30])
    assert (load(encoded(palette, "PNG", transparency=0)) == [10, 20, 30]).all()
    assert (load(Image.new("LA", (4, 4), (7, 0))) == 7).all()


def test_grey_black_and_white_and_print():
    assert (load(encoded(Image.new("L", (4, 4), 9), "PNG")) == 9).all()
    assert (load(encoded(Image.new("1", (4, 4), 1), "PNG")) == 255).all()
    red = load(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(red.astype(int) - [254, 0, 0]).max() <= 2  # measured worst 1: JPEG rounds


def test_sixteen_bits_keep_their_high_byte():
    deep = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    data = encoded(Image.fromarray(deep), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert load(data)[0, :, 0].tolist() == [0, 0, 1, 0x12, 0xFF]
    assert load(data)[0, :, 2].tolist() == [0, 0, 1, 0x12, 0xFF]


def test_how_the_camera_was_held():
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: turn by 90° to look at it
    data = encoded(picture(40, 30), "PNG", exif=exif)
    ignored, applied = load(data), load(data, exif="apply")
    np.testing.assert_array_equal(ignored, np.asarray(picture(40, 30)))
    np.testing.assert_array_equal(applied, np.rot90(ignored, -1))
    processing = ImageProcessing("crop", 16, exif="apply")
    np.testing.assert_array_equal(processing.process(data), processing.process(applied))
    plain = encoded(picture(40, 30), "PNG")
    np.testing.assert_array_equal(load(plain, exif="apply"), ignored)


# --- files that are broken, or worse ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and has none."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 0) + b"IDAT"


@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 10_000), (89_478_486, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_not_decoded(size):
    with pytest.raises(ValueError, match=r"expected (at most|1 to) 89478485"):
        load(png_header(*size))


def test_the_limit_is_a_setting():
    data = encoded(picture(40, 30), "PNG")
    assert load(data, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(ValueError, match="with 40×30 = 1200 pixels, expected 1 to 1199"):
        load(data, max_pixels=1199)
    with pytest.raises(ValueError, match="expected 1 to 1199"):
        ImageProcessing("pad", 8, max_pixels=1199).process(picture(40, 30))
    with pytest.raises(ValueError, match="with 0×3 = 0 pixels"):
        load(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"cat\.jpg with 0 bytes, expected a picture \(JPEG, PNG, WEBP, GIF, BMP\)"),
        (
            b"<!DOCTYPE html>",
            r"cat\.jpg of 15 bytes beginning with b'<!DOCTYPE ht', expected a pic",
        ),
        (encoded(picture(9, 9), "TIFF"), "expected a picture"),
        (encoded(picture(9, 9), "PPM"), "expected a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected a picture"),
        (encoded(picture(99, 99), "JPEG")[:-99], r"cat\.jpg: image file is truncated.*complete"),
        (encoded(picture(99, 99), "PNG")[:-99], r"cat\.jpg: .*expected a complete picture"),
    ],
    ids=["empty", "page", "tiff", "ppm", "postscript", "half a JPEG", "half a PNG"],
)
def test_files_that_are_no_picture(tmp_path, content, says):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load(path)
    with pytest.raises(ValueError, match=r"^got the picture"):
        load(content)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "cat.jpg")
    assert "cat.jpg" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_files_are_decoded_or_refused(kind):
    rng = random.Random(kind)
    whole = encoded(picture(33, 21), kind)
    refused = unexplained = 0
    for _ in range(200):
        data = bytearray(whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 9)):
            if data:
                data[rng.randrange(min(len(data), rng.choice([40, 10**6])))] = rng.randrange(256)
        try:
            assert load(bytes(data), max_pixels=10**6).shape[2] == 3
        except ValueError as error:
            refused += "expected" in str(error)
            unexplained += "expected" not in str(error)
    assert refused > 20
    assert not unexplained


# --- settings ---


def test_settings_survive_json():
    processing = ImageProcessing("anyres", 14, pinpoints=((14, 28),), background=(1, 2, 3))
    again = ImageProcessing(**json.loads(json.dumps(dataclasses.asdict(processing))))
    assert again == processing
    assert hash(again) == hash(processing)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "stretch"}, "got image mode 'stretch', expected one of"),
        ({"exif": "guess"}, "got image exif 'guess'"),
        ({"size": 0}, "got image size 0"),
        ({"background": (1, 2)}, r"got background \(1, 2\)"),
        ({"background": (1, 2, 256)}, "got background"),
        ({"mode": "anyres", "size": 224}, r"got pinpoint \(336, 672\) for tiles of 224"),
        ({"mode": "anyres", "pinpoints": ()}, "got pinpoint"),
        ({"mode": "anyres", "pinpoints": ((336,),)}, r"got pinpoint \(336,\)"),
    ],
)
def test_settings_that_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        ImageProcessing(**{"mode": "pad", "size": 336, **settings})
