"""Whatever a broker hands out is decoded or told, and what we use of the client is there."""

from __future__ import annotations

import ast
import gzip
import inspect
import os
import random
import struct
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cramjam
import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaConsumer, KafkaProducer
from kafka.cluster import ClusterMetadata
from kafka.consumer.fetcher import Fetcher
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.errors import CorruptRecordError, TopicAuthorizationFailedError
from kafka.producer.record_accumulator import RecordAccumulator
from kafka.producer.sender import Sender as KafkaSender
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.util import calc_crc32c, encode_varint
from kafka.structs import TopicPartition

from iot_pipeline import kafka_internals
from iot_pipeline.errors import Reason
from iot_pipeline.kafka_internals import (
    MAX_HEADERS,
    POLL_BYTES,
    UnreadablePartition,
    _Bounds,
    _Fetcher,
    _Records,
)
from iot_pipeline.schema import Unreadable

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "apps/src/iot_pipeline"
PARTITION = TopicPartition("iot-topic", 3)
RECORD_LIMIT = 1_000_000
BASE = 1000

# kafka-python's modules that its documentation describes.
DOCUMENTED = {"kafka", "kafka.errors", "kafka.structs", "kafka.consumer.subscription_state"}


def xerial(content: bytes) -> bytes:
    """As Java's clients: blocks of 32 kB, each behind its length."""
    framed = b"\x82SNAPPY\0" + struct.pack(">ii", 1, 1)
    for at in range(0, len(content), 32_768):
        block = bytes(cramjam.snappy.compress_raw(content[at : at + 32_768]))
        framed += struct.pack(">i", len(block)) + block
    return framed


def two_members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


def streamed(content: bytes) -> bytes:
    """As librdkafka: the frame does not say how much it unfolds to."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return bytes(compressor.compress(content) + compressor.flush())


CODECS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "none": (0, bytes),
    "gzip": (1, gzip.compress),
    "gzip, two members": (1, two_members),
    "snappy": (2, lambda content: bytes(cramjam.snappy.compress_raw(content))),
    "snappy, xerial": (2, xerial),
    "lz4": (3, lz4.frame.compress),
    "zstd": (4, zstandard.ZstdCompressor().compress),
    "zstd, streamed": (4, streamed),
}

Headers = Sequence[tuple[bytes, bytes | None]]


def nullable(content: bytes | None) -> bytes:
    size = bytearray()
    encode_varint(-1 if content is None else len(content), size.append)
    return bytes(size) + (content or b"")


def varint(number: int) -> bytes:
    written = bytearray()
    encode_varint(number, written.append)
    return bytes(written)


def record(
    offset: int,
    key: bytes | None = b"key",
    value: bytes | None = b"value",
    headers: Headers = (),
    time: int = 0,
) -> bytes:
    body = b"\0" + varint(time) + varint(offset) + nullable(key) + nullable(value)
    body += varint(len(headers))
    body += b"".join(nullable(name) + nullable(content) for name, content in headers)
    return varint(len(body)) + body


def batch(
    records: Sequence[bytes],
    codec: str = "none",
    *,
    base: int = BASE,
    attributes: int = 0,
    count: int | None = None,
    last: int | None = None,
    times: tuple[int, int] = (1_700_000_000_000, 1_700_000_000_000),
    content: bytes | None = None,
) -> bytes:
    """A batch as it stands in a log; what is not given follows from the records."""
    number, compress = CODECS[codec]
    payload = compress(b"".join(records)) if content is None else content
    checked = struct.pack(
        ">hiqqqhii",
        number | attributes,
        len(records) - 1 if last is None else last,
        *times,
        *(-1, -1, -1),
        len(records) if count is None else count,
    )
    checked += payload
    head = struct.pack(">ibI", 7, 2, calc_crc32c(checked))
    return struct.pack(">qi", base, len(head + checked)) + head + checked


def damaged(content: bytes, at: int = -1) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0x55
    return bytes(changed)


def unpacked(
    content: bytes, position: int = BASE, *, headers: bool = True, left: int = POLL_BYTES
) -> tuple[list[Any], Any]:
    """What a poll makes of an answer, and what remembers where to go on."""
    bounds = _Bounds(RECORD_LIMIT, POLL_BYTES, headers, left)
    records = _Records(bounds, position, PARTITION, MemoryRecords(content))
    return records.take(), records


def only(content: bytes, position: int = BASE) -> Unreadable:
    """What stands for all of an answer."""
    (found,), records = unpacked(content, position)
    assert isinstance(found, Unreadable)
    assert (found.topic, found.partition) == PARTITION
    assert records.next_fetch_offset == found.offset + 1
    # Where kafka-python asks again, it gets an end and not the same generator.
    assert records.record_iterator is None
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_every_way_to_compress_is_undone(codec: str) -> None:
    values = [os.urandom(3000) + bytes(3000) for _ in range(50)]
    content = batch([record(at, b"%d" % at, value) for at, value in enumerate(values)], codec)
    found, records = unpacked(content)
    assert [each.value for each in found] == values
    assert [each.key for each in found] == [b"%d" % at for at in range(50)]
    assert [each.offset for each in found] == list(range(BASE, BASE + 50))
    assert (records.next_fetch_offset, records.leader_epoch) == (BASE + 50, 7)


def test_it_reads_what_the_client_writes() -> None:
    builder = DefaultRecordBatchBuilder(2, 4, 0, -1, -1, -1, 10**6)
    builder.append(0, 5, b"key", None, [("name", b"text")])
    builder.append(1, 6, None, b"value", [])
    found, _ = unpacked(bytes(builder.build()), 0)
    assert [(r.key, r.value, r.headers, r.timestamp) for r in found] == [
        (b"key", None, [("name", b"text")], 5),
        (None, b"value", [], 6),
    ]


@pytest.mark.parametrize("key", [None, b"", b"key", b"\xff"])
@pytest.mark.parametrize("value", [None, b"", b"value"])
def test_none_is_told_from_empty(key: bytes | None, value: bytes | None) -> None:
    (found,), _ = unpacked(batch([record(0, key, value)]))
    assert (found.key, found.value) == (key, value)


def test_headers_are_taken_as_they_are() -> None:
    headers = [(b"a", None), (b"a", b""), (b"\xff\xfe", b"\xff"), (b"", b"x")]
    (found,), _ = unpacked(batch([record(0, headers=headers)]))
    assert found.headers == [("a", None), ("a", b""), ("\ufffd\ufffd", b"\xff"), ("", b"x")]
    (found,), _ = unpacked(batch([record(0, headers=headers)]), headers=False)
    assert found.headers == []
    (found, behind), _ = unpacked(batch([record(0, headers=[(b"h", b"")] * 50_000), record(1)]))
    assert (len(found.headers), behind.value) == (MAX_HEADERS, b"value")


@pytest.mark.parametrize("first,delta", [(-1, 0), (0, 0), (2**62, 2**61), (0, -5)])
def test_timestamps_are_taken_as_they_are(first: int, delta: int) -> None:
    (found,), _ = unpacked(batch([record(0, time=delta)], times=(first, 9)))
    assert found.timestamp == first + delta
    (found,), _ = unpacked(batch([record(0, time=delta)], times=(first, 9), attributes=8))
    assert (found.timestamp, found.timestamp_type) == (9, 1)


def test_from_the_middle_of_a_batch() -> None:
    found, records = unpacked(batch([record(at) for at in range(10)], "zstd"), BASE + 7)
    assert [each.offset for each in found] == [BASE + 7, BASE + 8, BASE + 9]
    assert records.next_fetch_offset == BASE + 10


def test_gaps_of_compaction_and_control_batches_are_passed_over() -> None:
    content = batch([record(2), record(5)], last=9)
    content += batch([record(0, b"\0\0\0\1", b"")], base=BASE + 10, attributes=0x20)
    found, records = unpacked(content)
    assert [each.offset for each in found] == [BASE + 2, BASE + 5]
    assert records.next_fetch_offset == BASE + 11


def test_a_batch_that_is_cut_off_comes_again() -> None:
    whole, behind = batch([record(0)]), batch([record(0)], base=BASE + 1)
    for size in range(len(behind)):
        found, records = unpacked(whole + behind[:size])
        assert ([each.offset for each in found], records.next_fetch_offset) == ([BASE], BASE + 1)


RECORDS = [record(at) for at in range(10)]


@pytest.mark.parametrize(
    "content,told",
    [
        (damaged(batch(RECORDS)), "checksum"),
        (damaged(batch(RECORDS, "zstd")), "checksum"),
        *((batch(RECORDS, attributes=number), f"way {number}") for number in (5, 6, 7)),
        *((batch(RECORDS, codec, content=b"junk" * 30), "") for codec in CODECS),
        *((batch(RECORDS, codec, content=b""), "") for codec in CODECS),
        (batch(RECORDS, "lz4", content=lz4.frame.compress(b"".join(RECORDS))[:-9]), "cut off"),
        (batch(RECORDS, "gzip", content=gzip.compress(b"".join(RECORDS))[:-9]), "cut off"),
        (batch(RECORDS, "zstd", content=streamed(b"".join(RECORDS))[:-5]), ""),
        (batch(RECORDS, "snappy, xerial", content=xerial(b"x")[:-2]), "not within it"),
        (batch(RECORDS, content=b"\x02" + bytes(20)), ""),
        (batch(RECORDS, content=b"".join(RECORDS), count=0), "behind its last record"),
    ],
)
def test_a_batch_that_cannot_be_decoded_is_told_once(content: bytes, told: str) -> None:
    found = only(content)
    assert (found.first_offset, found.offset) == (BASE, BASE + 9)
    assert found.error.reason is Reason.UNREADABLE
    assert told in str(found.error)
    good = batch([record(0)], base=BASE + 10)
    (_, behind), records = unpacked(content + good)
    assert (behind.offset, records.next_fetch_offset) == (BASE + 10, BASE + 11)


@pytest.mark.parametrize(
    "spoiled",
    [
        varint(500) + b"\0" * 20,
        varint(-1),
        b"\xff" * 12,
        record(-3),
        record(99),
        varint(9) + b"\0\0" + varint(4) + varint(3) + b"key" + varint(-1) + varint(0),
    ],
)
def test_what_stands_before_a_spoiled_record_is_taken(spoiled: bytes) -> None:
    content = batch([record(0), record(1), spoiled, record(3)], "zstd")
    (first, second, rest), records = unpacked(content)
    assert (first.offset, second.offset) == (BASE, BASE + 1)
    assert isinstance(rest, Unreadable)
    assert (rest.first_offset, rest.offset) == (BASE + 2, BASE + 3)
    assert records.next_fetch_offset == BASE + 4


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_a_batch_that_unfolds_to_too_much_is_told(codec: str) -> None:
    bomb = batch([record(0, value=bytes(2 * POLL_BYTES))], codec)
    found = only(bomb)
    assert found.error.reason is Reason.TOO_LARGE
    assert "unfold to more than" in str(found.error)
    assert found.timestamp == 1_700_000_000_000


def test_a_record_that_is_too_large_is_told_with_its_key() -> None:
    content = batch([record(0, b"id", bytes(RECORD_LIMIT)), record(1)], "zstd")
    (found, behind), _ = unpacked(content)
    assert (found.error.reason, found.key, found.value) == (Reason.TOO_LARGE, b"id", None)
    assert (found.first_offset, found.offset, behind.offset) == (BASE, BASE, BASE + 1)
    (found,), _ = unpacked(batch([record(0, bytes(2 * RECORD_LIMIT), b"")], "zstd"))
    assert found.key is None


def test_a_poll_brings_so_much_and_the_rest_comes_again() -> None:
    value = bytes(100_000)
    content = b"".join(
        batch([record(at, value=value) for at in range(100)], "zstd", base=BASE + 100 * number)
        for number in range(20)
    )
    position, polls, offsets = BASE, 0, list[int]()
    while position < BASE + 2000:
        found, records = unpacked(content, position)
        assert sum(len(each.value) for each in found) <= POLL_BYTES + len(value)
        assert records.record_iterator is None
        offsets += [each.offset for each in found]
        position, polls = records.next_fetch_offset, polls + 1
    assert offsets == list(range(BASE, BASE + 2000))
    assert polls < 20
    # What another partition has used up leaves nothing, and nothing is passed over.
    found, records = unpacked(content, left=0)
    assert (found, records.next_fetch_offset) == ([], BASE)


def test_the_smallest_records_are_bounded_too() -> None:
    content = batch([record(at, None, b"") for at in range(100_000)], "zstd")
    found, _ = unpacked(content)
    assert len(found) <= POLL_BYTES // kafka_internals.RECORD_BYTES + 1


@pytest.mark.parametrize("number", [0, 1, 3, 127])
def test_another_format_is_told(number: int) -> None:
    changed = bytearray(batch(RECORDS))
    changed[16] = number
    found = only(bytes(changed))
    assert f"format {number}" in str(found.error)
    # Whoever wrote it in the older ones put the last record's offset first.
    assert (found.first_offset, found.offset) == (BASE, BASE)


def test_a_header_that_is_damaged_does_not_say_how_far_to_go() -> None:
    content = bytearray(batch(RECORDS))
    struct.pack_into(">i", content, 23, 2**30)
    assert only(bytes(content)).offset == BASE
    behind = batch([record(0)], base=BASE + 10)
    (found, good), _ = unpacked(bytes(content) + behind)
    assert (found.first_offset, found.offset, good.offset) == (BASE, BASE + 9, BASE + 10)


def test_a_batch_that_has_no_length_is_a_stop_that_tells_where() -> None:
    good = batch([record(0)])
    bounds = _Bounds(RECORD_LIMIT, POLL_BYTES, headers=True, left=POLL_BYTES)
    records = _Records(
        bounds, BASE, PARTITION, MemoryRecords(good + struct.pack(">qi", BASE + 1, -5) + bytes(50))
    )
    assert len(records.take()) == 1
    with pytest.raises(UnreadablePartition, match=rf"iot-topic-3@{BASE + 1}: .*-5 bytes"):
        records.take()
    assert records.record_iterator is None


def test_a_batch_that_is_shorter_than_its_header_is_told() -> None:
    short = struct.pack(">qiib", BASE, 30, 7, 2) + bytes(25)
    assert "less than its header" in str(only(short).error)


@given(st.data())
def test_no_bytes_end_it_or_lead_backwards(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(list(CODECS)))
    content = bytearray(
        batch([record(at) for at in range(3)], codec)
        + batch([record(at) for at in range(3)], codec, base=BASE + 3)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    # With the right checksum, so that it comes as far as it can.
    if data.draw(st.booleans()):
        (length,) = struct.unpack_from(">i", content, 8)
        if 49 <= length <= len(content) - 12:
            checksum = calc_crc32c(memoryview(content)[21 : 12 + length])
            struct.pack_into(">I", content, 17, checksum)
    bounds = _Bounds(RECORD_LIMIT, POLL_BYTES, headers=True, left=POLL_BYTES)
    records = _Records(bounds, BASE, PARTITION, MemoryRecords(bytes(content)))
    position = records.next_fetch_offset
    try:
        while records.record_iterator is not None:
            for each in records.take(2):
                # What stands for records that nobody counted has the last good one's offset.
                assert each.offset >= position - isinstance(each, Unreadable)
                position = max(position, each.offset + 1)
    except UnreadablePartition:
        pass
    assert records.record_iterator is None
    assert records.next_fetch_offset >= position


def test_random_bytes_are_never_taken_for_records() -> None:
    chance = random.Random(1)
    for _ in range(300):
        content = batch(RECORDS, "none", content=chance.randbytes(200))
        found, _ = unpacked(content)
        assert isinstance(found[-1], Unreadable)


class Answer:
    """A fetch's answer for one partition."""

    topic_partition = PARTITION
    fetched_offset = 5

    class partition_data:  # noqa: N801
        error_code = CorruptRecordError.errno


def test_a_broker_that_finds_its_log_corrupt_is_a_stop_that_tells_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetcher = _Fetcher.__new__(_Fetcher)
    monkeypatch.setattr(Fetcher, "_parse_fetched_data", lambda *_: None)
    with pytest.raises(UnreadablePartition, match="iot-topic-3@5: the broker finds its log"):
        fetcher._parse_fetched_data(Answer)

    def refuse(*_: Any) -> None:
        raise TopicAuthorizationFailedError({"iot-topic"})

    monkeypatch.setattr(Fetcher, "_parse_fetched_data", refuse)
    with pytest.raises(TopicAuthorizationFailedError):
        fetcher._parse_fetched_data(Answer)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_parts_of_the_client_that_are_used_are_there() -> None:
    """Each is what kafka_internals.py calls, replaces or reads; where one is gone, look there."""
    assert "await self._wakeup(" in inspect.getsource(kafka_internals._refresh_loop)
    assert inspect.iscoroutinefunction(kafka_internals._refresh_loop)
    assert ClusterMetadata._refresh_loop is kafka_internals._refresh_for_ever
    assert "self._refresh_loop" in inspect.getsource(ClusterMetadata)
    assert callable(ClusterMetadata.refresh_backoff)
    assert callable(ConsumerCoordinator.request_rejoin)
    assert parameters(RecordAccumulator.append)[:6] == [
        *("self", "tp", "timestamp_ms", "key", "value", "headers"),
    ]
    assert {"wakeup", "force_close", "join"} <= set(dir(KafkaSender))
    made = inspect.getsource(KafkaProducer.__init__)
    assert all(f"self.{name} = " in made for name in ("_metadata", "_accumulator", "_sender"))
    assert "self._closed" in inspect.getsource(KafkaProducer.send)


def test_the_client_decodes_with_what_we_put_in_its_place() -> None:
    made = inspect.getsource(KafkaConsumer.__init__)
    assert all(f"self.{name} = " in made for name in ("_fetcher", "_client", "_subscription"))
    assert "self._fetcher" not in inspect.getsource(ConsumerCoordinator)
    assert "self.PartitionRecords(" in inspect.getsource(Fetcher._parse_fetched_data)
    assert "self._parse_fetched_data(" in inspect.getsource(Fetcher.fetched_records)
    assert parameters(Fetcher._parse_fetched_data) == ["self", "completed_fetch"]
    unpack = parameters(Fetcher.PartitionRecords._unpack_records)
    assert unpack == ["self", "tp", "records", "key_deserializer", "value_deserializer"]
    assert parameters(Fetcher.PartitionRecords.take) == ["self", "n"]
    assert parameters(Fetcher.PartitionRecords.drain) == ["self"]
    assert bytes(MemoryRecords(b"some")._buffer) == b"some"


def test_the_client_serializes_after_it_has_looked_for_a_key_and_a_value() -> None:
    nothing = kafka_internals._NOTHING
    assert nothing.serialize("topic", [], nothing) is None
    assert nothing.serialize("topic", [], b"") == b""
    sent = inspect.getsource(KafkaProducer.send)
    assert sent.index("if value is None and key is None") < sent.index("self._serialize(")


def test_the_next_minor_release_is_kept_out() -> None:
    project = tomllib.loads((ROOT / "apps/pyproject.toml").read_text())
    (bound,) = (
        each for each in project["project"]["dependencies"] if each.startswith("kafka-python")
    )
    assert bound.endswith(">=3.0.12,<3.1")


@pytest.mark.parametrize("file", sorted(SOURCES.rglob("*.py")), ids=lambda file: file.stem)
def test_no_other_module_looks_beneath_the_interface(file: Path) -> None:
    if file.stem == "kafka_internals":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kafka":
            assert node.module in DOCUMENTED, f"{file.name}:{node.lineno}"
