"""What the lab prints: steps with their durations, and tables."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum


class Colour(Enum):
    """The meanings that colours have here, as the terminal's codes."""

    TITLE = "1"
    GOOD = "32"
    BAD = "31"
    QUIET = "2"


def is_coloured() -> bool:
    """Tell whether standard output is a terminal whose user wants colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, colour: Colour, *, coloured: bool | None = None) -> str:
    """Return the text in a colour, or as it is where there are no colours."""
    if coloured is None:
        coloured = is_coloured()
    return f"\033[{colour.value}m{text}\033[0m" if coloured else text


def say(text: str = "") -> None:
    """Print at once, also into a pipe: long work shows where it stands."""
    print(text, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `8 s`, `3 min 20 s`, `5 h 2 min`, `3 d 4 h`."""
    whole = round(seconds)
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {part}"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole} s"


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title, run the body, print how long it took."""
    say(paint(f"==> {title}", Colour.TITLE))
    started = time.monotonic()
    yield
    say(paint(f"    done in {duration(time.monotonic() - started)}", Colour.QUIET))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows under a header, in aligned columns.

    `right` numbers the columns that are aligned to the right, from 0.
    """
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(f"  {line}" for line in lines)
