"""`iot-pipeline infer`: classify images and send predictions."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from iot_pipeline import metrics
from iot_pipeline.errors import Exit, InvalidMessage, Reason
from iot_pipeline.kafka import Sender
from iot_pipeline.schema import ImageMessage, PredictionMessage, Record, decode_record, now
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import InferSettings
from iot_pipeline.worker import run_stage

log = Log("infer")

# What cameras and browsers make. Pillow reads more, some of it through other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Above this many images at once, a log line for each is too much.
LOGGED_ONE_BY_ONE = 10


class _Prediction(Protocol):
    @property
    def label(self) -> str: ...
    @property
    def confidence(self) -> float: ...


class Classifier(Protocol):
    """What `classifier.load_classifier` returns."""

    @property
    def name(self) -> str:
        """The model's name and the digest of its weights."""
        ...

    def predict(self, images: list[Image.Image]) -> Sequence[_Prediction]:
        """One prediction for each image, in their order."""
        ...


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file from a stranger.

    Args:
        data: the file's bytes.
        max_pixels: the largest width times height to decode: a small file can hold a huge image.

    Returns:
        The first frame, as RGB.

    Raises:
        InvalidMessage: it is no image, is damaged, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that the limit below refuses anyway.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise InvalidMessage(Reason.TOO_MANY_PIXELS, f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise InvalidMessage(
            Reason.NOT_AN_IMAGE, f"none of the formats {', '.join(FORMATS)}"
        ) from error
    except Exception as error:
        raise _damaged(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidMessage(
            Reason.TOO_MANY_PIXELS,
            f"{width} x {height} pixels are more than IOT_MAX_IMAGE_PIXELS={max_pixels}",
        )
    try:
        return image.convert("RGB")
    except Exception as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> InvalidMessage:
    # Pillow's decoders raise whatever they stumble over: OSError, SyntaxError, ValueError,
    # struct.error, IndexError …
    return InvalidMessage(Reason.TRUNCATED_IMAGE, f"truncated or damaged: {error}")


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image that passed all checks."""

    message: ImageMessage
    image: Image.Image


class InferStage:
    """Images in, predictions out; see `worker.Stage`."""

    def __init__(
        self, settings: InferSettings, classifier: Classifier, sender: Sender, service: Service
    ) -> None:
        self._settings = settings
        self._classifier = classifier
        self._sender = sender
        self._service = service
        self.topics: Sequence[str] = (settings.image_topic,)
        self.sink = settings.prediction_topic

    def decode(self, record: Record) -> DecodedImage:
        """Read the message and its image."""
        message = decode_record(ImageMessage, record, self._settings.max_record_bytes)
        return DecodedImage(message, open_image(message.data, self._settings.max_image_pixels))

    def handle(self, batch: Sequence[DecodedImage]) -> Mapping[int, InvalidMessage]:
        """Classify, send, and wait until Kafka has every prediction."""
        predictions = self._classifier.predict([item.image for item in batch])
        inferred_at = now()
        self._service.alive()
        started = time.monotonic()
        for item, prediction in zip(batch, predictions, strict=True):
            message = PredictionMessage(
                id=item.message.id,
                inferred_value=prediction.label,
                confidence=prediction.confidence,
                model=self._classifier.name,
                inferred_at=inferred_at,
            )
            self._sender.send(self._settings.prediction_topic, message.key, message.encode())
        self._sender.confirm(self._service.alive)
        metrics.SINK_SECONDS.observe(time.monotonic() - started)
        self._report(batch, predictions, inferred_at.timestamp())
        return {}

    def _report(
        self, batch: Sequence[DecodedImage], predictions: Sequence[_Prediction], moment: float
    ) -> None:
        each = log.info if len(batch) <= LOGGED_ONE_BY_ONE else log.debug
        for item, prediction in zip(batch, predictions, strict=True):
            each(
                "classified",
                id=item.message.id,
                label=prediction.label,
                confidence=round(prediction.confidence, 3),
                ms=round((moment - item.message.produced_at.timestamp()) * 1000),
            )
        if len(batch) > LOGGED_ONE_BY_ONE:
            log.info("classified batch", images=len(batch))


def run(settings: InferSettings) -> int:
    """Classify images until SIGTERM.

    Raises:
        PipelineError: with the exit status to end with.
    """
    from iot_pipeline.classifier import load_classifier

    with Service(settings) as service:
        service.status(f"loading the model {settings.model}")
        classifier = load_classifier(
            settings.model,
            revision=settings.model_revision or None,
            threads=settings.threads or None,
        )
        classifier.warm_up()
        log.info("model ready", model=classifier.name)
        run_stage(
            lambda service, sender: InferStage(settings, classifier, sender, service),
            settings,
            service,
        )
    return Exit.OK
