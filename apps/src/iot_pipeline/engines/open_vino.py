"""The engine `openvino`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import Type

from iot_pipeline.engines import Answer, PrecisionError, Run
from iot_pipeline.model import Model, Ranges

FILE = "model.xml"


@functools.cache
def _core() -> Any:
    """The core, one for the life of the process.

    A core gives its thread a signal stack, and back the one before when it goes. Of two that go in
    the order in which they came, the second gives back the first one's, which is unmapped by then:
    the next signal that Python handles ends the process.
    """
    return openvino.Core()


def version() -> str:
    """OpenVINO's version, without its build."""
    return str(openvino.__version__).partition("-")[0]


def build(model: Model, precision: str, ranges: Ranges | None, folder: Path) -> None:
    """Write the model in OpenVINO's own format, by way of ONNX."""
    from iot_pipeline.engines.onnx import write_onnx

    onnx = folder / "model.onnx"
    write_onnx(model, ranges if precision == "int8" else None, onnx)
    # By default it would round weights to half precision.
    openvino.save_model(_core().read_model(onnx), folder / FILE, compress_to_fp16=False)
    onnx.unlink()


def load(model: Model, precision: str, folder: Path, threads: int) -> Run:
    """Load the model and compile it for this processor, which takes half a second."""
    options = {
        # Without this, it takes bfloat16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "NUM_STREAMS": 1,
        # Its threads share the cores with those that decode and send, and must be free to move.
        "ENABLE_CPU_PINNING": False,
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }
    compiled = _core().compile_model(_core().read_model(folder / FILE), "CPU", options)
    # Where the processor has none, it takes single precision without a word.
    if precision == "bf16" and compiled.get_property("INFERENCE_PRECISION_HINT") != Type.bf16:
        raise PrecisionError("this processor computes no bfloat16")
    request = compiled.create_infer_request()
    width, height = model.config.size

    def run(pixels: Sequence[bytes]) -> Answer:
        batch = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, height, width, 3)
        # The answer is read before the next call, so neither side has to copy.
        probabilities = request.infer([batch], share_inputs=True, share_outputs=True)[0]
        classes = probabilities.argmax(axis=1)
        confidences = probabilities.max(axis=1)
        return list(zip(classes.tolist(), confidences.tolist(), strict=True))

    return run
