"""Images from strangers: a decoded picture, or the reason why not."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iot_pipeline.errors import InvalidMessage, Reason
from iot_pipeline.infer import FORMATS, open_image

LIMIT = 4_194_304


def encoded(format_: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    # Noise, so that half of the file is half of the picture.
    picture = Image.effect_noise(size, 80).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format_)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format_", FORMATS)
def test_common_formats_are_read_as_rgb(format_: str) -> None:
    image = open_image(encoded(format_), LIMIT)
    assert (image.mode, image.size) == ("RGB", (32, 32))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_any_mode_is_read_as_rgb(mode: str) -> None:
    assert open_image(encoded("PNG", mode), LIMIT).mode == "RGB"


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_half_a_file_is_truncated(format_: str) -> None:
    data = encoded(format_, size=(64, 64))
    with pytest.raises(InvalidMessage) as caught:
        open_image(data[: len(data) // 2], LIMIT)
    assert caught.value.reason in (Reason.TRUNCATED_IMAGE, Reason.NOT_AN_IMAGE)
    if format_ in ("PNG", "JPEG"):
        assert caught.value.reason is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidMessage) as caught:
        open_image(data, LIMIT)
    assert caught.value.reason is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("size", [(2049, 2048), (30_000, 30_000), (12_000, 10_000), (65_000, 100)])
def test_a_decompression_bomb_is_refused_before_it_unfolds(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidMessage) as caught:
        open_image(png_that_claims(*size), LIMIT)
    assert caught.value.reason is Reason.TOO_MANY_PIXELS


def test_the_largest_image_allowed_is_read() -> None:
    assert open_image(encoded(size=(40, 25)), 1000).size == (40, 25)
    with pytest.raises(InvalidMessage, match=r"41 x 25 pixels are more than .*1000"):
        open_image(encoded(size=(41, 25)), 1000)


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


GOOD = {format_: encoded(format_, size=(8, 8)) for format_ in FORMATS}
