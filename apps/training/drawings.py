"""Draw small pictures of the ten CIFAR-10 classes from an emoji font.

CIFAR-10's photographs have no licence that would let us ship them, so the
project ships drawings: one glyph of the Noto Color Emoji font (SIL Open Font
License 1.1) per picture, on a drawn background, 32x32 RGB. The classifier sees
*other* drawings of the same glyphs in training (another seed), so accuracy on
the sample says that the pipeline works, not that the model generalises.

    python drawings.py --out sample.tar.xz --per-class 24 --seed 2026
    python drawings.py --out some/folder   --per-class 100 --seed 7

A picture depends on (seed, class, index) alone: asking for more pictures leaves
the first ones as they were. Bytes are reproducible for one version of Pillow,
numpy and the font.
"""

from __future__ import annotations

import argparse
import functools
import io
import lzma
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from iot_pipeline.schema import CLASSES

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Where Debian's `fonts-noto-color-emoji` puts it."""

SIZE = 32
"""Edge of a picture, pixels."""

SAMPLE_SEED = 2026
"""What the shipped sample was drawn with."""

_STRIKE = 109  # the font's only bitmap size; FreeType refuses any other
_CANVAS = 4 * SIZE  # drawn large and reduced once, so edges are smooth

GLYPHS: dict[str, str] = {
    "airplane": "✈🛩🛫🛬",
    "automobile": "🚗🚘🚙🚕🚖🚓🚔🏎",
    "bird": "🐦🐤🐥🦅🦆🦉🦜🕊🐓🦢🦃🦩",
    "cat": "🐱🐈",
    "deer": "🦌",
    "dog": "🐶🐕🐩🦮",
    "frog": "🐸",
    "horse": "🐴🐎",
    "ship": "🚢⛵🛳⛴🚤🛥",
    "truck": "🚚🚛🚒",
}
"""The glyphs of each class; pickup trucks are left out, as in CIFAR-10."""


@functools.cache
def _glyph(character: str, font: Path) -> Image.Image:
    """The glyph as RGBA, cropped to what is painted.

    Raises:
        OSError: the font cannot be read.
        ValueError: the font has no picture for the character.
    """
    canvas = Image.new("RGBA", (2 * _STRIKE, 2 * _STRIKE), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text(
        (16, 16), character, font=ImageFont.truetype(str(font), _STRIKE), embedded_color=True
    )
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{font} has no picture for {character!r}")
    return canvas.crop(box)


def _background(rng: np.random.Generator) -> Image.Image:
    """A plain, graded, grainy, striped or horizon background, RGB, `_CANVAS` wide."""
    first, second = rng.integers(40, 236, size=(2, 3)).astype(np.float64)
    y, x = np.mgrid[0:_CANVAS, 0:_CANVAS] / _CANVAS
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    kind = int(rng.integers(5))
    if kind == 0:  # plain
        share = np.zeros_like(along)
    elif kind == 1:  # gradient
        share = (along - along.min()) / np.ptp(along)
    elif kind == 2:  # stripes
        share = 0.5 + 0.5 * np.sin(2 * math.pi * rng.uniform(2, 7) * along)
        second = first + (second - first) * 0.4
    elif kind == 3:  # a soft horizon
        share = 1 / (1 + np.exp(-25 * (y - rng.uniform(0.4, 0.8))))
    else:  # blotches: coarse noise, enlarged smoothly
        coarse = rng.integers(0, 256, size=(8, 8)).astype(np.uint8)
        blotches = Image.fromarray(coarse).resize((_CANVAS, _CANVAS), Image.Resampling.BICUBIC)
        share = np.asarray(blotches) / 255.0
    colours = first + share[..., None] * (second - first)
    if rng.random() < 0.5:  # grain on any of them
        colours += rng.normal(0, rng.uniform(4, 20), size=(_CANVAS, _CANVAS, 1))
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))


def draw(label: str, seed: int, index: int, font: Path = FONT) -> Image.Image:
    """Draw one picture.

    Args:
        label: one of `CLASSES`.
        seed: chooses the random stream; different seeds share no picture.
        index: which picture of that stream; glyphs take turns.
        font: the colour emoji font file.

    Returns:
        An RGB image, 32x32.

    Raises:
        KeyError: `label` is not a class.
        OSError, ValueError: the font is missing or lacks a glyph.
    """
    glyphs = GLYPHS[label]
    rng = np.random.default_rng([seed, CLASSES.index(label), index])
    glyph = _glyph(glyphs[index % len(glyphs)], font)
    if rng.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = glyph.getchannel("A")
    colour = glyph.convert("RGB")
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        colour = enhance(colour).enhance(rng.uniform(0.7, 1.3))
    colour.putalpha(alpha)
    turned = colour.rotate(rng.uniform(-18, 18), resample=Image.Resampling.BICUBIC, expand=True)
    scale = _CANVAS * rng.uniform(0.7, 1.0) / max(turned.size)
    width, height = (max(1, round(edge * scale)) for edge in turned.size)
    turned = turned.resize((width, height), Image.Resampling.LANCZOS)
    left = int(rng.integers(0, _CANVAS - width + 1))
    top = int(rng.integers(0, _CANVAS - height + 1))
    picture = _background(rng)
    picture.paste(turned, (left, top), turned)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def drawings(
    per_class: int, seed: int, font: Path = FONT
) -> Iterator[tuple[str, int, Image.Image]]:
    """Yield (label, index, picture), `per_class` of each class in the order of `CLASSES`."""
    for label in CLASSES:
        for index in range(per_class):
            yield label, index, draw(label, seed, index, font)


def drawings_array(
    per_class: int, seed: int, font: Path = FONT
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The same pictures as arrays: uint8 (n, 32, 32, 3) RGB, and class numbers (n,)."""
    count = per_class * len(CLASSES)
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for row, (label, _, picture) in enumerate(drawings(per_class, seed, font)):
        images[row] = np.asarray(picture)
        labels[row] = CLASSES.index(label)
    return images, labels


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_archive(out: Path, per_class: int, seed: int, font: Path = FONT) -> None:
    """Write `sample/<class>/NNN.png` into a .tar.xz that depends on the pictures alone.

    Members are sorted; times and owners are zero.
    """
    with (
        lzma.open(out, "wb", preset=9) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for label, index, picture in drawings(per_class, seed, font):
            content = _png(picture)
            member = tarfile.TarInfo(f"sample/{label}/{index:03d}.png")
            member.size = len(content)
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(content))


def write_folder(out: Path, per_class: int, seed: int, font: Path = FONT) -> None:
    """Write `<class>/NNN.png` files under `out`."""
    for label, index, picture in drawings(per_class, seed, font):
        path = out / label / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(picture))


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(
        description="Draw CIFAR-10-class pictures from an emoji font, 32x32 PNG.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="a .tar.xz to write, or a folder")
    parser.add_argument("--per-class", type=int, default=24, help="pictures of each class")
    parser.add_argument(
        "--seed", type=int, default=SAMPLE_SEED, help="random stream; the default is the sample's"
    )
    parser.add_argument("--font", type=Path, default=FONT, help="Noto Color Emoji, bitmap version")
    options = parser.parse_args(argv)
    if not options.font.is_file():
        parser.error(f"no font at {options.font}: install fonts-noto-color-emoji or pass --font")
    write = write_archive if options.out.name.endswith(".tar.xz") else write_folder
    write(options.out, options.per_class, options.seed, options.font)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
