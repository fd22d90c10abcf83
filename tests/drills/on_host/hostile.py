"""Sends records that no stage should take: hostile.py COUNT RATE

Each is an image's message with one thing made wrong at random, sent as this host's producer, RATE a
second. None of them may come through, and none may stop a service.
"""

import base64
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from kafka import KafkaProducer

from iot_pipeline.kafka import client_options
from iot_pipeline.schema import format_time, now, uuid7
from iot_pipeline.settings import ProduceSettings, load

random.seed(20_000)
FIELDS = ("ID", "GroundTruth", "Data", "ContentType", "ProducedAt", "Source")
NOT_STRINGS: tuple[Any, ...] = (None, 7, -1.5, True, [], {}, ["cat"], {"a": 1})

Message = dict[str, Any]


def message() -> Message:
    noise = base64.b64encode(random.randbytes(600)).decode()
    values = (uuid7(), "cat", noise, "image/png", format_time(now()), "hostile")
    return dict(zip(FIELDS, values, strict=True))


def bytes_of(content: Any) -> bytes:
    return json.dumps(content).encode()


def cut(content: Message) -> bytes:
    whole = bytes_of(content)
    return whole[: random.randrange(1, len(whole))]


def flipped(content: Message) -> bytes:
    """The braces around it are what makes it JSON."""
    whole = bytearray(bytes_of(content))
    whole[0] ^= 1 << random.randrange(8)
    return bytes(whole)


def another_type(content: Message) -> bytes:
    return bytes_of(content | {random.choice(FIELDS[:3]): random.choice(NOT_STRINGS)})


def lacking(content: Message) -> bytes:
    del content[random.choice(FIELDS[:3])]
    return bytes_of(content)


KINDS: tuple[Callable[[Message], bytes], ...] = (
    cut,
    flipped,
    another_type,
    lacking,
    lambda _: random.randbytes(random.randrange(1, 3000)),
    lambda _: b"",
    lambda _: b"[" * 5000,
    lambda _: b"\xff\xfe" + "{}".encode("utf-16-le"),
    lambda _: bytes_of([1, 2, 3]),
    lambda _: bytes_of("text"),
    lambda m: bytes_of(m | {"ID": "../../etc/passwd"}),
    lambda m: bytes_of(m | {"ID": "_design/views"}),
    lambda m: bytes_of(m | {"ID": "x" * 100_000}),
    lambda m: bytes_of(m | {"Data": "not base64!"}),
    # Noise is no image, and neither is half of one, or one of a million by a million pixels.
    bytes_of,
    lambda m: bytes_of(m | {"Data": base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 99).decode()}),
    lambda m: bytes_of(m | {"Data": base64.b64encode(b"GIF89a\xff\xff\xff\xff").decode()}),
)


def main(count: int, rate: float) -> None:
    settings = load(ProduceSettings)
    producer = KafkaProducer(**client_options(settings), acks="all")
    pending = []
    began = time.monotonic()
    for number in range(count):
        content = message()
        key = content["ID"].encode()
        pending.append(
            producer.send(settings.image_topic, key=key, value=random.choice(KINDS)(content))
        )
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
    places = [future.get(timeout=60) for future in pending]
    producer.close()
    # So that who sent them can clean up after them.
    print(json.dumps([[it.topic, it.partition, it.offset] for it in places]))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
