"""Sends records that no stage can handle, as this host's producer.

    stdout  {"invalid-json": {"key": "…", "value": "…"}}

Each stands under the reason that it is refused for.
"""

import base64
import io
import json
from typing import Any

from kafka import KafkaProducer
from PIL import Image

from iot_pipeline.kafka import client_options
from iot_pipeline.schema import format_time, now, uuid7
from iot_pipeline.settings import ProduceSettings, load


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def message(image: bytes) -> dict[str, Any]:
    return {
        "ID": uuid7(),
        "GroundTruth": "cat",
        "Data": base64.b64encode(image).decode(),
        "ContentType": "image/png",
        "ProducedAt": format_time(now()),
        "Source": "infra-tests",
    }


def broken_records() -> dict[str, tuple[str, bytes]]:
    """Key and value by the reason each is refused for."""
    good = png(Image.effect_noise((32, 32), 100))
    fields: dict[str, dict[str, Any]] = {
        "missing-field": message(good),
        "invalid-base64": message(good) | {"Data": "not base64!"},
        "not-an-image": message(b"some text"),
        "truncated-image": message(good[: len(good) // 2]),
        # 2 kB that decode to 16 million pixels.
        "too-many-pixels": message(png(Image.new("1", (4096, 4096)))),
    }
    del fields["missing-field"]["GroundTruth"]
    records = {reason: (m["ID"], json.dumps(m).encode()) for reason, m in fields.items()}
    return records | {"invalid-json": (uuid7(), b'{"ID": ')}


def main() -> None:
    settings = load(ProduceSettings)
    producer = KafkaProducer(**client_options(settings), acks="all")
    sent = broken_records()
    pending = [
        producer.send(settings.image_topic, key=key.encode(), value=value)
        for key, value in sent.values()
    ]
    for future in pending:
        future.get(timeout=30)
    answer = {
        reason: {"key": key, "value": value.decode()} for reason, (key, value) in sent.items()
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
