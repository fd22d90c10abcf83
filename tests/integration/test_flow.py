"""Images, good and bad, through producer, inference and storage."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable

import pytest
from PIL import Image as PillowImage

from iot_lab.processes import Pipeline, wait_for
from iot_pipeline.schema import CLASSES, DeadLetter, ImageMessage, now, uuid7
from iot_pipeline.sources import Image, open_source

BOTH = {"iot-inference", "iot-storage"}
INFERENCE = {"iot-inference"}


@pytest.fixture(scope="module")
def sample() -> list[Image]:
    with open_source("sample") as source:
        return list(source)


def message_of(image: Image) -> ImageMessage:
    return ImageMessage(
        id=uuid7(),
        ground_truth=image.label,
        data=image.data,
        content_type=image.content_type,
        produced_at=now(),
        source="test",
    )


def test_sample_images_are_classified_and_stored(
    pipeline: Pipeline, sample: list[Image], assert_clean: Callable[[Pipeline, int], None]
) -> None:
    workers = [pipeline.store().start(), pipeline.infer().start()]
    producer = pipeline.produce("--count", "40", "--interval", "0.02").start()
    assert producer.wait(60) == 0, producer.output()
    for worker in workers:
        worker.wait_ready()
    assert_clean(pipeline, 40)
    documents = sorted(pipeline.documents().values(), key=lambda document: document["_id"])
    for document, image in zip(documents, sample, strict=False):
        assert document["GroundTruth"] == image.label
        assert base64.b64decode(document["Data"], validate=True) == image.data
        assert document["ContentType"] == image.content_type
        assert document["InferredValue"] in CLASSES
        assert 0 < document["Confidence"] <= 1
        assert document["ProducedAt"] <= document["InferredAt"] <= document["StoredAt"]
    _status, audit = pipeline.audit()
    right = sum(document["InferredValue"] == document["GroundTruth"] for document in documents)
    assert audit["accuracy"] == pytest.approx(right / 40, abs=1e-3)


def test_an_unknown_field_is_no_error(running: Pipeline, sample: list[Image]) -> None:
    message = message_of(sample[3])
    value = json.dumps(message.fields() | {"Humidity": {"percent": 40}}).encode()
    running.broker.send(running.image_topic, value, message.key)
    wait_for(lambda: "StoredAt" in running.documents().get(message.id, {}), "the document")
    assert message.id not in dead_letter_ids(running)


def dead_letter_ids(pipeline: Pipeline) -> set[str]:
    return {
        (record.key or b"").decode()
        for record in pipeline.broker.records(pipeline.dead_letter_topic)
    }


def noise(edge: int) -> bytes:
    pixels = random.Random(1).randbytes(3 * edge * edge)
    encoded = io.BytesIO()
    PillowImage.frombytes("RGB", (edge, edge), pixels).save(encoded, format="PNG")
    return encoded.getvalue()


def bomb(edge: int) -> bytes:
    """A PNG of a few kilobytes that decodes to `edge` x `edge` black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress((b"\0" * (edge // 8 + 1)) * edge, 9)
    header = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def with_data(data: bytes) -> bytes:
    return message_of(Image(data, "cat", "image/png", "x.png")).encode()


def changed(change: Callable[[dict[str, object]], object]) -> bytes:
    fields = message_of(Image(noise(8), "cat", "image/png", "x.png")).fields()
    change(fields)
    return json.dumps(fields).encode()


BAD_RECORDS: dict[str, tuple[bytes, str, set[str]]] = {
    "invalid JSON": (b'{"ID": "01a1', "invalid-json", BOTH),
    "not an object": (b"[1, 2]", "not-an-object", BOTH),
    "missing field": (changed(lambda fields: fields.pop("GroundTruth")), "missing-field", BOTH),
    "wrong type": (changed(lambda fields: fields.update(ID=7)), "invalid-field", BOTH),
    "wrong base64": (changed(lambda fields: fields.update(Data="%%%")), "invalid-base64", BOTH),
    "truncated image": (with_data(noise(64)[:4000]), "truncated-image", INFERENCE),
    "decompression bomb": (with_data(bomb(30_000)), "too-many-pixels", INFERENCE),
    "no image": (with_data(b"GIF, no: this is a sentence."), "not-an-image", INFERENCE),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_becomes_a_dead_letter_and_the_next_image_is_unaffected(
    case: str, running: Pipeline, sample: list[Image]
) -> None:
    value, reason, stages = BAD_RECORDS[case]
    key = f"key of {case}".encode() if stages == BOTH else json.loads(value)["ID"].encode()
    sent = running.broker.send(running.image_topic, value, key)
    good = message_of(sample[5])
    running.broker.send(running.image_topic, good.encode(), good.key)
    wait_for(lambda: "StoredAt" in running.documents().get(good.id, {}), "the good image")

    def letters() -> dict[str, tuple[DeadLetter, bytes, bytes]]:
        found = {}
        for record in running.broker.records(running.dead_letter_topic):
            letter = DeadLetter.from_headers(record.headers)
            if (letter.partition, letter.offset) == (sent.partition, sent.offset):
                found[letter.stage] = (letter, record.key, record.value)
        return found

    wait_for(lambda: letters().keys() >= stages, f"dead letters of {stages}")
    assert letters().keys() == stages
    for letter, dead_key, dead_value in letters().values():
        assert (letter.reason, letter.topic) == (reason, running.image_topic)
        assert letter.message not in ("", "unknown")
        assert (dead_key, dead_value) == (key, value)
