"""The engine `torch`: the network as it is, channels last. The one that others are held against.

Computes on a CUDA device where torch sees one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from iot_pipeline.engines import Answer, PrecisionError, Run
from iot_pipeline.model import Model, Ranges
from iot_pipeline.network import FromPixels, load_network
from iot_pipeline.processor import instructions


def version() -> str:
    """The version of torch."""
    return str(torch.__version__)


def build(model: Model, precision: str, ranges: Ranges | None, folder: Path) -> None:
    """Nothing: torch runs the weights as they are."""


def load(model: Model, precision: str, folder: Path | None, threads: int) -> Run:
    """Load the weights, each time."""
    return run_torch(model, precision, threads, lambda network: network)


def run_torch(
    model: Model,
    precision: str,
    threads: int,
    transform: Callable[[torch.nn.Module], torch.nn.Module],
) -> Run:
    """Run what `transform` makes of the network, on the device that torch finds.

    Raises:
        PrecisionError: the processor has nothing to compute bfloat16 with.
    """
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torch would do it in plain code, 20 to 30 times slower than single precision. Its library for
    # convolutions (oneDNN) takes AVX-512 for it, with or without instructions of its own.
    if precision == "bf16" and device.type == "cpu" and "avx512bw" not in instructions():
        raise PrecisionError("torch computes bfloat16 with AVX-512, which this processor lacks")
    network = load_network(model).to(
        device,
        torch.bfloat16 if precision == "bf16" else torch.float32,
        memory_format=torch.channels_last,
    )
    config = model.config
    whole = FromPixels(network, config.mean, config.std).to(device).eval()
    compiled = transform(whole)
    width, height = config.size

    def run(pixels: Sequence[bytes]) -> Answer:
        # Not by way of numpy: torch and numpy of different releases do not know each other.
        flat = torch.frombuffer(bytearray().join(pixels), dtype=torch.uint8)
        batch = flat.view(len(pixels), height, width, 3).to(device)
        with torch.inference_mode():
            confidences, classes = compiled(batch).max(dim=1)
        return list(zip(classes.tolist(), confidences.tolist(), strict=True))

    return run
