"""Puts a good image into the dead-letter topic, as if this host's storage had refused it before.

    stdout  {"id": "…"}

It is what a dead letter is whose cause is gone: replayed, it goes through.
"""

import base64
import json

from kafka import KafkaProducer

from iot_pipeline.errors import Reason
from iot_pipeline.kafka import client_options
from iot_pipeline.schema import DeadLetter, ImageMessage, now, uuid7
from iot_pipeline.settings import StoreSettings, load

# 32 x 32 brown pixels: this host has nothing that makes images.
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAK0lEQVR42u3NQQEAQAQAMC6NiCKKdSX4bQWW0xWX"
    "XhwTCAQCgUAgEAgEWz6b/gGoTIbtSQAAAABJRU5ErkJggg=="
)


def main() -> None:
    settings = load(StoreSettings)
    message = ImageMessage(
        id=uuid7(),
        ground_truth="cat",
        data=base64.b64decode(PNG),
        content_type="image/png",
        produced_at=now(),
        source="infra-tests",
    )
    letter = DeadLetter(
        reason=Reason.REFUSED_BY_DATABASE,
        message="it was full",
        stage=settings.SERVICE,
        topic=settings.image_topic,
        partition=0,
        offset=-1,
    )
    producer = KafkaProducer(**client_options(settings), acks="all")
    producer.send(
        settings.dead_letter_topic,
        key=message.key,
        value=message.encode(),
        headers=letter.headers(),
    ).get(timeout=30)
    producer.close()
    print(json.dumps({"id": message.id}))


if __name__ == "__main__":
    main()
