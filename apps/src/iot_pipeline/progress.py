"""How far a long piece of work has come, for whoever waits for it."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line on a terminal that says how far it is; nothing where nobody watches."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._at = 0.0

    def show(self, text: str) -> None:
        """Say how far it is, a few times a second at most."""
        if self._shown and time.monotonic() - self._at > 0.2:
            self._at = time.monotonic()
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away again."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
