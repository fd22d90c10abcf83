"""`iot-pipeline prepare-model`: compile the model for its engine, once, and hold it to torch.

The last line begins with `made` or `found`, so that whoever calls it can tell what happened.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from iot_pipeline.classifier import (
    PREPARED,
    Classifier,
    is_prepared,
    load_classifier,
    prepared_folder,
)
from iot_pipeline.engines import choose_precision, find_engine
from iot_pipeline.errors import ConfigError, Exit, PipelineError
from iot_pipeline.model import Model, Ranges, find_model
from iot_pipeline.pictures import open_image
from iot_pipeline.settings import PrepareModelSettings
from iot_pipeline.sources import open_source

ALLOWED_LOSS = 0.005
"""How much smaller than torch's in single precision an engine's share of right answers may be."""

CALIBRATION_IMAGES = 1000  # more of them hardly move the ranges
_BATCH = 50


class ParityError(PipelineError):
    """The compiled model is less accurate than torch in single precision. It is not used."""


@dataclass(frozen=True)
class Labelled:
    """Images that a classifier can take, with what they show."""

    pixels: Sequence[bytes]
    labels: Sequence[str]

    @classmethod
    def read(cls, spec: str, classifier: Classifier, limit: int | None = None) -> Labelled:
        """Read a folder or tar of class-named folders, or the sample that ships.

        Args:
            spec: see `sources.open_source`.
            classifier: prepares the images.
            limit: the most images to read, of all classes in turn.

        Raises:
            ConfigError: it cannot be read, or shows nothing that the model knows.
        """
        with open_source(spec) as source:
            images = list(islice(source, limit))
        pixels = [classifier.prepare(open_image(image.data, 2**26)) for image in images]
        labels = [image.label for image in images]
        if not set(labels) & set(classifier.labels):
            raise ConfigError(
                f"{spec} shows {', '.join(sorted(set(labels))[:5])} and the model knows "
                f"{', '.join(classifier.labels[:5])}: name images of its own classes with "
                "IOT_VALIDATION_IMAGES (the role's variable: inference_node_validation_images)"
            )
        return cls(pixels, labels)

    def accuracy(self, classifier: Classifier) -> float:
        """Share of the images that the classifier gets right, 0 to 1."""
        right = 0
        for start in range(0, len(self.pixels), _BATCH):
            part = slice(start, start + _BATCH)
            seen = classifier.predict(self.pixels[part])
            right += sum(p.label == truth for p, truth in zip(seen, self.labels[part], strict=True))
        return right / len(self.pixels)


def check_parity(reference: float, accuracy: float, what: str) -> None:
    """Refuse an engine that gets fewer images right.

    Args:
        reference: share that torch in single precision gets right, 0 to 1.
        accuracy: the engine's.
        what: names the engine in the message.

    Raises:
        ParityError: the accuracy is more than `ALLOWED_LOSS` below the reference.
    """
    if reference - accuracy > ALLOWED_LOSS + 1e-9:
        raise ParityError(
            f"{what} gets {accuracy:.2%} of the images right and torch in single precision "
            f"{reference:.2%}: more than {ALLOWED_LOSS:.1%} less, so it is refused; set "
            "IOT_PRECISION or IOT_ENGINE (the role's variables: inference_node_precision, "
            "inference_node_engine)"
        )


def run(settings: PrepareModelSettings) -> int:
    """Prepare the model, unless it is there.

    Raises:
        ConfigError: the settings ask for what there is not.
        ParityError: what was compiled is less accurate than it may be.
    """
    model = find_model(settings.model, settings.model_revision or None)
    engine = find_engine(settings.engine)
    precision = choose_precision(
        settings.engine,
        settings.precision,
        model,
        calibrated=bool(settings.calibration_images),
    )
    if settings.precision == "auto" and model.config.ranges is None:
        say(f"{model.name} comes without activation_ranges, so auto is fp32")
    what = f"{model.name} for {settings.engine} {engine.version()} in {precision}"
    if not is_prepared(settings.engine, precision):
        say(f"found {what}: torch runs the weights as they are")
        return Exit.OK
    folder = prepared_folder(
        settings.model_cache, model, settings.engine, engine.version(), precision
    )
    if _is_there(folder, settings.calibration_images):
        say(f"found {what} at {folder}")
        return Exit.OK
    made = make(model, settings, precision, folder)
    say(f"made {what} at {folder}: {made}")
    return Exit.OK


def _is_there(folder: Path, calibration_images: str) -> bool:
    try:
        record = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record.get("calibration_images") == calibration_images)


def make(model: Model, settings: PrepareModelSettings, precision: str, folder: Path) -> str:
    """Compile the model, compare it, and put it into its folder.

    Returns:
        How the comparison went.

    Raises:
        ParityError: what was compiled is less accurate than it may be.
        ConfigError: the folder cannot be written, or images cannot be read.
    """
    engine = find_engine(settings.engine)
    reference = load_classifier(
        settings.model, revision=settings.model_revision, threads=settings.threads
    )
    ranges = model.config.ranges
    if precision == "int8" and settings.calibration_images:
        say(f"measuring ranges on {settings.calibration_images}")
        ranges = ranges_of(
            model, Labelled.read(settings.calibration_images, reference, CALIBRATION_IMAGES)
        )
    images = Labelled.read(settings.validation_images, reference)
    with _new_folder(folder) as partial:
        say(f"compiling {model.name} for {settings.engine} in {precision}")
        started = time.monotonic()
        engine.build(model, precision, ranges, partial)
        compiled = Classifier(model, engine.load(model, precision, partial, settings.threads))
        say(f"compiled in {time.monotonic() - started:.1f} s")
        say(f"comparing with torch on {len(images.pixels)} images of {settings.validation_images}")
        expected, found = images.accuracy(reference), images.accuracy(compiled)
        check_parity(expected, found, f"{settings.engine} in {precision}")
        record = {
            "model": model.name,
            "engine": settings.engine,
            "version": engine.version(),
            "precision": precision,
            "calibration_images": settings.calibration_images,
            "images": len(images.pixels),
            "accuracy": found,
            "accuracy_of_torch_fp32": expected,
        }
        (partial / PREPARED).write_text(json.dumps(record, indent=2) + "\n")
    return f"{found:.2%} of {len(images.pixels)} images right, torch in fp32 {expected:.2%}"


def ranges_of(model: Model, images: Labelled) -> Ranges:
    """The range of values at each point of the network, measured on images. Needs torch."""
    import torch

    from iot_pipeline.network import FromPixels, load_network
    from iot_pipeline.quantisation import measure_ranges

    config = model.config
    width, height = config.size
    whole = FromPixels(load_network(model), config.mean, config.std).eval()
    parts = (images.pixels[at : at + _BATCH] for at in range(0, len(images.pixels), _BATCH))
    batches = (
        torch.frombuffer(bytearray().join(part), dtype=torch.uint8).view(-1, height, width, 3)
        for part in parts
    )
    return measure_ranges(whole.network, map(whole.normalise, batches))


def say(line: str) -> None:
    """Print at once: a playbook or a person waits for it."""
    print(line, flush=True)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only once it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write into {folder.parent} ({error.strerror}): set IOT_MODEL_CACHE"
        ) from error
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
