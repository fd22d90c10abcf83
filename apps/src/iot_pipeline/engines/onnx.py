"""What a torch network becomes on its way to an engine: ONNX, with any number of images."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from iot_pipeline.model import Model, Ranges
from iot_pipeline.network import FromPixels, load_network
from iot_pipeline.quantisation import quantise

OPSET = 16
"""The newest that torch 1.13 writes."""


def write_onnx(model: Model, ranges: Ranges | None, path: Path) -> None:
    """Write the model as ONNX, from RGB bytes (n, height, width, 3) to probabilities (n, classes).

    Args:
        model: what to write.
        ranges: what to quantise with; None writes single precision.
        path: the file.
    """
    network = load_network(model)
    if ranges is not None:
        network = quantise(network, ranges)
    whole = FromPixels(network, model.config.mean, model.config.std).eval()
    width, height = model.config.size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        # Of what torch itself does, and of sizes that never change.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole,
            (example,),
            str(path),
            input_names=["pixels"],
            output_names=["probabilities"],
            dynamic_axes={"pixels": {0: "images"}, "probabilities": {0: "images"}},
            opset_version=OPSET,
            # torch 2.9 took another exporter for its default, with packages of its own.
            **({"dynamo": False} if torch.__version__ >= "2.5" else {}),
        )
