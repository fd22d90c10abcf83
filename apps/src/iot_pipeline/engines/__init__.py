"""Engines: what runs a network. One module each, all behind the same few methods.

torch is the source of every model: an engine builds what it runs from a torch network, once, in
`iot-pipeline prepare-model`, and later loads that without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from iot_pipeline.errors import ConfigError
from iot_pipeline.model import Model, Ranges

Answer = Sequence[tuple[int, float]]
"""For each image the likeliest class, as its number, and the probability of it, 0 to 1."""

Run = Callable[[Sequence[bytes]], Answer]
"""Classifies RGB pixels: height * width * 3 bytes an image, one image or more."""

MODULES = {
    "torch": "iot_pipeline.engines.torch_eager",
    "torch-compile": "iot_pipeline.engines.torch_compile",
    "onnxruntime": "iot_pipeline.engines.onnx_runtime",
    "openvino": "iot_pipeline.engines.open_vino",
}
PRECISIONS = {
    "torch": ("fp32", "bf16"),
    "torch-compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
"""What each engine can compute with."""

HOW_TO_CHOOSE = "choose another with IOT_ENGINE (the role's variable: inference_node_engine)"


class EngineError(ConfigError):
    """The engine cannot be used here. The message says why and which setting chooses another."""


class PrecisionError(EngineError):
    """The engine cannot be used in this precision on this host."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        """The reason, and what to set."""
        return (
            f"{self.reason}; set IOT_PRECISION or IOT_ENGINE (the role's variables: "
            "inference_node_precision, inference_node_engine)"
        )


class Engine(Protocol):
    """What a module in this package has as functions."""

    def version(self) -> str:
        """The version of the library that runs the model.

        Raises:
            ImportError: it is not installed.
            EngineError: it is, but it does not do.
        """
        ...

    def build(self, model: Model, precision: str, ranges: Ranges | None, folder: Path) -> None:
        """Compile the model into an empty folder. Needs torch; `ranges` are for int8 alone."""
        ...

    def load(self, model: Model, precision: str, folder: Path, threads: int) -> Run:
        """Load what `build` left in the folder. The engine chooses how many threads, if 0.

        Raises:
            EngineError: this host lacks what it takes.
        """
        ...


def find_engine(name: str) -> Engine:
    """The engine of that name, if its packages are installed.

    Raises:
        EngineError: there is none of that name, or it is not installed here.
    """
    if name not in MODULES:
        raise EngineError(f"IOT_ENGINE must be one of {', '.join(MODULES)}, not {name!r}")
    try:
        engine: Engine = importlib.import_module(MODULES[name])
        engine.version()
    except ImportError as error:
        raise EngineError(
            f"the engine {name} is not installed here (no Python package {error.name}): "
            f"set inference_node_engine to {name} and run the playbook, or install "
            f"iot-pipeline[{_extra(name)}], or {HOW_TO_CHOOSE}"
        ) from error
    return engine


def _extra(name: str) -> str:
    return "inference" if name.startswith("torch") else f"inference-{name}"


def ladder(engine: str, precision: str, model: Model, *, calibrated: bool) -> tuple[str, ...]:
    """The precisions to try until one does, the fastest first.

    Args:
        engine: its name.
        precision: what was asked for. `auto` is int8, where the engine has it and the model comes
            with activation ranges, and then fp32. A name stands for itself.
        model: the model.
        calibrated: whether there are images to measure ranges on.

    Raises:
        EngineError: the engine, or the model, has no such precision.
    """
    known = PRECISIONS[engine]
    if precision == "auto":
        # Not bf16: a processor that has it computes int8 faster still.
        tried = ("int8", "fp32") if model.config.ranges is not None else ("fp32",)
        return tuple(each for each in tried if each in known)
    if precision not in known:
        having = ", ".join(name for name, all_ in PRECISIONS.items() if precision in all_)
        raise EngineError(
            f"the engine {engine} has no precision {precision}, only {', '.join(known)}; {having} "
            f"would have it: set IOT_PRECISION or IOT_ENGINE (the role's variables: "
            "inference_node_precision, inference_node_engine)"
        )
    if precision == "int8" and model.config.ranges is None and not calibrated:
        raise EngineError(
            "int8 needs the range of values between layers, and this model's config.json has no "
            "activation_ranges: name training images to measure them on with "
            "IOT_CALIBRATION_IMAGES (the role's variable: inference_node_calibration_images), or "
            "set IOT_PRECISION to fp32"
        )
    return (precision,)
