"""The image formats that the pipeline takes: one list for those who send and those who classify.

They are what cameras and browsers make, and the portable formats of data sets for research.
Pillow reads more, some of it through other programs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """One image format."""

    name: str
    """As Pillow calls it."""
    media_type: str
    endings: tuple[str, ...]
    """Of file names, in lower case."""
    beginning: re.Pattern[bytes]
    """What every file of the format begins with."""


FORMATS = (
    Format("JPEG", "image/jpeg", (".jpg", ".jpeg"), re.compile(rb"\xff\xd8\xff")),
    Format("PNG", "image/png", (".png",), re.compile(rb"\x89PNG\r\n\x1a\n")),
    Format("WEBP", "image/webp", (".webp",), re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    Format("GIF", "image/gif", (".gif",), re.compile(rb"GIF8[79]a")),
    Format("BMP", "image/bmp", (".bmp",), re.compile(rb"BM")),
    Format("TIFF", "image/tiff", (".tif", ".tiff"), re.compile(rb"II[*+]\0|MM\0[*+]")),
    Format("PPM", "image/x-portable-bitmap", (".pbm",), re.compile(rb"P[14][\s#]")),
    Format("PPM", "image/x-portable-graymap", (".pgm",), re.compile(rb"P[25][\s#]")),
    Format("PPM", "image/x-portable-pixmap", (".ppm",), re.compile(rb"P[36][\s#]")),
)

MEDIA_TYPES = {ending: known.media_type for known in FORMATS for ending in known.endings}
"""By the ending of a file's name, in lower case."""

NAMES = tuple(dict.fromkeys(known.name for known in FORMATS))
"""What Pillow calls them."""


def find_format(data: bytes) -> Format | None:
    """The format that a file's first bytes announce, or None if it is none of these."""
    return next((known for known in FORMATS if known.beginning.match(data)), None)
