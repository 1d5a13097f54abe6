"""Picture files of every kind the loader reads, and ways to damage them. All from seeds.

What Pillow does not write (interlaced and 16-bit PNG, BMP of 4 and 16 bits and run lengths) is put
together here, byte by byte.
"""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 46, 34
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
_ADAM7 = (*_ADAM7, (1, 0, 2, 1))  # first row and column, then steps

Rng = random.Random


@functools.cache
def corpus() -> dict[str, bytes]:
    """Whole files by name; the name begins with the format."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, WIDTH)[None, :, None] + np.zeros((HEIGHT, 1, 3))
    colour = Image.fromarray((slope + rng.integers(0, 40, slope.shape)).astype(np.uint8))
    alpha = Image.merge("RGBA", [*colour.split(), colour.getchannel(0)])
    palette = colour.quantize(200)
    deep = (np.asarray(colour.convert("L")).astype(np.uint16) << 8) + 7
    frames = [colour.rotate(angle) for angle in (0, 30, 60)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a harbour"
    extra = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB")
    ).tobytes()}  # fmt: skip
    moving = {"save_all": True, "append_images": frames[1:]}

    def saved(picture: Image.Image, kind: str, **options) -> bytes:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        return file.getvalue()

    return {
        "jpeg": saved(colour, "JPEG"),
        "jpeg progressive": saved(colour, "JPEG", progressive=True, **extra),
        "jpeg grey": saved(colour.convert("L"), "JPEG", comment=b"grey"),
        "jpeg cmyk": saved(colour.convert("CMYK"), "JPEG", **extra),
        "jpeg 444 restarts": saved(colour, "JPEG", subsampling=0, restart_marker_blocks=2),
        "jpeg pair": saved(colour, "MPO", **moving),
        "png": saved(colour, "PNG", **extra),
        "png alpha": saved(alpha, "PNG"),
        "png grey alpha": saved(alpha.convert("LA"), "PNG"),
        "png palette": saved(palette, "PNG"),
        "png palette clear": saved(palette, "PNG", transparency=bytes(range(200))),
        "png one bit": saved(colour.convert("1"), "PNG"),
        "png two bits": saved(colour.quantize(4), "PNG", bits=2),
        "png sixteen bits": saved(Image.fromarray(deep), "PNG"),
        "png 48 bits": png(np.asarray(colour).astype(">u2") * 257, 16, 2),
        "png interlaced": png(np.asarray(colour), 8, 2, interlaced=True),
        "png interlaced deep": png(deep.astype(">u2")[..., None], 16, 0, interlaced=True),
        "png moving": saved(colour, "PNG", **moving),
        "webp": saved(colour, "WEBP"),
        "webp lossless": saved(colour, "WEBP", lossless=True, **extra),
        "webp alpha": saved(alpha, "WEBP", quality=40),
        "webp moving": saved(colour, "WEBP", **moving),
        "gif": saved(colour, "GIF"),
        "gif plain": saved(colour, "GIF", interlace=0, comment=b"plain"),
        "gif moving": saved(colour, "GIF", disposal=2, loop=0, **moving),
        "gif clear": saved(palette, "GIF", transparency=3),
        "bmp": saved(colour, "BMP"),
        "bmp alpha": saved(alpha, "BMP"),
        "bmp palette": saved(palette, "BMP"),
        "bmp one bit": saved(colour.convert("1"), "BMP"),
        "bmp four bits": bmp(4, 0, bytes((WIDTH // 2 + 3) // 4 * 4 * HEIGHT)),
        "bmp sixteen bits": bmp(16, 0, bytes(range(256)) * (2 * WIDTH * HEIGHT // 256 + 1)),
        "bmp run lengths": bmp(8, 1, _run_lengths(8)),
        "bmp run lengths of four bits": bmp(4, 2, _run_lengths(4)),
        "bmp downwards": bmp(24, 0, bytes((WIDTH * 3 + 3) // 4 * 4 * HEIGHT), height=-HEIGHT),
    }


def chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)


def png(pixel_HWC: np.ndarray, bits: int, kind: int, *, interlaced: bool = False) -> bytes:
    """A PNG file. kind: 0 grey, 2 colours."""
    height, width = pixel_HWC.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced))
    lines = b""
    for top, left, down, across in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        for line in pixel_HWC[top::down, left::across]:
            lines += b"\0" + line.tobytes()
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(bits: int, compression: int, data: bytes, *, height: int = HEIGHT) -> bytes:
    """A Windows bitmap of WIDTH × HEIGHT; with a palette where `bits` needs one."""
    colours = b"".join(bytes((at * 7 % 256, at * 3 % 256, at, 0)) for at in range(2**bits % 2**16))
    colours = colours if bits <= 8 else b""
    start = 54 + len(colours)
    info = struct.pack(
        "<IiiHHIIiiII", 40, WIDTH, height, 1, bits, compression, len(data), 2835, 2835, 0, 0
    )
    return struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start) + info + colours + data


def _run_lengths(bits: int) -> bytes:
    """Lines of a run, a few pixels as they are, a run; then the end."""
    few = bytes((0, 6)) + (bytes((9, 8, 7, 6, 5, 4)) if bits == 8 else bytes((0x98, 0x76, 0x54, 0)))
    line = bytes((20, 0x33)) + few + bytes((WIDTH - 26, 0x55)) + bytes((0, 0))
    return line * HEIGHT + bytes((0, 1))


def damaged(seed: int) -> tuple[str, bytes]:
    """What was done to which file, and the file now."""
    rng = Rng(seed)
    name = rng.choice(sorted(corpus()))
    data = bytearray(corpus()[name])
    done = []
    for damage in rng.choices(_DAMAGES, k=rng.choice((1, 1, 1, 2, 3))):
        damage(data, rng)
        done.append(damage.__name__.strip("_"))
    if name.startswith("png") and rng.random() < 0.7:
        _right_sums(data)  # or nearly all of them would end at a checksum
    return f"{name}: {', '.join(done)} (seed {seed})", bytes(data)


def _bit_flips(data: bytearray, rng: Rng) -> None:
    for _ in range(rng.choice((1, 3, 20))):
        if data:
            data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _bytes(data: bytearray, rng: Rng) -> None:
    for _ in range(rng.choice((1, 3, 20))):
        if data:
            data[_place(data, rng)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def _truncation(data: bytearray, rng: Rng) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _splice(data: bytearray, rng: Rng) -> None:
    other = corpus()[rng.choice(sorted(corpus()))]
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other)) :]


def _lengths(data: bytearray, rng: Rng) -> None:
    """A number of 2 or 4 bytes, where numbers are likely, becomes one that matters."""
    starts = [at for at, _ in _parts(data)] or [0]
    at = rng.choice((rng.choice(starts) + rng.randrange(12), rng.randrange(60)))
    form = rng.choice((">H", "<H", ">I", "<I"))
    most = 2 ** (8 * struct.calcsize(form)) - 1
    value = rng.choice((0, 1, most, most // 2, most // 2 + 1, 60_000, rng.randrange(2000)))
    if at + struct.calcsize(form) <= len(data):
        struct.pack_into(form, data, at, value)


def _header_swap(data: bytearray, rng: Rng) -> None:
    other = corpus()[rng.choice(sorted(corpus()))]
    size = rng.choice((2, 4, 8, 12, 26, 33, 54))
    data[:size] = other[:size]


def _duplicated_part(data: bytearray, rng: Rng) -> None:
    if parts := list(_parts(data)):
        begin, end = rng.choice(parts)
        at = rng.choice(parts)[0]
        data[at:at] = data[begin:end] * rng.choice((1, 1, 2, 50))


def _missing_part(data: bytearray, rng: Rng) -> None:
    if parts := list(_parts(data)):
        begin, end = rng.choice(parts)
        del data[begin:end]


def _zeros(data: bytearray, rng: Rng) -> None:
    begin = rng.randrange(len(data) + 1)
    end = min(begin + rng.choice((4, 30, 300)), len(data))
    data[begin:end] = bytes(end - begin)


_DAMAGES: tuple[Callable[[bytearray, Rng], None], ...] = (
    _bit_flips,
    _bytes,
    _truncation,
    _splice,
    _lengths,
    _lengths,
    _header_swap,
    _duplicated_part,
    _missing_part,
    _zeros,
)


def _place(data: bytearray, rng: Rng) -> int:
    return rng.randrange(min(len(data), rng.choice((32, 128, 10**6))))


def _parts(data: bytearray) -> Iterator[tuple[int, int]]:
    """Chunks of a PNG or WebP, segments of a JPEG; of others some even slices."""
    at = {b"\x89": 8, b"R": 12, b"\xff": 2}.get(bytes(data[:1]))
    if at is None:
        yield from ((begin, begin + 12) for begin in range(0, len(data) - 12, 12))
        return
    while at + 12 <= len(data):
        if data[0] == 0xFF:
            size = 2 + struct.unpack_from(">H", data, at + 2)[0]
        elif data[0] == 0x89:
            size = 12 + struct.unpack_from(">I", data, at)[0]
        else:
            size = 8 + struct.unpack_from("<I", data, at + 4)[0]
            size += size % 2
        yield at, min(at + size, len(data))
        at += size


def _right_sums(data: bytearray) -> None:
    if data[:1] == b"\x89":
        for begin, end in list(_parts(data)):
            if end - begin >= 12:
                struct.pack_into(">I", data, end - 4, zlib.crc32(data[begin + 4 : end - 4]))
