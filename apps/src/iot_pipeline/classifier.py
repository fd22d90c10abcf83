"""The image classifier, whichever engine runs it.

Importing this, or loading a model for OpenVINO or ONNX Runtime, does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from iot_pipeline import engines
from iot_pipeline.engines import EngineError, Run
from iot_pipeline.model import Model, ModelError, find_model
from iot_pipeline.settings import ModelSettings

__all__ = [
    "Classifier",
    "EngineError",
    "ModelError",
    "Prediction",
    "classifier_of",
    "load_classifier",
]

PREPARED = "prepared.json"
"""In the folder of a prepared model: how it was made and how it compared."""

_FORMAT = 2  # of what is in the folder: another number makes every host prepare its model again


@dataclass(frozen=True)
class Prediction:
    """What the model sees in one image."""

    label: str
    """The likeliest class."""
    confidence: float
    """The model's probability for it, 0 to 1. Not calibrated."""


class Classifier:
    """A trained network with the preparation of its input and the names of its outputs."""

    def __init__(self, model: Model, run: Run) -> None:
        self.name = model.name
        """Architecture, `@`, and the first 12 hex digits of the weights file's SHA-256."""
        self.labels = model.config.labels
        self._size = model.config.size
        self._run = run

    def prepare(self, image: Image.Image) -> bytes:
        """What `predict` takes of an image of any size and mode. May run in any thread.

        Images of another size than the network's are scaled to it, without regard to their
        proportions.

        Returns:
            RGB pixels, height * width * 3 bytes.

        Raises:
            OSError: the image is truncated (Pillow decodes when pixels are first asked for).
        """
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        if rgb.size != self._size:
            rgb = rgb.resize(self._size, Image.Resampling.BICUBIC)
        return rgb.tobytes()

    def predict(self, pixels: Sequence[bytes]) -> list[Prediction]:
        """Classify what `prepare` made of images, in one batch of any size."""
        if not pixels:
            return []
        return [
            Prediction(self.labels[number], confidence) for number, confidence in self._run(pixels)
        ]

    def warm_up(self) -> None:
        """Classify a grey image, so that the first real one does not wait for set-up."""
        self.predict([self.prepare(Image.new("RGB", self._size, (128, 128, 128)))])


def load_classifier(
    model: str = "shipped",
    *,
    revision: str | None = None,
    threads: int | None = None,
    engine: str = "torch",
    precision: str = "auto",
    cache: str | Path | None = None,
) -> Classifier:
    """Load a model into an engine.

    Args:
        model: where it is; see `model.find_model`.
        revision: for `hf-hub:` the commit.
        threads: threads to compute with, for the whole process; the engine's choice if 0 or None.
        engine: one of `engines.MODULES`.
        precision: `auto`, or one of `engines.PRECISIONS`.
        cache: the folder that `iot-pipeline prepare-model` was given. torch in single precision
            does without.

    Returns:
        The classifier, not yet warm.

    Raises:
        ModelError: the specification, the folder, the download, the settings or the weights are
            no good.
        EngineError: the engine is not installed, has no such precision, or has no prepared model.
    """
    found = find_model(model, revision or None)
    module = engines.find_engine(engine)
    chosen, folder = find_prepared(found, engine, precision, cache or "")
    return Classifier(found, module.load(found, chosen, folder, threads or 0))


def find_prepared(model: Model, engine: str, precision: str, cache: str | Path) -> tuple[str, Path]:
    """What `iot-pipeline prepare-model` made of a model on this host.

    Returns:
        The precision that it is computed with, which for `auto` only this host knows, and the
        folder. torch in single precision does without one.

    Raises:
        EngineError: the engine is not installed, has no such precision, or has no prepared model.
    """
    version = engines.find_engine(engine).version()
    # What prepared the model has measured ranges where it came with none.
    rungs = engines.ladder(engine, precision, model, calibrated=True)
    folder = prepared_folder(cache, model, engine, version, precision)
    if not is_prepared(engine, precision):
        return rungs[0], folder
    record = read_record(folder)
    if record is None:
        raise EngineError(
            f"there is no model prepared for {engine} {version} in {precision} at "
            f"{folder}: run `iot-pipeline prepare-model` with the same settings (the folder is "
            f"IOT_MODEL_CACHE), as the role inference_node does, or {engines.HOW_TO_CHOOSE}"
        )
    return record["precision"], folder


def classifier_of(settings: ModelSettings) -> Classifier:
    """Load the model that the settings name; see `load_classifier`."""
    return load_classifier(
        settings.model,
        revision=settings.model_revision or None,
        threads=settings.threads or None,
        engine=settings.engine,
        precision=settings.precision,
        cache=settings.model_cache,
    )


def is_prepared(engine: str, precision: str) -> bool:
    """Whether an engine runs a prepared model. torch in single precision runs the weights.

    Args:
        engine: its name.
        precision: what was asked for.
    """
    return engine != "torch" or precision not in ("auto", "fp32")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `PREPARED` in the folder of a prepared model says; None where there is none."""
    try:
        record = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "precision" in record else None


def prepared_folder(
    cache: str | Path, model: Model, engine: str, version: str, precision: str
) -> Path:
    """Where a prepared model lies: a folder named by all that it depends on.

    The precision is what was asked for: what `auto` came to on this host, the record in it says.
    """
    config = model.config
    ranges = sorted((config.ranges or {}).items()) if precision in ("auto", "int8") else []
    inputs = [_FORMAT, model.digest, config.size, config.mean, config.std, config.channels, ranges]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    return Path(cache) / f"{model.name}-{engine}-{version}-{precision}-{digest[:8]}"
