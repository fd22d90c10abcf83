"""Images from strangers: the picture that a viewer shows, or the reason why not."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from iot_pipeline import formats
from iot_pipeline.errors import InvalidMessage, Reason
from iot_pipeline.formats import NAMES, find_format
from iot_pipeline.pictures import MAX_EDGE, MAX_SCANS, TURNS, open_image

LIMIT = 4_194_304
SIZE = (32, 24)

# Every value and no symmetry: wrong scales and turns show.
GREY = Image.frombytes("L", SIZE, bytes((7 * n + n // 5) % 256 for n in range(SIZE[0] * SIZE[1])))
COLOURS = Image.merge(
    "RGB", [GREY, GREY.transpose(Image.Transpose.ROTATE_180), GREY.point(lambda v: v // 2)]
)


def saved(picture: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def encoded(format_: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    # Noise, so that half of the file is half of the picture.
    return saved(Image.effect_noise(size, 80).convert(mode), format_)


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two values in the same place."""
    assert (one.mode, one.size) == (other.mode, other.size)
    return max(high for _, high in ImageChops.difference(one, other).getextrema())  # type: ignore[misc]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: tuple[int, int],
    rows: bytes,
    *,
    depth: int = 8,
    kind: int = 2,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + before
        + png_chunk(b"IDAT", zlib.compress(rows))
        + after
        + png_chunk(b"IEND", b"")
    )


def rows(values: bytes, width: int) -> bytes:
    """PNG's rows: each begins with the number of its filter."""
    return b"".join(b"\0" + values[at : at + width] for at in range(0, len(values), width))


def wide(picture: Image.Image, code: str, factor: float) -> bytes:
    """The values of an 8-bit picture times `factor`, packed as `code`."""
    values = [
        value * factor if code[-1] in "fd" else int(value * factor) for value in picture.tobytes()
    ]
    return struct.pack(f"{code[0]}{len(values)}{code[1]}", *values)


def tiff(
    pixels: bytes,
    bits: int,
    *,
    order: str = "<",
    sample_format: int = 1,
    photometric: int = 1,
    more: tuple[tuple[int, int, int, int], ...] = (),
    size: tuple[int, int] = SIZE,
) -> bytes:
    """An uncompressed grey TIFF of one strip."""
    width, height = size
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, len(pixels)),
        (339, 3, 1, sample_format),
        *more,
    ]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in sorted(entries):
        short = kind == 3 and count == 1
        packed = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        directory += struct.pack(f"{order}HHI", tag, kind, count) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    return head + pixels + directory + struct.pack(f"{order}I", 0)


# Formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", NAMES)
def test_common_formats_are_read_as_rgb(format_: str) -> None:
    image = open_image(encoded(format_), LIMIT)
    assert (image.mode, image.size) == ("RGB", (32, 32))


@pytest.mark.parametrize("known", formats.FORMATS, ids=lambda known: known.media_type)
def test_what_a_sender_takes_for_an_image_is_taken(known: formats.Format, tmp_path: Path) -> None:
    for ending in known.endings:
        path = tmp_path / f"picture{ending}"
        GREY.convert("1" if ending == ".pbm" else "L" if ending == ".pgm" else "RGB").save(path)
        assert find_format(path.read_bytes()) is known
        assert open_image(path.read_bytes(), LIMIT).size == SIZE


@pytest.mark.parametrize("kind", [b"P1", b"P2", b"P3"])
def test_portable_formats_in_plain_text_are_read(kind: bytes) -> None:
    data = (
        kind
        + b"\n# a comment\n2 1\n"
        + {b"P1": b"0 1", b"P2": b"15\n15 0", b"P3": b"15\n15 15 15 0 0 0"}[kind]
    )
    image = open_image(data, LIMIT)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


# Modes --------------------------------------------------------------------------------------------

OVER_WHITE = GREY.point(lambda value: round(255 - (255 - value) * 100 / 255))


def grey_in_16_bits() -> dict[str, bytes]:
    both = {
        f"TIFF, {order} {photometric}": tiff(
            wide(picture, f"{order}H", 257), 16, order=order, photometric=photometric
        )
        for order in "<>"
        for photometric, picture in ((0, GREY.point(lambda value: 255 - value)), (1, GREY))
        # Pillow knows no big-endian one whose zero is white.
        if (order, photometric) != (">", 0)
    }
    deep = Image.frombytes("I;16", SIZE, wide(GREY, "<H", 257))
    return both | {
        "PNG": png(SIZE, rows(wide(GREY, ">H", 257), 2 * SIZE[0]), depth=16, kind=0),
        "PNG by Pillow": saved(deep, "PNG"),
        "TIFF by Pillow": saved(deep, "TIFF"),
        "TIFF, deflated": saved(deep, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF, LZW, big-endian": saved(
            Image.frombytes("I;16B", SIZE, wide(GREY, ">H", 257)), "TIFF", compression="tiff_lzw"
        ),
        "PGM": b"P5 %d %d 65535\n" % SIZE + wide(GREY, ">H", 257),
        "PGM in text": b"P2 %d %d 65535\n" % SIZE
        + b" ".join(b"%d" % (257 * value) for value in GREY.tobytes()),
    }


DEEP = grey_in_16_bits() | {
    "TIFF, 12 bits": tiff(
        b"".join(
            bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255))
            for a, b in zip(
                *[iter(round(value * 4095 / 255) for value in GREY.tobytes())] * 2, strict=True
            )
        ),
        12,
    ),
    "TIFF, 32 bits": tiff(wide(GREY, "<I", 16_843_009), 32),
    "TIFF, 32 bits with a sign": tiff(wide(GREY, "<i", (2**31 - 1) / 255), 32, sample_format=2),
    "TIFF, 32 bits that hold 16": tiff(wide(GREY, "<i", 257), 32, sample_format=2),
    "TIFF, 32 bits that hold 8": tiff(wide(GREY, "<I", 1), 32),
    "TIFF, 16 bits with a sign": tiff(wide(GREY, "<h", 32_767 / 255), 16, sample_format=2),
    "TIFF, 0 to 1": tiff(wide(GREY, "<f", 1 / 255), 32, sample_format=3),
    "TIFF, 0 to 255": tiff(wide(GREY, "<f", 1), 32, sample_format=3),
    "TIFF, 0 to 65535": tiff(wide(GREY, "<f", 257), 32, sample_format=3),
    "mode I": saved(Image.frombytes("I", SIZE, wide(GREY, "<i", 257)), "TIFF"),
    "mode F": saved(Image.frombytes("F", SIZE, wide(GREY, "<f", 1 / 255)), "TIFF"),
}


@pytest.mark.parametrize("case", DEEP)
def test_deep_grey_values_are_those_of_the_8_bit_picture(case: str) -> None:
    # Where the scale is no whole multiple, the file itself is rounded.
    allowed = 1 if "sign" in case or "12" in case else 0
    assert difference(open_image(DEEP[case], LIMIT), GREY.convert("RGB")) <= allowed


def test_a_dark_deep_picture_stays_dark() -> None:
    for data in (
        b"P5 %d %d 65535\n" % SIZE + wide(GREY, ">H", 1),
        tiff(wide(GREY, "<H", 1), 16),
        png(SIZE, rows(wide(GREY, ">H", 1), 2 * SIZE[0]), depth=16, kind=0),
    ):
        assert open_image(data, LIMIT).getextrema() == ((0, 1),) * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e30, 1e30])
def test_values_that_are_no_light_do_no_harm(value: float) -> None:
    pixels = struct.pack("<f", value) + wide(GREY, "<f", 1)[4:]
    shown = open_image(tiff(pixels, 32, sample_format=3), LIMIT)
    assert shown.crop((1, 0, *SIZE)).getextrema()[0] != (0, 0) or value > 0


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_each_depth_of_a_grey_png_is_scaled_to_8_bits(depth: int, transparent: bool) -> None:
    most = 2**depth - 1
    values = [0, most, most // 2, 1] * 4
    row = 0
    for value in values:
        row = row << depth | value
    before = png_chunk(b"tRNS", struct.pack(">H", most // 2)) if transparent else b""
    data = png((16, 1), b"\0" + row.to_bytes(2 * depth, "big"), depth=depth, kind=0, before=before)
    shown = open_image(data, LIMIT).getchannel("R")
    expected = [round(value * 255 / most) for value in values]
    if transparent:
        expected = [255 if v == most // 2 else e for v, e in zip(values, expected, strict=True)]
    assert all(abs(a - b) <= 1 for a, b in zip(shown.tobytes(), expected, strict=True))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_of_a_png_is_white(depth: int) -> None:
    unit = 257 if depth == 16 else 1
    pixels = [10, 20, 30, 40, 50, 60]
    code = ">H" if depth == 16 else ">B"
    row = b"".join(struct.pack(code, unit * value) for value in pixels)
    before = png_chunk(b"tRNS", struct.pack(">HHH", *(unit * value for value in pixels[:3])))
    shown = open_image(png((2, 1), b"\0" + row, depth=depth, before=before), LIMIT)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def with_alpha(mode: str) -> Image.Image:
    picture = GREY.convert(mode)
    picture.putalpha(100)
    return picture


TRANSPARENT = {
    "PNG, LA": saved(with_alpha("LA"), "PNG"),
    "PNG, RGBA": saved(with_alpha("RGBA"), "PNG"),
    "PNG, 16 bits LA": png(
        SIZE,
        rows(
            b"".join(struct.pack(">HH", 257 * value, 257 * 100) for value in GREY.tobytes()),
            4 * SIZE[0],
        ),
        depth=16,
        kind=4,
    ),
    "PNG, palette": png(
        SIZE,
        rows(GREY.tobytes(), SIZE[0]),
        kind=3,
        before=png_chunk(b"PLTE", bytes(n // 3 for n in range(768)))
        + png_chunk(b"tRNS", bytes([100] * 256)),
    ),
    "WebP": saved(with_alpha("RGBA"), "WEBP", lossless=True, exact=True),
    "TIFF, LA": saved(with_alpha("LA"), "TIFF"),
    "TIFF, RGBA": saved(with_alpha("RGBA"), "TIFF"),
    "TIFF, PA": saved(with_alpha("PA"), "TIFF"),
}


@pytest.mark.parametrize("case", TRANSPARENT)
def test_what_is_transparent_lies_over_white(case: str) -> None:
    shown = open_image(TRANSPARENT[case], LIMIT)
    assert difference(shown, OVER_WHITE.convert("RGB")) <= 1


def test_premultiplied_alpha_is_undone() -> None:
    picture = Image.new("RGBa", (4, 4), (100, 50, 0, 100))
    raw = saved(picture.convert("RGBA"), "TIFF")
    # Say that colours are multiplied already (ExtraSamples 1 instead of 2), and multiply them.
    raw = raw.replace(bytes((255, 127, 0, 100)), bytes((100, 50, 0, 100)))
    extra = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    assert extra in raw
    shown = open_image(raw.replace(extra, struct.pack("<HHIHH", 338, 3, 1, 1, 0)), LIMIT)
    assert difference(shown, Image.new("RGB", shown.size, (255, 205, 155))) <= 2


def test_a_transparent_place_in_a_gif_is_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 0])
    picture.putdata([1, 2])
    shown = open_image(saved(picture, "GIF", transparency=2), LIMIT)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


def test_a_bmp_whose_fourth_byte_means_nothing_is_opaque() -> None:
    picture = COLOURS.convert("RGBA")
    picture.putalpha(0)
    assert difference(open_image(saved(picture, "BMP"), LIMIT), COLOURS) == 0


EXACT = {
    "1": saved(GREY.convert("1"), "PNG"),
    "L": saved(GREY, "PNG"),
    "P": saved(GREY.convert("P"), "PNG"),
    "RGB, 16 bits": png(
        SIZE,
        rows(b"".join(struct.pack(">H", 257 * v) for v in COLOURS.tobytes()), 6 * SIZE[0]),
        depth=16,
    ),
    "RGBX": saved(COLOURS.convert("RGBX"), "TIFF"),
    "CMYK in a TIFF": saved(COLOURS.convert("CMYK"), "TIFF"),
    "YCbCr": saved(COLOURS.convert("YCbCr"), "TIFF"),
}
EXPECTED = {
    "1": GREY.convert("1").convert("RGB"),
    "L": GREY.convert("RGB"),
    "P": GREY.convert("RGB"),
}


@pytest.mark.parametrize("case", EXACT)
def test_any_mode_gives_its_colours(case: str) -> None:
    allowed = {"YCbCr": 4}.get(case, 0)
    assert difference(open_image(EXACT[case], LIMIT), EXPECTED.get(case, COLOURS)) <= allowed


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_any_mode_gives_its_colours(mode: str) -> None:
    # Large and smooth, so that the loss is small.
    picture = Image.merge("RGB", [Image.linear_gradient("L")] * 2 + [Image.radial_gradient("L")])
    picture = picture.convert("L").convert("RGB") if mode == "L" else picture
    shown = open_image(saved(picture.convert(mode), "JPEG", quality=95), LIMIT)
    assert difference(shown, picture) < 16


def test_lab_is_read() -> None:
    # L* 50, a* 60, b* 30: a strong red. L* 100: white.
    picture = Image.new("LAB", (2, 1), (128, 188, 158))
    picture.putpixel((1, 0), (255, 128, 128))
    shown = open_image(saved(picture, "TIFF"), LIMIT)
    red, white = shown.tobytes()[:3], shown.tobytes()[3:]
    assert red[0] > 180
    assert max(red[1:]) < 90
    assert min(white) >= 254


@pytest.mark.parametrize("format_", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_shown(format_: str) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = saved(first, format_, save_all=True, append_images=[second], lossless=True)
    assert open_image(data, LIMIT).getpixel((0, 0)) in ((255, 0, 0), (254, 0, 0))


# Orientation --------------------------------------------------------------------------------------

# Smooth, for JPEG, and different in each corner.
UPRIGHT = Image.merge(
    "RGB",
    [
        Image.linear_gradient("L").resize((48, 32)),
        Image.linear_gradient("L").rotate(90).resize((48, 32)),
        Image.new("L", (48, 32), 60),
    ],
)
UNDONE = {
    None: None,
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How the pixels of an upright picture lie in a file of each orientation."""


def turned(orientation: int) -> tuple[Image.Image, bytes]:
    undo = UNDONE[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return UPRIGHT if undo is None else UPRIGHT.transpose(undo), exif.tobytes()


TURNED_OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
    "TIFF, deflated": {"compression": "tiff_adobe_deflate"},
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, deflated"])
def test_a_turned_picture_is_shown_upright(format_: str, orientation: int) -> None:
    picture, exif = turned(orientation)
    options = TURNED_OPTIONS.get(format_, {})
    data = saved(picture, format_.partition(",")[0], exif=exif, **options)
    assert difference(open_image(data, LIMIT), UPRIGHT) <= (12 if format_ == "JPEG" else 0)


def test_a_png_may_say_its_orientation_behind_its_pixels() -> None:
    picture, exif = turned(6)
    pixels = rows(picture.tobytes(), 3 * picture.width)
    exif = exif.removeprefix(b"Exif\0\0")
    data = png(picture.size, pixels, after=png_chunk(b"eXIf", exif))
    assert difference(open_image(data, LIMIT), UPRIGHT) == 0
    damaged = png(picture.size, pixels, after=png_chunk(b"eXIf", exif)[:-1] + b"?")
    assert sorted(open_image(damaged, LIMIT).size) == sorted(picture.size)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@given(seed=st.integers(0, 2**32))
def test_damaged_exif_refuses_no_picture(format_: str, seed: int) -> None:
    chance = random.Random(seed)
    exif = bytearray(turned(chance.randrange(1, 9))[1])
    for _ in range(chance.randrange(1, 9)):
        exif[chance.randrange(6, len(exif))] = chance.randrange(256)
    exif += chance.randbytes(chance.randrange(40))
    data = saved(UPRIGHT, format_, exif=bytes(exif))
    assert sorted(open_image(data, LIMIT).size) == [32, 48]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"?" * 9]
)
def test_exif_that_is_none_refuses_no_picture(exif: bytes) -> None:
    for format_ in ("JPEG", "PNG", "WEBP"):
        assert open_image(saved(UPRIGHT, format_, exif=exif), LIMIT).size == UPRIGHT.size


@pytest.mark.parametrize("where", [0, 3, 10, 10**6, 2**32 - 1])
def test_damaged_exif_of_a_tiff_refuses_no_picture(where: int) -> None:
    pointers = tuple((tag, 4, 1, where) for tag in (34665, 34853, 40965))
    orientation = (274, 3, 1, 3)
    data = tiff(GREY.tobytes(), 8, more=(orientation, *pointers))
    shown = open_image(data, LIMIT)
    assert difference(shown, GREY.transpose(Image.Transpose.ROTATE_180).convert("RGB")) == 0


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_orientation_that_is_none_leaves_the_picture_as_it_is(value: int) -> None:
    data = tiff(GREY.tobytes(), 8, more=((274, 3, 1, value),))
    assert difference(open_image(data, LIMIT), GREY.convert("RGB")) == 0


def test_every_orientation_is_known() -> None:
    assert sorted(TURNS) == list(range(2, 9))


# Metadata -----------------------------------------------------------------------------------------

LARGE = random.Random(0).randbytes(700_000)


def pngs_with_metadata() -> dict[str, bytes]:
    plain = rows(COLOURS.tobytes(), 3 * SIZE[0])
    packed = zlib.compress(bytes(3_000_000))
    texts = {
        "a colour profile of 3 MB": png_chunk(b"iCCP", b"icc\0\0" + packed),
        "a colour profile that is none": png_chunk(b"iCCP", b"icc\0\0" + b"none"),
        "an empty colour profile": png_chunk(b"iCCP", b""),
        "3 MB of compressed text": png_chunk(b"zTXt", b"Comment\0\0" + packed),
        "3 MB of compressed international text": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
        "text of 700 kB": png_chunk(b"tEXt", b"Comment\0" + LARGE),
        "a hundred texts": png_chunk(b"zTXt", b"Comment\0\0" + packed) * 100,
        "a wrong checksum of a text": png_chunk(b"tEXt", b"Comment\0x")[:-1] + b"?",
        "an animation's chunk that is none": png_chunk(b"acTL", b""),
        "short gamma, size and time": png_chunk(b"gAMA", b"")
        + png_chunk(b"pHYs", b"1")
        + png_chunk(b"tIME", b"")
        + png_chunk(b"cHRM", b"1")
        + png_chunk(b"sRGB", b""),
    }
    return {name: png(SIZE, plain, before=chunk) for name, chunk in texts.items()} | {
        f"{name}, behind the pixels": png(SIZE, plain, after=chunk) for name, chunk in texts.items()
    }


METADATA = pngs_with_metadata() | {
    "WebP": saved(
        COLOURS, "WEBP", lossless=True, icc_profile=LARGE, exif=b"Exif\0\0" + LARGE, xmp=LARGE
    ),
    "TIFF": saved(COLOURS, "TIFF", icc_profile=LARGE),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_of_any_size_refuse_no_picture(case: str) -> None:
    assert difference(open_image(METADATA[case], LIMIT), COLOURS) == 0


def test_a_jpeg_with_much_metadata_is_read() -> None:
    data = saved(UPRIGHT, "JPEG", icc_profile=LARGE, comment=LARGE[:60_000], xmp=b"x" * 60_000)
    assert open_image(data, LIMIT).size == UPRIGHT.size
    segments = b"".join(
        bytes((0xFF, kind)) + struct.pack(">H", 2 + len(text)) + text
        for kind in range(0xE0, 0xF0)
        for text in (b"Photoshop 3.0\0" + b"8BIM\x04\x04\xff", b"MPF\0II*\0", b"Adobe", b"JFIF")
    )
    assert open_image(data[:2] + segments + data[2:], LIMIT).size == UPRIGHT.size


def test_a_gif_with_a_long_comment_is_read() -> None:
    assert open_image(saved(GREY, "GIF", comment=LARGE), LIMIT).size == SIZE


# Damage and bombs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM"])
def test_half_a_file_is_truncated(format_: str) -> None:
    data = encoded(format_, size=(64, 64))
    with pytest.raises(InvalidMessage) as caught:
        open_image(data[: len(data) // 2], LIMIT)
    assert caught.value.reason in (Reason.TRUNCATED_IMAGE, Reason.NOT_AN_IMAGE)
    if format_ in ("PNG", "JPEG"):
        assert caught.value.reason is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg/>", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF", b"P7 332", b"Pf 1 1"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidMessage) as caught:
        open_image(data, LIMIT)
    assert caught.value.reason is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("size", [(2049, 2048), (30_000, 30_000), (12_000, 10_000), (65_000, 100)])
def test_a_decompression_bomb_is_refused_before_it_unfolds(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidMessage) as caught:
        open_image(png(size, bytes(1000)), LIMIT)
    assert caught.value.reason is Reason.TOO_MANY_PIXELS


def test_the_largest_image_allowed_is_read() -> None:
    assert open_image(encoded(size=(40, 25)), 1000).size == (40, 25)
    with pytest.raises(InvalidMessage, match=r"41 x 25 pixels are more than .*1000"):
        open_image(encoded(size=(41, 25)), 1000)


@pytest.mark.parametrize("size", [(LIMIT, 1), (1, LIMIT), (MAX_EDGE + 1, 1)])
def test_an_edge_has_a_limit_of_its_own(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidMessage, match=f"an edge is longer than {MAX_EDGE}") as caught:
        open_image(png(size, b"\0" * (size[1] * (size[0] // 8 + 1)), depth=1, kind=0), LIMIT)
    assert caught.value.reason is Reason.TOO_MANY_PIXELS
    longest = png((MAX_EDGE, 1), bytes(MAX_EDGE // 8 + 2), depth=1, kind=0)
    assert open_image(longest, LIMIT).size == (MAX_EDGE, 1)


def test_a_tile_counts_as_pixels_though_it_is_cut_off() -> None:
    tiles = ((322, 4, 1, 16_384), (323, 4, 1, 16_384), (324, 4, 1, 8), (325, 4, 1, 100))
    data = tiff(GREY.tobytes(), 8, more=tiles)
    with pytest.raises(InvalidMessage, match="tiles of 16384 x 16384 pixels") as caught:
        open_image(data, LIMIT)
    assert caught.value.reason is Reason.TOO_MANY_PIXELS


def progressive(scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = saved(UPRIGHT, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    return data[:-2] + scan * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_that_paints_its_pixels_again_and_again_is_refused() -> None:
    assert open_image(progressive(12), LIMIT).size == UPRIGHT.size
    with pytest.raises(InvalidMessage, match=f"{MAX_SCANS + 1} times"):
        open_image(progressive(MAX_SCANS + 1), LIMIT)


@given(st.data())
def test_any_damage_is_a_picture_or_a_reason(data: st.DataObject) -> None:
    original = bytearray(GOOD[data.draw(st.sampled_from(sorted(GOOD)))])
    for _ in range(data.draw(st.integers(1, 8))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(original), LIMIT)
    except InvalidMessage:
        return
    assert image.mode == "RGB"


GOOD = {format_: encoded(format_, size=(8, 8)) for format_ in NAMES} | DEEP | TRANSPARENT | EXACT

LARGEST = textwrap.dedent(
    """
    import io, resource, sys
    from PIL import Image
    from iot_pipeline.errors import InvalidMessage
    from iot_pipeline.pictures import open_image

    format_, mode, *words = sys.argv[1].split()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = dict(word.split("=") for word in words)
    file = io.BytesIO()
    Image.new(mode, (2048, 2048)).save(file, format_, exif=exif.tobytes(), **options)
    data = file.getvalue()
    del file
    used = 4096 * int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + 128 * 2**20,) * 2)
    print(*open_image(data, 2048 * 2048).size)
    """
)


@pytest.mark.parametrize(
    "kind",
    [
        "PNG RGBA",
        "PNG I;16",
        "TIFF F compression=tiff_adobe_deflate",
        "TIFF LAB",
        "JPEG CMYK",
        "WEBP RGBA",
    ],
)
def test_the_largest_pictures_take_less_than_128_mib(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGEST, kind],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "2048 2048\n", done.stderr
