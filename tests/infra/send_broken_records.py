"""Sends records that no stage can handle and prints, as JSON, the dead letters they became.

test_pipeline.py runs it on a host of the pipeline, where the broker can be reached and the apps'
Python is installed:

    python send_broken_records.py BOOTSTRAP_SERVERS IMAGE_TOPIC DEAD_LETTER_TOPIC
"""

import base64
import io
import json
import sys
import time
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from PIL import Image

from iot_pipeline.schema import format_time, now, uuid7

PATIENCE_SECONDS = 60


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


def main(servers: str, images: str, dead_letters: str) -> None:
    consumer = KafkaConsumer(bootstrap_servers=servers.split(","))
    partitions = [
        TopicPartition(dead_letters, number)
        for number in consumer.partitions_for_topic(dead_letters)
    ]
    consumer.assign(partitions)
    for partition, offset in consumer.end_offsets(partitions).items():
        consumer.seek(partition, offset)

    producer = KafkaProducer(bootstrap_servers=servers.split(","), acks="all")
    sent = broken_records()
    reasons = {key: reason for reason, (key, _) in sent.items()}
    pending = [producer.send(images, key=key.encode(), value=value) for key, value in sent.values()]
    for future in pending:
        future.get(timeout=30)

    found: dict[str, dict[str, str]] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while set(found) != set(sent) and time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=1000).values():
            for record in records:
                reason = reasons.get((record.key or b"").decode())
                if reason:
                    headers = {name: value.decode() for name, value in record.headers}
                    unchanged = str(record.value == sent[reason][1])
                    found[reason] = headers | {"unchanged": unchanged}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
