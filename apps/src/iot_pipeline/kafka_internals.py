"""What we use of kafka-python beneath its public interface, each part with its reason.

It holds for kafka-python 3.0.12, which apps/pyproject.toml keeps below the next minor release.
tests/unit/test_kafka_internals.py fails when one of the parts is gone. No other module looks there.

Above all, this decodes what a broker hands out. kafka-python's own decoder ends at the first batch
that it cannot decode, and then asks for the same records for ever. It unfolds whatever was
compressed, and takes no header whose name is not UTF-8. Here all that cannot be decoded becomes an
`Unreadable`, which stands in the place of its records, and memory is bounded.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cramjam
import lz4.frame
import zstandard
from kafka import KafkaConsumer, KafkaProducer
from kafka.cluster import ClusterMetadata
from kafka.consumer.fetcher import ConsumerRecord, Fetcher
from kafka.coordinator.assignors.cooperative_sticky import (
    CooperativeStickyAssignor,
)
from kafka.errors import AuthorizationError, CorruptRecordError, KafkaError, for_code

# What a client says before it is let in, and how its password is proved: see `access`.
from kafka.net.sasl import get_sasl_mechanism, register_sasl_mechanism
from kafka.net.sasl.abc import SaslMechanism
from kafka.net.sasl.plain import SaslMechanismPlain
from kafka.net.sasl.scram import SaslMechanismScram
from kafka.protocol.broker_version_data import BrokerVersionData
from kafka.protocol.metadata import ApiVersionsRequest, MetadataRequest
from kafka.protocol.parser import KafkaProtocol
from kafka.protocol.sasl import SaslAuthenticateRequest, SaslHandshakeRequest
from kafka.record.util import calc_crc32c, decode_varint
from kafka.serializer import Serializer
from kafka.structs import TopicPartition

from iot_pipeline.errors import InvalidMessage, Reason, RecordTooLarge
from iot_pipeline.schema import Unreadable
from iot_pipeline.service import Log

__all__ = [
    "POLL_BYTES",
    "ApiVersionsRequest",
    "BrokerVersionData",
    "Consumer",
    "CooperativeStickyAssignor",
    "KafkaProtocol",
    "MetadataRequest",
    "Producer",
    "SaslAuthenticateRequest",
    "SaslHandshakeRequest",
    "SaslMechanism",
    "SaslMechanismPlain",
    "SaslMechanismScram",
    "UnreadablePartition",
    "get_sasl_mechanism",
    "murmur2",
    "register_sasl_mechanism",
]

log = Log("kafka")

# What one poll may bring, and a batch may unfold to: memory, whatever was compressed.
POLL_BYTES = 16 * 1024 * 1024
# What a record takes in memory beside its bytes, roughly.
RECORD_BYTES = 500
# Headers that are kept of one record: each takes a hundred times what it takes on the wire.
MAX_HEADERS = 1000

_refresh_loop = ClusterMetadata._refresh_loop  # noqa: SLF001 - nothing public keeps it alive


async def _refresh_for_ever(metadata: Any) -> None:
    """Keep a client's knowledge of the brokers fresh, whatever goes wrong meanwhile.

    kafka-python 3.0.12 ends this loop at the first error that is none of its own, such as a broker
    that is killed within the handshake. The client then sends to leaders of before for good.
    """
    while not metadata.closed:
        try:
            await _refresh_loop(metadata)
        except Exception as error:  # noqa: BLE001 - it must not end
            log.warning("asking for the brokers again", error=error)
            await metadata._wakeup(metadata.refresh_backoff() / 1000)  # noqa: SLF001


ClusterMetadata._refresh_loop = _refresh_for_ever  # noqa: SLF001


_WORDS = struct.Struct("<I")


def murmur2(key: bytes) -> int:
    """The hash by which Kafka's clients choose a key's partition: 32 bits, not negative.

    The same as kafka-python's, which reads single bytes and takes twice as long.
    """
    size = len(key)
    rest = size % 4
    digest = 0x9747B28C ^ size
    for (word,) in _WORDS.iter_unpack(key[: size - rest]):
        mixed = word * 0x5BD1E995 & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 24) * 0x5BD1E995
        digest = (digest * 0x5BD1E995 ^ mixed) & 0xFFFFFFFF
    if rest:
        digest ^= int.from_bytes(key[-rest:], "little")
        digest = digest * 0x5BD1E995 & 0xFFFFFFFF
    digest = (digest ^ digest >> 13) * 0x5BD1E995 & 0xFFFFFFFF
    return digest ^ digest >> 15


class _Nothing(Serializer):  # type: ignore[misc] # it has no types
    """Stands for a value that is None: `send` refuses a record without key and value.

    Kafka takes such a record, other clients send it, and its dead letter is one too.
    """

    def serialize(self, topic: str, headers: Any, data: Any) -> Any:  # noqa: ARG002
        """The value as it is sent."""
        return None if data is self else data


_NOTHING = _Nothing()


class Producer(KafkaProducer):  # type: ignore[misc] # it has no types
    """A client that sends any record, and has a shorter way for the plain one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, value_serializer=_NOTHING)

    def send_any(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
        partition: int | None = None,
    ) -> Any:
        """`send`, for every record that Kafka takes."""
        if key is None or value is None or headers or partition is not None:
            return self.send(
                topic,
                key=key,
                value=_NOTHING if value is None else value,
                headers=list(headers),
                partition=partition,
            )
        return self._append(topic, key, value)

    def _append(self, topic: str, key: bytes, value: bytes) -> Any:
        """`send` for a record without headers that is known to be small enough.

        kafka-python's `send` wakes the sending thread at each record while a batch waits for the
        one before it. That thread has nothing to do then, and both fight for the interpreter: it
        took more time than everything else. Here only a new batch wakes it. It looks for the next
        batch by itself when the broker has answered.
        """
        partitions = self._metadata.partitions_for_topic(topic)
        if self._closed or not partitions:
            return self.send(topic, key=key, value=value)
        partition = sorted(partitions)[(murmur2(key) & 0x7FFFFFFF) % len(partitions)]
        future, _is_full, is_new, _aborted = self._accumulator.append(
            TopicPartition(topic, partition), None, key, value, []
        )
        if is_new:
            self._sender.wakeup()
        return future

    def abandon(self, timeout: float) -> None:
        """Close after a `close` that timed out, in `timeout` seconds at most.

        kafka-python waits for what was not confirmed, and then closes nothing. Its thread has to
        give that up first.
        """
        self._sender.force_close()
        self._sender.join(timeout)
        self.close(timeout=0)


class UnreadablePartition(KafkaError):  # type: ignore[misc] # it has no types
    """A partition cannot be read on from where it is: the message says which, where and why."""


@dataclass(slots=True)
class _Bounds:
    """How much a consumer holds in memory, and what it keeps of a record."""

    record: int
    """Bytes of the largest record that is kept."""
    batch: int
    """Bytes that a batch may unfold to."""
    headers: bool
    """Whether headers are kept."""
    left: int = 0
    """Bytes that the present poll may still bring."""


class Consumer(KafkaConsumer):  # type: ignore[misc] # it has no types
    """A client that copes with whatever a broker hands out."""

    def __init__(self, *, max_record_bytes: int, headers: bool, **options: Any) -> None:
        """Connect.

        Args:
            max_record_bytes: a larger record becomes an `Unreadable`.
            headers: whether records come with their headers. Those that nobody asks for take
                memory.
            options: kafka-python's.

        Raises:
            KafkaError: no broker answered.
        """
        super().__init__(**options)
        self._bounds = _Bounds(max_record_bytes, max(POLL_BYTES, max_record_bytes), headers)
        self._fetcher = _Fetcher(
            self._bounds, self._client, self._subscription, metrics=self._metrics, **self.config
        )

    def poll(self, *arguments: Any, **options: Any) -> dict[TopicPartition, list[Any]]:
        """As `KafkaConsumer.poll`, but for no more than POLL_BYTES and a record.

        Raises:
            UnreadablePartition: one partition cannot be read on. Others can.
        """
        self._bounds.left = POLL_BYTES
        records: dict[TopicPartition, list[Any]] = super().poll(*arguments, **options)
        return records

    def rejoin(self) -> None:
        """Join the group anew at the next poll, keeping the partitions.

        kafka-python 3.0.12 forgets a rebalance that it began in one poll, because topics have
        changed, when the group's answer comes before the next poll. It then takes part in nothing
        any more, and all commits fail. Short polls make that likely.
        """
        self._coordinator.request_rejoin()


class _Fetcher(Fetcher):  # type: ignore[misc] # it has no types
    """Asks for records, and decodes them with `_Records`."""

    def __init__(self, bounds: _Bounds, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._bounds = bounds

    # By this name kafka-python makes what decodes the records of one answer.
    def PartitionRecords(self, *arguments: Any, **options: Any) -> Any:  # noqa: N802
        """The records that a broker has answered for one partition."""
        return _Records(self._bounds, *arguments, **options)

    def _parse_fetched_data(self, completed_fetch: Any) -> Any:
        """Look at what a broker has answered for one partition.

        Raises:
            UnreadablePartition: it cannot be read on. kafka-python keeps silent when the broker
                itself finds its log corrupt, and does not say where something else happened.
        """
        at = f"{_name(completed_fetch.topic_partition)}@{completed_fetch.fetched_offset}"
        try:
            records = super()._parse_fetched_data(completed_fetch)
        except AuthorizationError:
            raise
        except KafkaError as error:
            raise UnreadablePartition(f"{at}: {error}") from error
        if for_code(completed_fetch.partition_data.error_code) is CorruptRecordError:
            raise UnreadablePartition(f"{at}: the broker finds its log corrupt there")
        return records


def _name(partition: TopicPartition) -> str:
    return f"{partition.topic}-{partition.partition}"


# The format of batches since Kafka 0.11, the second: https://kafka.apache.org/documentation/#recordbatch
_FRAME = struct.Struct(">qi")
"""Base offset, and the length of what follows."""
_START = struct.Struct(">qiib")
"""The frame, the leader's epoch, and the format's number."""
_HEADER = struct.Struct(">qiibIhiqqqhii")
"""The start, checksum, attributes, last offset (from the base), first and last timestamp, id and
epoch of the producer, first sequence number, count of records."""
_CHECKED = struct.calcsize(">qiibI")
"""Where begins what the checksum is of."""
_FORMAT = 2
_CODEC, _APPEND_TIME, _CONTROL = 0x07, 0x08, 0x20
"""Of the attributes."""


@dataclass(slots=True)
class _Batch:
    """A batch, as a broker has handed it out."""

    content: memoryview
    base: int
    follows: int | None
    """The base offset of the batch behind it, where that came with the same answer."""


def _batches(content: memoryview) -> Iterator[_Batch]:
    """Split what a broker has handed out. The last batch is often cut off; it comes again.

    Raises:
        ValueError: a batch's length is none, so nobody knows where the next one begins.
    """
    at, batch = 0, None
    while at + _FRAME.size <= len(content):
        base, length = _FRAME.unpack_from(content, at)
        if batch is not None:
            batch.follows = base
            yield batch
        if length < _START.size - _FRAME.size:
            raise ValueError(f"a batch cannot have {length} bytes")
        end = at + _FRAME.size + length
        batch = _Batch(content[at:end], base, None) if end <= len(content) else None
        at = end
    if batch is not None:
        yield batch


class _Records(Fetcher.PartitionRecords):  # type: ignore[misc] # it has no types
    """The records that a broker has answered for one partition."""

    next_fetch_offset: int

    def __init__(self, bounds: _Bounds, *arguments: Any, **options: Any) -> None:
        self._bounds = bounds
        super().__init__(*arguments, **options)

    def take(self, n: int | None = None) -> list[Any]:
        """The next records.

        Raises:
            UnreadablePartition: nobody knows where the records behind begin.
        """
        try:
            records: list[Any] = super().take(n)
        except BaseException:
            # kafka-python would ask the same generator again, which has ended, for ever.
            self.drain()
            raise
        return records

    def _unpack_records(
        self, tp: TopicPartition, records: Any, *_deserializers: Any
    ) -> Iterator[Any]:
        """Decode, until there are no more or the poll has brought enough.

        The rest is not kept: it is fetched again.
        """
        bounds = self._bounds
        try:
            for batch in _batches(memoryview(records._buffer)):  # noqa: SLF001 - see above
                for record in self._records_of(tp, batch):
                    if bounds.left <= 0:
                        break
                    size = RECORD_BYTES + len(record.key or b"") + len(record.value or b"")
                    bounds.left -= size
                    self.bytes_read += size
                    self.records_read += 1
                    self.next_fetch_offset = max(self.next_fetch_offset, record.offset + 1)
                    yield record
                if bounds.left <= 0:
                    break
        except ValueError as error:
            raise UnreadablePartition(f"{_name(tp)}@{self.next_fetch_offset}: {error}") from error
        self.drain()

    def _records_of(self, tp: TopicPartition, batch: _Batch) -> Iterator[Any]:
        """The records of a batch from the fetched offset on, or what stands for them."""
        if self._bounds.left <= 0:
            return
        last, header, problem = _opened(batch, self.next_fetch_offset)
        if last < self.next_fetch_offset:
            return
        timestamp, timestamp_type = -1, 0
        if header is not None:
            timestamp, timestamp_type = header[8], int(bool(header[5] & _APPEND_TIME))
            self.leader_epoch = header[2]
            if header[5] & _CONTROL:
                self.next_fetch_offset = last + 1
                return
            reader = _Reader(tp, header, self._bounds)
            try:
                yield from reader.read(batch.content, self.next_fetch_offset)
            except InvalidMessage as error:
                problem = error
            except Exception as error:  # noqa: BLE001 - each codec has its own errors
                problem = InvalidMessage(Reason.UNREADABLE, f"the batch cannot be decoded: {error}")
        if problem is not None:
            yield Unreadable(
                topic=tp.topic,
                partition=tp.partition,
                first_offset=min(self.next_fetch_offset, last),
                offset=last,
                timestamp=timestamp,
                timestamp_type=timestamp_type,
                error=problem,
            )
        elif self._bounds.left > 0:
            # A compacted batch's last records may be gone.
            self.next_fetch_offset = last + 1


def _opened(
    batch: _Batch, position: int
) -> tuple[int, tuple[Any, ...] | None, InvalidMessage | None]:
    """A batch's last offset, its header, and what is wrong with it; then there is no header.

    Args:
        batch: the batch.
        position: the offset from which on records are wanted.
    """
    number = _START.unpack_from(batch.content)[3]
    # Where the header cannot be believed, the next batch says where this one ends.
    otherwise = position if batch.follows is None else max(position, batch.follows - 1)
    if 0 <= number < _FORMAT:
        text = f"the batch has format {number}, of clients before Kafka 0.11"
        return batch.base, None, InvalidMessage(Reason.UNREADABLE, text)
    if number != _FORMAT:
        text = f"the batch has format {number}, which this release does not know"
        return otherwise, None, InvalidMessage(Reason.UNREADABLE, text)
    if len(batch.content) < _HEADER.size:
        text = f"the batch has {len(batch.content)} bytes, less than its header"
        return otherwise, None, InvalidMessage(Reason.UNREADABLE, text)
    header = _HEADER.unpack_from(batch.content)
    last, count = batch.base + header[6], header[12]
    if calc_crc32c(batch.content[_CHECKED:]) == header[4]:
        return last, header, None
    if batch.follows is None and count == header[6] + 1:
        otherwise = max(position, last)
    text = "the batch's checksum is not that of its bytes"
    return otherwise, None, InvalidMessage(Reason.UNREADABLE, text)


class _Reader:
    """Reads the records of one batch."""

    def __init__(self, tp: TopicPartition, header: tuple[Any, ...], bounds: _Bounds) -> None:
        self._tp = tp
        self._bounds = bounds
        (self._base, _, self._epoch, _, _, self._attributes, last, self._first_time) = header[:8]
        self._last_time, self._count = header[8], header[12]
        self._last = self._base + last

    def read(self, content: memoryview, position: int) -> Iterator[Any]:
        """The records from `position` on, as `ConsumerRecord` or `Unreadable`.

        Raises:
            InvalidMessage: the batch unfolds to too much.
            ValueError, IndexError, Exception: it cannot be decoded.
        """
        data = bytes(self._unfolded(content[_HEADER.size :]))
        at, expected = 0, self._base
        for _ in range(self._count):
            length, at = decode_varint(data, at)
            end = at + length
            if not at < end <= len(data):
                raise ValueError(f"a record of {length} bytes is not within it")
            # Before it one byte of attributes, of which Kafka knows none.
            time, at = decode_varint(data, at + 1)
            offset, at = decode_varint(data, at)
            offset += self._base
            if not expected <= offset <= self._last:
                raise ValueError(f"it has a record of offset {offset}")
            expected = offset + 1
            if offset >= position:
                yield self._record(data, at, end, offset, time)
            at = end
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes are behind its last record")

    def _record(self, data: bytes, at: int, end: int, offset: int, time: int) -> Any:
        timestamp = self._first_time + time
        if self._attributes & _APPEND_TIME:
            timestamp = self._last_time
        key, at = _nullable(data, at, end)
        value, at = _nullable(data, at, end)
        size = len(key or b"") + len(value or b"")
        if size > self._bounds.record:
            return Unreadable(
                topic=self._tp.topic,
                partition=self._tp.partition,
                first_offset=offset,
                offset=offset,
                key=key if len(key or b"") <= self._bounds.record else None,
                timestamp=timestamp,
                timestamp_type=int(bool(self._attributes & _APPEND_TIME)),
                error=RecordTooLarge(
                    f"the record has {size} bytes, more than {self._bounds.record}"
                ),
            )
        headers = _headers(data, at, end) if self._bounds.headers else []
        return ConsumerRecord(
            *(self._tp.topic, self._tp.partition, self._epoch, offset, timestamp),
            *(int(bool(self._attributes & _APPEND_TIME)), key, value, headers, None),
            *(-1 if key is None else len(key), -1 if value is None else len(value), -1),
        )

    def _unfolded(self, content: memoryview) -> bytes | memoryview:
        """A batch's records, decompressed.

        Raises:
            RecordTooLarge: they are more than a batch may unfold to.
            ValueError, Exception: they cannot be decompressed.
        """
        codec = self._attributes & _CODEC
        if not codec:
            return content
        if codec not in CODECS:
            raise ValueError(f"it is compressed in way {codec}, which this release does not know")
        name, decompress = CODECS[codec]
        limit = self._bounds.batch
        unfolded = decompress(content, limit)
        if unfolded is None:
            raise RecordTooLarge(
                f"the batch's {len(content)} bytes of {name} unfold to more than {limit} bytes"
            )
        return unfolded


def _nullable(data: bytes, at: int, end: int) -> tuple[bytes | None, int]:
    size, at = decode_varint(data, at)
    if size < 0:
        return None, at
    if at + size > end:
        raise ValueError(f"{size} bytes of a record are not within it")
    return data[at : at + size], at + size


def _headers(data: bytes, at: int, end: int) -> list[tuple[str, bytes | None]]:
    """A record's first headers. Kafka itself does not look at their names' bytes."""
    count, at = decode_varint(data, at)
    headers = []
    for _ in range(min(count, MAX_HEADERS)):
        name, at = _nullable(data, at, end)
        value, at = _nullable(data, at, end)
        headers.append(((name or b"").decode("utf-8", "replace"), value))
    return headers


def _gunzip(content: memoryview, limit: int) -> bytes | None:
    unfolded = bytearray()
    rest = bytes(content)
    while rest:
        # Bits of the largest window, and 16 for gzip's own header.
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        unfolded += member.decompress(rest, limit + 1 - len(unfolded))
        if len(unfolded) > limit:
            return None
        if not member.eof:
            raise ValueError("the gzip stream is cut off")
        rest = member.unused_data
    return bytes(unfolded)


# Java's clients put blocks of snappy's into a frame of xerial's; each begins with its length.
_XERIAL = b"\x82SNAPPY\0"
_XERIAL_SIZE = 16


def _unsnap(content: memoryview, limit: int) -> bytes | None:
    if content[: len(_XERIAL)] != _XERIAL:
        if cramjam.snappy.decompress_raw_len(content) > limit:
            return None
        return bytes(cramjam.snappy.decompress_raw(content))
    unfolded = bytearray()
    at = _XERIAL_SIZE
    while at < len(content):
        (size,) = struct.unpack_from(">i", content, at)
        at += 4
        if not 0 < size <= len(content) - at:
            raise ValueError(f"{size} bytes of snappy are not within it")
        block = content[at : at + size]
        if len(unfolded) + cramjam.snappy.decompress_raw_len(block) > limit:
            return None
        unfolded += bytes(cramjam.snappy.decompress_raw(block))
        at += size
    return bytes(unfolded)


def _unlz4(content: memoryview, limit: int) -> bytes | None:
    frame = lz4.frame.LZ4FrameDecompressor()
    unfolded: bytes = frame.decompress(bytes(content), max_length=limit + 1)
    if len(unfolded) > limit:
        return None
    if not frame.eof:
        raise ValueError("the lz4 frame is cut off")
    return unfolded


def _unzstd(content: memoryview, limit: int) -> bytes | None:
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        unfolded: bytes = reader.read(limit + 1)
    return None if len(unfolded) > limit else unfolded


CODECS: dict[int, tuple[str, Callable[[memoryview, int], bytes | None]]] = {
    1: ("gzip", _gunzip),
    2: ("snappy", _unsnap),
    3: ("lz4", _unlz4),
    4: ("zstd", _unzstd),
}
"""The ways to compress that Kafka has, by number: what each is called, and what undoes it. That
gives None for what unfolds to more bytes than are allowed."""
