"""What all unit tests share."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set up logging for the whole process, and other tests look at it, too."""
    root, ours = logging.getLogger(), logging.getLogger("iot_pipeline")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
