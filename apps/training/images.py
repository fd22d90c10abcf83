"""Read labelled images from a folder or a tar archive."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from iot_pipeline.schema import CLASSES


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every file whose folder is named like a class."""
    if source.is_dir():
        for path in source.rglob("*"):
            if path.is_file() and path.parent.name in CLASSES:
                yield str(path), path.read_bytes()
        return
    with tarfile.open(source) as archive:
        for member in archive:
            stream = archive.extractfile(member)  # None unless a regular file
            if stream is not None and Path(member.name).parent.name in CLASSES:
                yield member.name, stream.read()


def labelled_images(source: Path) -> list[tuple[Image.Image, str]]:
    """Read `…/<class>/<file>` images.

    Args:
        source: a folder or a tar archive, compressed or not.

    Returns:
        RGB images and their class names, sorted by path.

    Raises:
        OSError, tarfile.TarError: the source, or an image in it, cannot be read.
        ValueError: the source holds no image of a known class.
    """
    images = [
        (Image.open(io.BytesIO(content)).convert("RGB"), Path(name).parent.name)
        for name, content in sorted(_files(source))
    ]
    if not images:
        raise ValueError(f"no <class>/<image> in {source}")
    return images
