"""What the lab's commands have in common: their exit statuses, and how they refuse a typo."""

from __future__ import annotations

import argparse
import sys
from enum import IntEnum
from typing import NoReturn


class Exit(IntEnum):
    """Those of the pipeline's own commands, where the lab has a use for them."""

    OK = 0
    FAILED = 1
    """The answer is no: a service does not run, a drill or a measurement failed."""
    USAGE = 64
    """The command line is wrong."""
    UNAVAILABLE = 69
    """It could not be done; the message says why and what to do."""
    INTERNAL = 70
    """An error nobody foresaw; its traceback is on standard error."""
    INTERRUPTED = 130
    """Ctrl-C, as a shell has it."""


class Parser(argparse.ArgumentParser):
    """Its subparsers are of its kind."""

    def error(self, message: str) -> NoReturn:
        """End with the status of wrong usage; argparse's own, 2, is `critical` to health."""
        self.print_usage(sys.stderr)
        self.exit(Exit.USAGE, f"{self.prog}: {message}\n")
