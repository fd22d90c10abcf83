"""Pictures from strangers: the pixels that a viewer shows, or the reason why there are none.

The pixels do not depend on how a file keeps them: values of 16 bits are scaled to 8, what is
transparent lies over white, and the picture is turned as its EXIF orientation says. Of an animation
or of several pages it is the first. Colour profiles are not applied.

Metadata decide nothing else. Neither damage nor size of them refuses a picture.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from typing import cast

from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from iot_pipeline.errors import InvalidMessage, Reason
from iot_pipeline.formats import NAMES, find_format

# Pillow's own limit only warns at first, and its warnings cannot be silenced in one thread alone.
# `open_image` has a limit that refuses.
Image.MAX_IMAGE_PIXELS = None
# It warns of damaged metadata, which are none of our business.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_EDGE = 65_535  # pixels, as JPEG and GIF have it: to scale a longer edge down takes much memory
MAX_SCANS = 200  # of a progressive JPEG, usually 10: each goes over all pixels, for a few bytes

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its orientation in EXIF 2.32, 4.6.5."""

# Tags of TIFF 6.0.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 258, 262, 322, 323, 339
_WHITE_IS_ZERO = 0
_UNSIGNED = 1

_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file from a stranger.

    Args:
        data: the file's bytes.
        max_pixels: the largest width times height to decode: a small file can hold a huge image.

    Returns:
        What a viewer shows of it, as RGB.

    Raises:
        InvalidMessage: it is no image, is damaged, or has too many pixels.
    """
    found = find_format(data)
    exif = None
    if found and found.name in _SPLIT:
        data, exif = _SPLIT[found.name](data)
    try:
        image = Image.open(io.BytesIO(data), formats=(found.name,) if found else ())
    except UnidentifiedImageError as error:
        raise InvalidMessage(
            Reason.NOT_AN_IMAGE, f"none of the formats {', '.join(NAMES)}"
        ) from error
    except Exception as error:
        raise _damaged(error) from error
    _check_size(image, data, max_pixels)
    try:
        if image.format == "TIFF":
            _forget_metadata(image)
        image.load()
        turn = TURNS.get(_orientation_of(exif or image.info.get("exif")))
        shown = _shown(image, data)
        return shown if turn is None else shown.transpose(turn)
    except Exception as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> InvalidMessage:
    # Pillow's decoders raise whatever they stumble over: OSError, SyntaxError, ValueError,
    # struct.error, IndexError …
    return InvalidMessage(Reason.TRUNCATED_IMAGE, f"truncated or damaged: {error}")


def _check_size(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse what costs more memory or time than an image of `max_pixels`."""
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidMessage(
            Reason.TOO_MANY_PIXELS,
            f"{width} x {height} pixels are more than IOT_MAX_IMAGE_PIXELS={max_pixels}",
        )
    if max(width, height) > MAX_EDGE:
        raise InvalidMessage(
            Reason.TOO_MANY_PIXELS,
            f"{width} x {height} pixels: an edge is longer than {MAX_EDGE}",
        )
    if image.format == "TIFF":
        # A tile is decoded as a whole, however little of it belongs to the picture.
        width, height = (_tag(image, tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        if width * height > max_pixels:
            raise InvalidMessage(
                Reason.TOO_MANY_PIXELS,
                f"tiles of {width} x {height} pixels are more than "
                f"IOT_MAX_IMAGE_PIXELS={max_pixels}",
            )
    elif image.format == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise InvalidMessage(
            Reason.TOO_MANY_PIXELS,
            f"a progressive JPEG that paints its pixels {scans} times, more than {MAX_SCANS}",
        )


# Metadata -----------------------------------------------------------------------------------------


def _split_png(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without what its pixels do not depend on, and its EXIF.

    Pillow reads texts and colour profiles too, and refuses the file when they unpack to more than
    it likes, or are damaged.
    """
    at = 8
    parts = [data[:at]]
    exif = None
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        # A small first letter says that a picture can do without; see the PNG specification, 5.4.
        if not kind[0] & 0x20 or kind == b"tRNS":
            parts.append(data[at:end])
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        if kind == b"IEND":
            break
        at = end
    return b"".join(parts), exif


def _split_jpeg(data: bytes) -> tuple[bytes, bytes | None]:
    """The same of a JPEG: of applications' segments, two say what the colours are."""
    at = 2
    parts = [data[:at]]
    exif = None
    # Segments, up to the first scan; see ITU T.81, B.1.1.
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # may fill the space between segments
            at += 1
            continue
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        content = data[at + 4 : end]
        colours = (marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 12) or (
            marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12
        )
        if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append(data[at:end])
        elif exif is None and marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif = content
        at = end
    parts.append(data[at:])
    return b"".join(parts), exif


_SPLIT = {"PNG": _split_png, "JPEG": _split_jpeg}


def _forget_metadata(image: Image.Image) -> None:
    """Keep Pillow from reading a TIFF's EXIF, all but the orientation, which it then obeys."""
    exif = Image.Exif()
    orientation = _tag(image, ExifTags.Base.Orientation, 1)
    if orientation in TURNS:
        exif[ExifTags.Base.Orientation] = orientation
    image.info["exif"] = exif.tobytes()


def _orientation_of(exif: bytes | None) -> int:
    if not exif:
        return 1
    try:
        tags = Image.Exif()
        tags.load(exif)
        return int(tags.get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - Pillow raises whatever it stumbles over
        return 1


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """The first number under a TIFF's tag."""
    value = image.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else default


# Pixels -------------------------------------------------------------------------------------------


def _shown(image: Image.Image, data: bytes) -> Image.Image:
    """What a viewer shows of a decoded image, as RGB."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in _DEEP_MODES:
        return _shallow(image)
    if image.mode == "LAB":
        return _from_lab(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.format == "PNG" and image.mode in ("L", "RGB"):
        _scale_transparency(image, depth=data[24])
    coloured = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    alpha = coloured.getchannel("A")
    if image.format == "BMP" and alpha.getextrema() == (0, 0):
        # Many programs leave the fourth byte of a pixel at 0, and mean nothing by it.
        return coloured.convert("RGB")
    return _over_white(coloured, alpha)


def _over_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    shown = Image.new("RGB", image.size, "white")
    shown.paste(image, mask=alpha)
    return shown


def _shallow(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, scaled to them."""
    transparent = image.info.get("transparency")
    # Pillow can do arithmetic with these two modes alone.
    values = image if image.mode in ("I", "F") else image.convert("I")
    white = _white_of(image)
    if white > 2**31:
        # Pillow's whole numbers have a sign and 32 bits; the highest 8 of them are right all the
        # same.
        grey = Image.frombytes("L", image.size, values.tobytes()[3::4])
    else:
        grey = values.point(lambda value: value * (255 / white) + 0.5).convert("L")
    if image.format == "TIFF" and _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        grey = ImageOps.invert(grey)
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    stored = image.tobytes()
    low, high = (Image.frombytes("L", image.size, stored[first::2]) for first in (0, 1))
    opaque = ImageChops.lighter(
        low.point([255 * (value != transparent & 255) for value in range(256)]),
        high.point([255 * (value != transparent >> 8) for value in range(256)]),
    )
    return _over_white(grey, opaque)


def _white_of(image: Image.Image) -> int:
    """The value that stands for white."""
    bits, signed = 16, False
    if image.format == "TIFF":
        bits = _tag(image, _BITS_PER_SAMPLE, 16)
        signed = _tag(image, _SAMPLE_FORMAT, _UNSIGNED) != _UNSIGNED
    if image.mode == "F" or bits > 16:
        # Where white is stands nowhere, and programs differ: it is the lowest of what is usual that
        # no pixel exceeds.
        darkest, brightest = cast("tuple[float, float]", image.getextrema())
        usual = (1, 255, 65_535) if image.mode == "F" else (255, 65_535)
        for white in usual:
            if brightest <= white and (signed or darkest >= 0):
                return white
    if image.mode == "F":
        return 65_535
    return int(2 ** (bits - 1 if signed else bits)) - 1


def _from_lab(image: Image.Image) -> Image.Image:
    return ImageCms.applyTransform(image, _lab_to_rgb()) or image


@functools.cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent colour to 8 bits, as Pillow has brought its pixels."""
    colour = image.info["transparency"]
    if image.mode == "L":
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif depth == 16:
        image.info["transparency"] = tuple(part >> 8 for part in colour)
