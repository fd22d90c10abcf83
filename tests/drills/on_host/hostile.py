"""Sends records that no stage should take: hostile.py COUNT RATE

Each is an image's message with one thing made wrong at random, sent as this host's producer, RATE a
second. None of them may come through, and none may stop a service. Keys, headers, times and ways to
compress are left to chance. Beside them come a few images that are unusual in all of this, and
sound: each of those has to come through.
"""

import base64
import io
import json
import random
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cramjam
import kafka.codec
from PIL import Image

from iot_pipeline.kafka import client_options
from iot_pipeline.kafka_internals import Producer
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


def with_id(milliseconds: int) -> Callable[[Message], bytes]:
    """An id of another time: this one is to be refused only where it lies ahead of all clocks."""
    digits = f"{milliseconds:012x}"

    def changed(content: Message) -> bytes:
        return bytes_of(content | {"ID": f"{digits[:8]}-{digits[8:]}{content['ID'][13:]}"})

    return changed


KINDS: tuple[Callable[[Message], bytes | None], ...] = (
    cut,
    flipped,
    another_type,
    lacking,
    lambda _: random.randbytes(random.randrange(1, 3000)),
    lambda _: None,
    lambda _: b"",
    lambda _: b"[" * 5000,
    lambda _: b"\xff\xfe" + "{}".encode("utf-16-le"),
    lambda _: bytes_of([1, 2, 3]),
    lambda _: bytes_of("text"),
    lambda m: bytes_of(m | {"ID": "../../etc/passwd"}),
    lambda m: bytes_of(m | {"ID": "_design/views"}),
    lambda m: bytes_of(m | {"ID": "x" * 100_000}),
    with_id(2**48 - 1),
    lambda m: bytes_of(m | {"Data": "not base64!"}),
    # Noise is no image, and neither is half of one, or one of a million by a million pixels.
    bytes_of,
    lambda m: bytes_of(m | {"Data": base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 99).decode()}),
    lambda m: bytes_of(m | {"Data": base64.b64encode(b"GIF89a\xff\xff\xff\xff").decode()}),
)

# It unfolds to more than a consumer takes. A batch of its own, since the whole batch is refused.
BOMB = bytes(20_000_000)
BOMBS = 0.002
"""Share among the hostile records."""

HEADERS: tuple[list[tuple[str, bytes]], ...] = (
    [],
    [("same", b""), ("same", b"\xff\xfe")],
    [("error.class", b"none"), ("handled.action", b"dropped"), ("source.offset", b"9" * 5000)],
    [(f"header-{number}", b"x") for number in range(500)],
)
# Milliseconds since 1970; None is now.
TIMES = (None, None, -1, 0, 1)


def picture(mode: str, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((48, 32)).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return picture("RGB", "JPEG", exif=exif)


ORIENTATION = 0x0112
PICTURES: tuple[Callable[[], bytes], ...] = (
    lambda: picture("I;16", "PNG"),
    lambda: picture("1", "PNG"),
    lambda: picture("P", "PNG", transparency=0),
    lambda: picture("LA", "PNG"),
    lambda: picture("RGBA", "PNG"),
    lambda: picture("CMYK", "JPEG"),
    lambda: picture("L", "JPEG", progressive=True),
    turned,
)
"""Unusual, but sound: these are to be stored and classified, in every way in which they can be
sent."""
SOUND = 0.02
"""So many sound records come beside each hostile one."""


class Senders:
    """A client for each way to compress. Each record takes one by chance."""

    def __init__(self, settings: ProduceSettings) -> None:
        # The client looks for a package that no host has. Ours has what it needs.
        kafka.codec.snappy = SimpleNamespace(
            compress=lambda content: bytes(cramjam.snappy.compress_raw(content))
        )
        self._topic = settings.image_topic
        self._clients = [
            Producer(
                **client_options(settings),
                acks="all",
                compression_type=codec,
                max_request_size=2 * len(BOMB),
            )
            for codec in (None, "gzip", "snappy", "lz4", "zstd")
        ]
        self._pending: list[Any] = []

    def send(self, key: bytes | None, value: bytes | None) -> None:
        """One record, with headers and at a time that are left to chance."""
        client = random.choice(self._clients)
        headers, time_ms = random.choice(HEADERS), random.choice(TIMES)
        if value is None:
            future = client.send_any(self._topic, key, value, headers)
        else:
            future = client.send(
                self._topic, key=key, value=value, headers=headers, timestamp_ms=time_ms
            )
        self._pending.append(future)

    def bomb(self) -> None:
        """One record that is small only as long as it is compressed."""
        self._pending.append(random.choice(self._clients[3:]).send(self._topic, value=BOMB))

    def finish(self) -> list[tuple[str, int, int]]:
        """Return once the broker has taken all, with the place of each."""
        places = [future.get(timeout=60) for future in self._pending]
        for client in self._clients:
            client.close()
        return [(place.topic, place.partition, place.offset) for place in places]


def main(count: int, rate: float) -> None:
    senders = Senders(load(ProduceSettings))
    began = time.monotonic()
    for number in range(count):
        content = message()
        own = content["ID"].encode()
        if random.random() < BOMBS:
            senders.bomb()
        else:
            senders.send(random.choice((own, own, None, b"")), random.choice(KINDS)(content))
        if random.random() < SOUND:
            content = message()
            content["Data"] = base64.b64encode(random.choice(PICTURES)()).decode()
            senders.send(random.choice((content["ID"].encode(), None)), bytes_of(content))
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
    # So that who sent them can clean up after them.
    print(json.dumps(senders.finish()))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
