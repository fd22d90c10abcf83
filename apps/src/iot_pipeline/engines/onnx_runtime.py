"""The engine `onnxruntime`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from iot_pipeline.engines import Answer, Run
from iot_pipeline.model import Model, Ranges

FILE = "model.onnx"


def version() -> str:
    """ONNX Runtime's version."""
    return str(onnxruntime.__version__)


def build(model: Model, precision: str, ranges: Ranges | None, folder: Path) -> None:
    """Write the model as ONNX."""
    from iot_pipeline.engines.onnx import write_onnx

    write_onnx(model, ranges if precision == "int8" else None, folder / FILE)


def load(model: Model, precision: str, folder: Path, threads: int) -> Run:
    """Load the ONNX file; ONNX Runtime optimises it for this processor, in a second."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Waiting threads that spin take the cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(folder / FILE), options, providers=["CPUExecutionProvider"]
    )
    width, height = model.config.size

    def run(pixels: Sequence[bytes]) -> Answer:
        batch = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, height, width, 3)
        (probabilities,) = session.run(None, {"pixels": batch})
        classes = probabilities.argmax(axis=1)
        confidences = probabilities.max(axis=1)
        return list(zip(classes.tolist(), confidences.tolist(), strict=True))

    return run
