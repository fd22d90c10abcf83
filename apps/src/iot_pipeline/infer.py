"""`iot-pipeline infer`: classify images and send predictions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from PIL import Image

from iot_pipeline.errors import Exit, InvalidMessage
from iot_pipeline.kafka import Sender
from iot_pipeline.pictures import open_image
from iot_pipeline.pipeline import Beat
from iot_pipeline.schema import ImageMessage, PredictionMessage, Record, decode_record, now
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import InferSettings
from iot_pipeline.worker import run_stage

log = Log("infer")

# How long the model may work without a sign of life, in seconds: far below what passes for hung.
CHUNK_SECONDS = 5.0
# Images in the first chunk. How many the model does in that time shows only then.
FIRST_CHUNK = 8

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

    def prepare(self, image: Image.Image) -> bytes:
        """An RGB image's pixels, as `predict` takes them. Called from another thread."""
        ...

    def predict(self, images: Sequence[bytes]) -> Sequence[_Prediction]:
        """One prediction for each prepared image, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """What is left to know of an image that passed all checks."""

    id: str
    produced_at: datetime
    pixels: bytes
    """As the model wants them; see `Classifier.prepare`."""


class InferStage:
    """Images in, predictions out; see `pipeline.Stage`."""

    def __init__(self, settings: InferSettings, classifier: Classifier, sender: Sender) -> None:
        self._settings = settings
        self._classifier = classifier
        self._sender = sender
        self._at_once = FIRST_CHUNK
        self.topics: Sequence[str] = (settings.image_topic,)
        self.sink = settings.prediction_topic

    def decode(self, record: Record) -> DecodedImage:
        """Read the message and its image."""
        message = decode_record(ImageMessage, record, self._settings.max_record_bytes)
        image = open_image(message.data, self._settings.max_image_pixels)
        # Only the pixels that the model looks at wait in memory, however large the image was.
        return DecodedImage(message.id, message.produced_at, self._classifier.prepare(image))

    def handle(self, items: Sequence[DecodedImage], beat: Beat) -> list[PredictionMessage]:
        """Classify, as many at once as the model does within a few seconds."""
        predictions: list[_Prediction] = []
        while len(predictions) < len(items):
            beat()
            started = time.monotonic()
            chunk = items[len(predictions) :][: self._at_once]
            predictions += self._classifier.predict([item.pixels for item in chunk])
            rate = len(chunk) / max(time.monotonic() - started, 1e-9)
            self._at_once = max(1, min(2 * self._at_once, int(CHUNK_SECONDS * rate)))
        inferred_at = now()
        messages = [
            PredictionMessage(
                id=item.id,
                inferred_value=prediction.label,
                confidence=prediction.confidence,
                model=self._classifier.name,
                inferred_at=inferred_at,
            )
            for item, prediction in zip(items, predictions, strict=True)
        ]
        self._report(items, messages)
        return messages

    def deliver(
        self, result: Sequence[PredictionMessage], beat: Beat
    ) -> Mapping[int, InvalidMessage]:
        """Send, and wait until Kafka has every prediction."""
        for message in result:
            self._sender.send(self._settings.prediction_topic, message.key, message.encode())
        self._sender.confirm(beat)
        return {}

    @staticmethod
    def _report(items: Sequence[DecodedImage], messages: Sequence[PredictionMessage]) -> None:
        if len(items) > LOGGED_ONE_BY_ONE:
            log.info("classified batch", images=len(items))
            return
        for item, message in zip(items, messages, strict=True):
            age = message.inferred_at - item.produced_at
            log.info(
                "classified",
                id=item.id,
                label=message.inferred_value,
                confidence=round(message.confidence, 3),
                ms=round(age.total_seconds() * 1000),
            )


def run(settings: InferSettings) -> int:
    """Classify images until SIGTERM.

    Raises:
        PipelineError: with the exit status to end with.
    """
    from iot_pipeline.classifier import classifier_of

    with Service(settings) as service:
        service.status(f"loading the model {settings.model}")
        classifier = classifier_of(settings)
        classifier.warm_up()
        log.info("model ready", model=classifier.name, engine=settings.engine)
        run_stage(
            lambda sender: InferStage(settings, classifier, sender),
            settings,
            service,
        )
    return Exit.OK
