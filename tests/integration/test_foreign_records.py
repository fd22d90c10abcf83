"""Whatever a broker can hand out is stored or becomes a dead letter, and the rest goes on."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from kafka.record.util import calc_crc32c
from kafka.structs import TopicPartition
from PIL import Image

from iot_lab.paths import ROOT
from iot_lab.processes import MAX_RECORD_BYTES, App, Broker, Pipeline, wait_for
from iot_pipeline.errors import Exit
from iot_pipeline.kafka_internals import POLL_BYTES, Producer
from iot_pipeline.schema import ImageMessage, now, uuid7

CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
# The memory that the role allows the unit of storage, in MB.
MEMORY_MAX = re.compile(r"^storage_node_memory_max_mb: (\d+)$", re.MULTILINE)


def picture(size: int = 32, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, form)
    return file.getvalue()


def message(data: bytes = picture()) -> ImageMessage:
    return ImageMessage(
        id=uuid7(),
        ground_truth="cat",
        data=data,
        content_type="image/png",
        produced_at=now(),
        source="test",
    )


class Librdkafka:
    """Sends as other makers' clients do, and refuses nothing."""

    def __init__(self, broker: Broker, **options: Any) -> None:
        self._producer = confluent_kafka.Producer(
            {
                "bootstrap.servers": broker.bootstrap_servers,
                "message.max.bytes": 10**9,
                "linger.ms": 500,
                **{name.replace("_", "."): value for name, value in options.items()},
            }
        )
        self._refused: list[Any] = []

    def send(self, topic: str, value: bytes | None, key: bytes | None = None, **more: Any) -> None:
        self._producer.produce(
            topic,
            value,
            key,
            on_delivery=self._told,
            **more,
        )

    def _told(self, error: Any, _record: Any) -> None:
        if error is not None:
            self._refused.append(error)

    def flush(self) -> None:
        assert self._producer.flush(60) == 0
        assert self._refused == []


def listed(pipeline: Pipeline, *words: str) -> list[dict[str, Any]]:
    done = pipeline.dead_letters("list", "--json", *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wait_for_letters(pipeline: Pipeline, count: int) -> list[dict[str, Any]]:
    topic = pipeline.dead_letter_topic
    wait_for(lambda: sum(pipeline.broker.ends(topic).values()) >= count, f"{count} dead letters")
    letters = listed(pipeline)
    assert len(letters) == count, letters
    return letters


def assert_committed(pipeline: Pipeline, group: str = "iot-storage") -> None:
    """All that is in the image topic is done with."""
    ends = {at: end for at, end in pipeline.broker.ends(pipeline.image_topic).items() if end > 0}

    def committed() -> bool:
        offsets = pipeline.broker.committed(f"{pipeline.prefix}{group}")
        return all(offsets.get(at) == end for at, end in ends.items())

    wait_for(committed, "the last offsets to be committed")


def assert_goes_on(pipeline: Pipeline, *workers: App) -> None:
    """The next image is stored, in the partition that had the bad records too."""
    good = [message() for _ in range(4)]
    producer = Producer(**pipeline.broker.client(), acks="all")
    for partition, each in enumerate(good):
        producer.send_any(pipeline.image_topic, each.key, each.encode(), (), partition)
    producer.flush()
    producer.close()
    wait_for(lambda: pipeline.documents().keys() >= {each.id for each in good}, "the next images")
    for worker in workers:
        assert "unreachable" not in worker.output()
        assert worker.stop() == 0


def test_every_compression_is_stored_and_classified(
    pipeline: Pipeline, assert_clean: Callable[[Pipeline, int], None]
) -> None:
    workers = [pipeline.store().start(), pipeline.infer().start()]
    for codec in CODECS:
        producer = Librdkafka(pipeline.broker, compression_codec=codec)
        for _ in range(5):
            each = message()
            producer.send(pipeline.image_topic, each.encode(), each.key)
        producer.flush()
    assert_clean(pipeline, 5 * len(CODECS))
    for worker in workers:
        assert worker.stop() == 0


PARTS = (None, b"", b"\xff")
HEADERS: Sequence[list[tuple[str, bytes | None]]] = (
    [],
    [("a", None), ("a", b""), ("a", b"\xff\xfe")],
    [("error.class", b"none"), ("source.offset", b"9" * 5000), ("handled.action", b"dropped")],
    [(f"header-{number}", b"x") for number in range(500)],
)


def test_every_record_without_sense_is_a_dead_letter_and_is_given_back(pipeline: Pipeline) -> None:
    topic = pipeline.image_topic
    store = pipeline.store().start()
    store.wait_ready()
    sent = list(itertools.product(PARTS, PARTS, HEADERS))
    producer = Librdkafka(pipeline.broker)
    for key, value, headers in sent:
        producer.send(topic, value, key, headers=headers, partition=1)
    producer.flush()
    letters = wait_for_letters(pipeline, len(sent))
    assert sorted(each["source_offset"] for each in letters) == list(range(len(sent)))
    assert {each["source_topic"] for each in letters} == {topic}
    assert {(each["reason"], each["message"]) for each in letters if not each["bytes"]} >= {
        ("invalid-json", "the record has no value")
    }
    assert_committed(pipeline)

    kept = pipeline.broker.records(pipeline.dead_letter_topic)
    assert [(each.key, each.value) for each in kept] == [(key, value) for key, value, _ in sent]
    assert "the record has no value" in pipeline.dead_letters("list").stdout + "".join(
        pipeline.dead_letters("show", each["position"]).stdout for each in letters[:1]
    )
    for position, value in (("0:0", None), (f"0:{len(HEADERS)}", b"")):
        shown = json.loads(pipeline.dead_letters("show", "--json", position).stdout)
        found = shown["value"]
        assert (None if found is None else base64.b64decode(found)) == value
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["missing"], audit["open_dead_letters"]) == (0, 0, len(sent))

    # A replay gives back what was there. Nobody refuses it again meanwhile.
    assert store.stop() == 0
    done = pipeline.dead_letters("replay", "--yes")
    assert (done.returncode, f"Done: {len(sent)} of {len(sent)}." in done.stdout) == (0, True), done
    again = [
        (record.key, record.value)
        for record in pipeline.broker.records(topic)
        if any(name == "replayed.from" for name, _ in record.headers)
    ]
    assert sorted(map(repr, again)) == sorted(repr((key, value)) for key, value, _ in sent)

    store = pipeline.store().start()
    wait_for(lambda: len(listed(pipeline)) == len(sent), "the same dead letters once more")
    done = pipeline.dead_letters("drop", "--yes")
    assert (done.returncode, listed(pipeline)) == (0, []), done.stderr
    assert_goes_on(pipeline, store)


def test_names_of_headers_may_be_any_bytes(pipeline: Pipeline) -> None:
    store = pipeline.store().start()
    subprocess.run(
        [
            *(b"kcat", b"-P", b"-b", pipeline.broker.bootstrap_servers.encode()),
            *(b"-t", pipeline.image_topic.encode(), b"-p", b"2", b"-H", b"\xff\xfe=\xff"),
        ],
        input=b"one\ntwo\n",
        check=True,
        timeout=60,
    )
    letters = wait_for_letters(pipeline, 2)
    assert {each["message"].split(":")[0] for each in letters} == {"not JSON"}
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["missing"], audit["dead_lettered"]) == (0, 0, 2)
    assert_goes_on(pipeline, store)


def allow_any_time(broker: Broker, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    entries = [
        ConfigEntry(name, str(value), incremental_operation=AlterConfigOpType.SET)
        for name, value in (
            ("message.timestamp.type", "CreateTime"),
            ("message.timestamp.after.max.ms", 2**63 - 1),
            ("message.timestamp.before.max.ms", 2**63 - 1),
            ("retention.ms", -1),
        )
    ]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
    for answer in admin.incremental_alter_configs([resource]).values():
        answer.result(30)


def test_any_time_is_taken(pipeline: Pipeline) -> None:
    allow_any_time(pipeline.broker, pipeline.image_topic)
    store = pipeline.store().start()
    producer = Producer(**pipeline.broker.client(), acks="all")
    times = (-1, 0, 1, 2**31, 2**53, 2**62)
    good = [message() for _ in times]
    for time, each in zip(times, good, strict=True):
        producer.send(pipeline.image_topic, b"junk", b"junk", timestamp_ms=time, partition=0)
        producer.send(pipeline.image_topic, each.encode(), each.key, timestamp_ms=time, partition=0)
    producer.flush()
    producer.close()
    wait_for_letters(pipeline, len(times))
    assert_committed(pipeline)
    assert pipeline.documents().keys() == {each.id for each in good}
    assert_goes_on(pipeline, store)


def test_what_does_not_fit_goes_without_what_is_too_large(pipeline: Pipeline) -> None:
    """The topic of the images takes more than that of the dead letters, and than we do."""
    pipeline.image_topic = f"{pipeline.prefix}large"
    pipeline.broker.create_topics({pipeline.image_topic: (4, 5_000_000)})
    store = pipeline.store().start()
    producer = Librdkafka(pipeline.broker)
    large, over = bytes(4_000_000), bytes(MAX_RECORD_BYTES + 120_000)
    for key, value in ((b"a", large), (large, b"b"), (large, None), (over, b""), (b"c", over)):
        producer.send(pipeline.image_topic, value, key, partition=0)
        producer.flush()
    letters = wait_for_letters(pipeline, 5)
    assert [each["source_offset"] for each in letters] == list(range(5))
    assert {each["reason"] for each in letters} == {"too-large"}
    # Those that exceed our limit alone fit there as they are.
    keys = [None if each["key"] is None else len(each["key"]) for each in letters]
    assert keys == [1, None, None, len(over), 1]
    assert [each["bytes"] for each in letters] == [0, 0, 0, 0, len(over)]
    done = pipeline.dead_letters("replay", "--yes")
    assert (done.returncode, "its value was left out" in done.stderr) == (1, True), done.stderr
    assert_goes_on(pipeline, store)


def peak(app: App) -> int:
    """The most memory that a process has held, in MB."""
    status = Path(f"/proc/{app.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) // 1024


@pytest.mark.parametrize("codec", CODECS[1:])
def test_memory_is_bounded_whatever_a_batch_unfolds_to(codec: str, pipeline: Pipeline) -> None:
    allowed = MEMORY_MAX.search((ROOT / "roles/storage_node/defaults/main.yml").read_text())
    assert allowed
    store = pipeline.store("--max-consecutive-dead-letters", "0").start()
    store.wait_ready()
    topic = pipeline.image_topic
    # A black picture in each partition; snappy makes a twentieth of it at best.
    one = Librdkafka(pipeline.broker, compression_codec=codec)
    for partition in range(4):
        one.send(topic, bytes(POLL_BYTES + 1_000_000), b"bomb", partition=partition)
        one.flush()
    # Many that each stay below what a batch may unfold to, and at once.
    many = Librdkafka(pipeline.broker, compression_codec=codec, batch_num_messages=12)
    value = bytes(MAX_RECORD_BYTES + 90_000)
    for number in range(120):
        many.send(topic, value, b"large", partition=number % 4)
    many.flush()
    wait_for_letters(pipeline, 124)
    assert_committed(pipeline)
    letters = listed(pipeline)
    assert {each["reason"] for each in letters} == {"too-large"}
    assert sum("unfold" in each["message"] for each in letters) >= 4
    assert peak(store) < int(allowed[1])
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["missing"], audit["dead_lettered"]) == (0, 0, 124)
    assert_goes_on(pipeline, store)


def segment(pipeline: Pipeline, partition: int) -> Path:
    folder = pipeline.broker.folder / "kafka-data" / f"{pipeline.image_topic}-{partition}"
    (file,) = folder.glob("*.log")
    return file


def spoil(file: Path, change: Callable[[bytearray], None], number: int) -> None:
    """Change one batch of a log, as a disk might."""
    content = file.read_bytes()
    at = 0
    for _ in range(number):
        at += 12 + struct.unpack_from(">i", content, at + 8)[0]
    end = at + 12 + struct.unpack_from(">i", content, at + 8)[0]
    batch = bytearray(content[at:end])
    change(batch)
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(batch)


def sealed(batch: bytearray) -> None:
    struct.pack_into(">I", batch, 17, calc_crc32c(memoryview(batch)[21:]))


def flip_a_bit(batch: bytearray) -> None:
    batch[-20] ^= 1


def name_another_codec(batch: bytearray) -> None:
    batch[22] |= 6
    sealed(batch)


def break_the_compression(batch: bytearray) -> None:
    batch[22] |= 4
    sealed(batch)


def count_too_many(batch: bytearray) -> None:
    struct.pack_into(">i", batch, 57, 99)
    sealed(batch)


SPOILED: dict[Callable[[bytearray], None], tuple[str, int, int]] = {
    flip_a_bit: ("checksum", 3, 5),
    name_another_codec: ("compressed in way 6", 3, 5),
    break_the_compression: ("cannot be decoded", 3, 5),
    # The records that are there are taken.
    count_too_many: ("cannot be decoded", 5, 5),
}
"""What is told, and of which offsets."""


@pytest.mark.parametrize("change", SPOILED, ids=lambda change: change.__name__)
def test_a_batch_that_cannot_be_decoded_is_one_dead_letter(
    change: Callable[[bytearray], None], pipeline: Pipeline
) -> None:
    topic = pipeline.image_topic
    good = []
    for number in range(5):
        producer = Librdkafka(pipeline.broker)
        for _ in range(3):
            good.append(message())
            producer.send(topic, good[-1].encode(), good[-1].key, partition=number % 2)
        producer.flush()
    # In partition 0 there are now three batches.
    spoil(segment(pipeline, 0), change, 1)
    lost = {each.id for each in good[6:9]}
    store = pipeline.store().start()
    wait_for(lambda: pipeline.documents().keys() >= {each.id for each in good} - lost, "all others")
    (letter,) = wait_for_letters(pipeline, 1)
    assert letter["reason"] == "unreadable"
    told, first, last = SPOILED[change]
    assert told in letter["message"]
    assert (letter["source_first_offset"], letter["source_offset"]) == (first, last)
    assert f"{topic}-0@" in pipeline.dead_letters("list").stdout
    assert_committed(pipeline)
    _, audit = pipeline.audit("--grace", "0")
    assert audit["dead_lettered"] == 1
    # Nobody predicts here, and that alone is missing.
    assert audit["produced"] == audit["stored"], audit
    assert set(audit["missing_examples"].values()) == {"not predicted"}
    done = pipeline.dead_letters("replay", "--yes")
    assert (done.returncode, "its value was left out" in done.stderr) == (1, True), done.stderr
    assert_goes_on(pipeline, store)


def take_its_length(batch: bytearray) -> None:
    struct.pack_into(">i", batch, 8, 3)


def test_where_nobody_knows_how_to_go_on_the_place_is_told_and_others_go_on(
    pipeline: Pipeline,
) -> None:
    topic = pipeline.image_topic
    for _ in range(2):
        pipeline.broker.send(topic, message().encode(), None)
    producer = Producer(**pipeline.broker.client(), acks="all")
    for _ in range(2):
        each = message()
        producer.send_any(topic, each.key, each.encode(), (), 3)
        producer.flush()
    producer.close()
    spoil(segment(pipeline, 3), take_its_length, 0)
    store = pipeline.store().start()
    wait_for(lambda: f"{topic}-3@" in store.output(), "the place to be told")
    good = message()
    producer = Producer(**pipeline.broker.client(), acks="all")
    producer.send_any(topic, good.key, good.encode(), (), 1)
    producer.flush()
    producer.close()
    wait_for(lambda: good.id in pipeline.documents(), "an image of another partition")
    assert "unreachable" not in store.output()
    assert store.stop() == 0
    done = pipeline.run("audit")
    assert done.returncode == Exit.UNREACHABLE
    assert f"{topic}-3@" in done.stderr


@pytest.mark.parametrize(
    "servers", ["{0};{0}", "PLAINTEXT://{0}", "{0},", "{0} {0}", "{0}/", "127.0.0.1:99999"]
)
def test_servers_that_cannot_work_end_with_what_to_set(servers: str, pipeline: Pipeline) -> None:
    named = servers.format(pipeline.broker.bootstrap_servers)
    for app in (pipeline.store, pipeline.infer, pipeline.produce):
        running = app("--bootstrap-servers", named).start()
        assert running.wait(60) == 78
        assert "IOT_BOOTSTRAP_SERVERS" in running.output()
    assert TopicPartition(pipeline.image_topic, 0) in pipeline.broker.ends(pipeline.image_topic)
