"""The engine `torch-compile`: torch's own compiler.

It needs torch 2 with its headers, a C++ compiler, Python's headers and setuptools.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from iot_pipeline.engines import HOW_TO_CHOOSE, EngineError, Run
from iot_pipeline.engines.torch_eager import run_torch
from iot_pipeline.model import Model, Ranges


def version() -> str:
    """The version of torch.

    Raises:
        EngineError: this torch has no compiler.
    """
    found = str(torch.__version__)
    if not hasattr(torch, "compile"):
        raise EngineError(
            f"the engine torch-compile needs torch 2 or later, and this host has {found}; "
            f"{HOW_TO_CHOOSE}"
        )
    return found


def build(model: Model, precision: str, ranges: Ranges | None, folder: Path) -> None:
    """Nothing yet: the first images make torch compile, and it keeps that beside the folder."""


def load(model: Model, precision: str, folder: Path, threads: int) -> Run:
    """Compile for any number of images, or find what was compiled before."""
    # Not in the folder, whose name changes once the model has passed its check.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.parent / "torch-compile")
    run = run_torch(model, precision, threads, lambda network: torch.compile(network, dynamic=True))
    grey = bytes([128]) * (model.config.size[0] * model.config.size[1] * 3)
    try:
        # One image is compiled apart from any other number of them.
        for count in (1, 2):
            run([grey] * count)
    except Exception as error:  # The compiler's own classes differ from release to release.
        why = " ".join(str(error).split()[:20])
        raise EngineError(
            f"torch cannot compile here ({why}): it needs a C++ compiler, "
            f"setuptools, and the headers of Python and torch, or {HOW_TO_CHOOSE}"
        ) from error
    return run
