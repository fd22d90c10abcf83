"""How the stage of inference calls the model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from PIL import Image

from iot_pipeline import infer
from iot_pipeline.classifier import Prediction
from iot_pipeline.infer import DecodedImage, InferStage
from iot_pipeline.schema import now, uuid7
from iot_pipeline.settings import InferSettings


class SlowClassifier:
    """Takes its time for each image, and answers with what it was given."""

    name = "slow@0123"

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.chunks: list[int] = []

    def prepare(self, image: Image.Image) -> bytes:
        raise NotImplementedError

    def predict(self, images: Sequence[bytes]) -> list[Prediction]:
        self.chunks.append(len(images))
        time.sleep(self._seconds * len(images))
        return [Prediction(pixels.decode(), 0.5) for pixels in images]


def handled(classifier: SlowClassifier, images: int) -> list[int]:
    """Classify images; returns how many chunks there had been at each sign of life."""
    beats: list[int] = []
    stage = InferStage(InferSettings(), classifier, None)  # type: ignore[arg-type] # sends nothing
    items = [DecodedImage(uuid7(), now(), b"%d" % number) for number in range(images)]
    found = stage.handle(items, lambda: beats.append(len(classifier.chunks)))
    assert [message.inferred_value for message in found] == [str(n) for n in range(images)]
    assert [message.id for message in found] == [item.id for item in items]
    return beats


def test_a_slow_model_gives_a_sign_of_life_every_few_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(infer, "CHUNK_SECONDS", 0.011)
    classifier = SlowClassifier(0.005)
    beats = handled(classifier, 30)
    assert beats == list(range(len(classifier.chunks)))
    assert max(classifier.chunks[1:]) <= 2


def test_a_fast_model_gets_whole_batches_soon() -> None:
    classifier = SlowClassifier(0.0)
    handled(classifier, 100)
    assert classifier.chunks == [8, 16, 32, 44]
