"""The loop that every consuming stage runs.

Poll a batch, decode it, handle it until the sink has confirmed, commit. In that order, because a
commit is a promise that the records need not be read again: whatever dies, and whenever, the
records in hand come again, and since all results are keyed by the image's id, a second time does
no harm.

A record that can never be handled goes to the dead-letter topic, untouched and with the reason.
While the sink is down the loop keeps its place in the consumer group: partitions are paused and
polling goes on, so that no other member takes them over only to meet the same outage.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    InconsistentGroupProtocolError,
    KafkaError,
)
from kafka.structs import MemberState, OffsetAndMetadata, TopicPartition

from iot_pipeline import metrics
from iot_pipeline.errors import (
    ConfigError,
    InvalidMessage,
    RecordTooLarge,
    SinkUnavailable,
    TooManyDeadLetters,
)
from iot_pipeline.kafka import Backoff, Sender, connect, make_consumer, wait_for_topics
from iot_pipeline.schema import DeadLetter, Record
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import ConsumerSettings

log = Log("worker")

# Short enough to notice SIGTERM and feed the watchdog in time; a poll returns at once when there
# are records.
POLL_SECONDS = 1.0
COMMIT_TIMEOUT_SECONDS = 10.0
CLOSE_TIMEOUT_SECONDS = 5.0

DEAD_LETTER_WINDOW = 1000
DEAD_LETTER_WINDOW_MINIMUM = 200

ItemT = TypeVar("ItemT")


class Stage(Protocol[ItemT]):
    """What one stage adds to the loop."""

    topics: Sequence[str]
    """The topics to read."""

    sink: str
    """What it writes to, as logs and metrics name it."""

    def decode(self, record: Record) -> ItemT:
        """Turn one record into what `handle` works on. It must not depend on other records.

        Raises:
            InvalidMessage: the record can never be handled.
        """
        ...

    def handle(self, batch: Sequence[ItemT]) -> Mapping[int, InvalidMessage]:
        """Do the work for decoded records and return once the sink has confirmed it.

        Returns:
            Refused items by their place in the batch: they go to the dead-letter topic. The rest
            is done.

        Raises:
            SinkUnavailable: try the same batch again later. What was written stays; writing it
                again must make no difference.
        """
        ...


class Consumer(Protocol):
    """The part of kafka-python's `KafkaConsumer` that the loop uses."""

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        """Records, or none after the timeout. Takes part in the group's rebalances."""
        ...

    def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata], timeout_ms: int) -> None:
        """Remember where to go on, or raise."""
        ...

    def assignment(self) -> set[TopicPartition]:
        """Our partitions."""
        ...

    def group_metadata(self) -> Any:
        """Our membership; of it, `state`."""
        ...

    def highwater(self, partition: TopicPartition) -> int | None:
        """The partition's end as of the last fetch."""
        ...

    def pause(self, *partitions: TopicPartition) -> None:
        """Fetch no more from them."""
        ...

    def resume(self, *partitions: TopicPartition) -> None:
        """Fetch from them again."""
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Go on from that offset."""
        ...

    def close(self, autocommit: bool, timeout_ms: int) -> None:
        """Leave."""
        ...


class Membership(ConsumerRebalanceListener):  # type: ignore[misc]
    """Keeps what Kafka says about our partitions until the loop asks.

    kafka-python calls it from its I/O thread, but only while the loop is inside `poll` or `close`,
    and must not be kept waiting there. A batch is handled and committed between two polls, so
    there is nothing left to finish when partitions are taken away - but for a batch that waits for
    its sink, which the loop then drops: the partition's new owner reads it again.
    """

    def __init__(self) -> None:
        self._revoked: set[TopicPartition] = set()

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Kafka gave us partitions."""
        log.info("partitions assigned", partitions=_names(assigned))

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Kafka takes partitions to give them to another member."""
        self._revoked.update(revoked)
        log.info("partitions revoked", partitions=_names(revoked))

    def on_partitions_lost(self, lost: Collection[TopicPartition]) -> None:
        """Kafka gave our partitions away already, since it had not heard from us."""
        self._revoked.update(lost)
        log.warning("partitions lost", partitions=_names(lost))

    def take_revoked(self) -> set[TopicPartition]:
        """The partitions taken from us since the last call."""
        revoked, self._revoked = self._revoked, set()
        return revoked


def _names(partitions: Collection[TopicPartition]) -> str:
    return ",".join(f"{tp.topic}-{tp.partition}" for tp in sorted(partitions))


@dataclass
class _Batch(Generic[ItemT]):
    """Records in hand: decoded ones, refused ones, and those in the dead-letter topic already."""

    items: list[tuple[Record, ItemT]] = field(default_factory=list)
    refused: list[tuple[Record, InvalidMessage]] = field(default_factory=list)
    buried: list[Record] = field(default_factory=list)
    handled: bool = False

    def records(self) -> list[Record]:
        return [record for record, _ in (*self.items, *self.refused)] + self.buried

    def drop(self, partitions: set[TopicPartition]) -> None:
        self.items = [pair for pair in self.items if _partition(pair[0]) not in partitions]
        self.refused = [pair for pair in self.refused if _partition(pair[0]) not in partitions]
        self.buried = [record for record in self.buried if _partition(record) not in partitions]


def _partition(record: Record) -> TopicPartition:
    return TopicPartition(record.topic, record.partition)


class DeadLetterLimit:
    """Stops the service when so much is refused that the fault is more likely ours.

    Without it, a wrong setting or a broken release would quietly move a whole topic aside.
    """

    def __init__(self, consecutive: int, share: float) -> None:
        self._consecutive_limit = consecutive
        self._share_limit = share
        self._consecutive = 0
        self._window: deque[bool] = deque(maxlen=DEAD_LETTER_WINDOW)
        self._refused_in_window = 0

    def count(self, *, refused: bool) -> None:
        """Count one record.

        Raises:
            TooManyDeadLetters: that was one too many.
        """
        if len(self._window) == self._window.maxlen:
            self._refused_in_window -= self._window[0]
        self._window.append(refused)
        self._refused_in_window += refused
        self._consecutive = self._consecutive + 1 if refused else 0
        if self._consecutive_limit and self._consecutive >= self._consecutive_limit:
            raise TooManyDeadLetters(
                f"{self._consecutive} records in a row cannot be handled "
                "(IOT_MAX_CONSECUTIVE_DEAD_LETTERS); read the dead-letter topic for the reasons"
            )
        seen = len(self._window)
        share = self._refused_in_window / seen
        if seen >= DEAD_LETTER_WINDOW_MINIMUM and share > self._share_limit:
            raise TooManyDeadLetters(
                f"{self._refused_in_window} of the last {seen} records cannot be handled "
                "(IOT_MAX_DEAD_LETTER_SHARE); read the dead-letter topic for the reasons"
            )


class Worker(Generic[ItemT]):
    """Runs a stage over a consumer until the service is asked to stop."""

    def __init__(
        self,
        stage: Stage[ItemT],
        settings: ConsumerSettings,
        service: Service,
        consumer: Consumer,
        sender: Sender,
        membership: Membership,
    ) -> None:
        self._stage = stage
        self._settings = settings
        self._service = service
        self._consumer = consumer
        self._sender = sender
        self._membership = membership
        self._limit = DeadLetterLimit(
            settings.max_consecutive_dead_letters, settings.max_dead_letter_share
        )
        self._in_hand: _Batch[ItemT] = _Batch()
        # What is done but not committed yet: the offsets to go on from.
        self._done: dict[TopicPartition, int] = {}
        # The first record of each partition that is not done.
        self._next: dict[TopicPartition, int] = {}

    def run(self) -> None:
        """Work until the service is asked to stop, then leave with nothing half done.

        Raises:
            TooManyDeadLetters: the limit is reached. The batch in hand is not committed.
            ConfigError: Kafka refuses what we ask of it.
        """
        metrics.SINK_UP.set(1)
        try:
            while not self._service.stopping:
                self._service.alive()
                records = self._poll(POLL_SECONDS)
                if records:
                    self._process(records)
                self._commit()
            self._service.leaving("leaving the consumer group")
        finally:
            self._consumer.close(autocommit=False, timeout_ms=int(CLOSE_TIMEOUT_SECONDS * 1000))

    def _poll(self, seconds: float) -> list[Record]:
        started = time.monotonic()
        try:
            polled = self._consumer.poll(
                timeout_ms=int(seconds * 1000), max_records=self._settings.max_batch_size
            )
        except KafkaError as error:
            self._raise_if_hopeless(error)
            log.warning("poll failed", error=error or type(error).__name__)
            self._service.wait(seconds)
            polled = {}
        metrics.POLL_SECONDS.observe(time.monotonic() - started)
        self._forget(self._membership.take_revoked())
        records = [record for batch in polled.values() for record in batch]
        for record in records:
            self._next.setdefault(_partition(record), record.offset)
        self._measure_lag()
        if self._consumer.group_metadata().state is MemberState.STABLE:
            self._service.ready("working")
        return records

    def _forget(self, revoked: set[TopicPartition]) -> None:
        self._in_hand.drop(revoked)
        for partition in revoked:
            self._done.pop(partition, None)
            if self._next.pop(partition, None) is not None:
                metrics.LAG.remove(partition.topic, str(partition.partition))

    def _measure_lag(self) -> None:
        for partition in self._consumer.assignment() & self._next.keys():
            end = self._consumer.highwater(partition)
            lag = max(0, (end or 0) - self._next[partition])
            metrics.LAG.labels(partition.topic, str(partition.partition)).set(lag)

    def _raise_if_hopeless(self, error: KafkaError) -> None:
        """Raise what only an operator can mend."""
        if isinstance(error, FencedInstanceIdError):
            raise ConfigError(
                "another member of the group has taken our name: give each its own with "
                f"IOT_GROUP_INSTANCE_ID (now {self._settings.group_instance_id!r})"
            ) from error
        if isinstance(error, InconsistentGroupProtocolError):
            raise ConfigError(
                f"group {self._settings.group_id} has members of another kind: stop them, or set "
                "IOT_GROUP_ID"
            ) from error
        if isinstance(error, AuthorizationError):
            raise ConfigError(f"Kafka does not allow it: {error}") from error

    def _process(self, records: Sequence[Record]) -> None:
        self._in_hand = self._decode(records)
        if self._see_through(self._in_hand):
            for record in self._in_hand.records():
                partition = _partition(record)
                after = max(self._done.get(partition, 0), record.offset + 1)
                self._done[partition] = self._next[partition] = after
        self._in_hand = _Batch()
        metrics.OLDEST_SECONDS.set(0)
        self._measure_lag()

    def _decode(self, records: Sequence[Record]) -> _Batch[ItemT]:
        batch: _Batch[ItemT] = _Batch()
        metrics.BATCH_SIZE.observe(len(records))
        started = time.monotonic()
        for record in records:
            metrics.RECORDS_IN.labels(record.topic).inc()
            try:
                item = self._stage.decode(record)
            except InvalidMessage as error:
                self._refuse(batch, record, error)
            else:
                self._limit.count(refused=False)
                batch.items.append((record, item))
        metrics.DECODE_SECONDS.observe(time.monotonic() - started)
        return batch

    def _refuse(self, batch: _Batch[ItemT], record: Record, error: InvalidMessage) -> None:
        batch.refused.append((record, error))
        metrics.DEAD_LETTERS.labels(error.reason.value).inc()
        log.warning(
            "refused",
            reason=error.reason.value,
            error=error,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
        )
        self._limit.count(refused=True)

    def _see_through(self, batch: _Batch[ItemT]) -> bool:
        """Try until the batch is done. False: we are to stop, and it is not."""
        backoff = Backoff()
        down_since = 0.0
        # Nothing is left once all partitions of the batch went to other members.
        while batch.records():
            self._measure_age(batch)
            try:
                self._handle(batch)
                self._send_dead_letters(batch)
            except SinkUnavailable as error:
                metrics.SINK_FAILURES.labels(self._stage.sink).inc()
                down_since = down_since or time.monotonic()
                self._wait_for_sink(batch, error, backoff.next())
                if self._service.stopping:
                    log.warning("stopping before the sink is back", records=len(batch.records()))
                    return False
            else:
                break
        if down_since:
            self._resume(time.monotonic() - down_since)
        return True

    def _handle(self, batch: _Batch[ItemT]) -> None:
        if batch.handled or not batch.items:
            return
        started = time.monotonic()
        refused = self._stage.handle([item for _, item in batch.items])
        metrics.HANDLE_SECONDS.observe(time.monotonic() - started)
        metrics.RECORDS_OUT.labels(self._stage.sink).inc(len(batch.items) - len(refused))
        batch.handled = True
        for place in sorted(refused, reverse=True):
            record, _ = batch.items.pop(place)
            self._refuse(batch, record, refused[place])

    def _send_dead_letters(self, batch: _Batch[ItemT]) -> None:
        """Return when each refused record is safe in the dead-letter topic.

        A record that does not fit there is named there without its value: the headers say where
        the original is. To stop over it would hold up every record behind it.
        """
        topic = self._settings.dead_letter_topic
        while batch.refused:
            record, error = batch.refused[0]
            headers = DeadLetter.of(record, error, self._settings.SERVICE).headers()
            try:
                self._sender.send(topic, record.key, record.value, headers, limited=False)
                self._sender.confirm(self._service.alive)
            except RecordTooLarge as too_large:
                log.warning("dead letter without its value", error=too_large, offset=record.offset)
                self._sender.send(topic, record.key, b"", headers, limited=False)
                self._sender.confirm(self._service.alive)
            batch.buried.append(record)
            del batch.refused[0]

    def _wait_for_sink(self, batch: _Batch[ItemT], error: SinkUnavailable, seconds: float) -> None:
        """Keep our place in the group for a while, taking no more records."""
        metrics.SINK_UP.set(0)
        log.warning("sink down", sink=self._stage.sink, error=error, retry_seconds=seconds)
        self._service.status(f"waiting for {self._stage.sink}: {error}")
        until = time.monotonic() + seconds
        while not self._service.stopping and batch.records():
            self._consumer.pause(*self._consumer.assignment())
            left = until - time.monotonic()
            if left <= 0:
                break
            self._service.alive()
            # A partition that came to us only now may already have brought records.
            for record in reversed(self._poll(min(POLL_SECONDS, left))):
                self._consumer.seek(_partition(record), record.offset)
            self._measure_age(batch)

    def _resume(self, seconds: float) -> None:
        metrics.SINK_UP.set(1)
        self._consumer.resume(*self._consumer.assignment())
        log.info("sink up", sink=self._stage.sink, down_seconds=seconds)
        self._service.status("working")

    def _measure_age(self, batch: _Batch[ItemT]) -> None:
        oldest = min((record.timestamp for record in batch.records()), default=None)
        if oldest is not None and oldest > 0:
            metrics.OLDEST_SECONDS.set(max(0.0, time.time() - oldest / 1000))

    def _commit(self) -> None:
        """Commit what is done, so that it is not read again.

        A commit that fails is tried again after the next poll: until then the records are only
        read twice if we die. One that the group refuses, since it is being rebalanced, goes
        through once we are in again, or is void because the partition is no longer ours.
        """
        if not self._done:
            return
        offsets = {
            partition: OffsetAndMetadata(offset, "", -1) for partition, offset in self._done.items()
        }
        try:
            self._consumer.commit(offsets, timeout_ms=int(COMMIT_TIMEOUT_SECONDS * 1000))
        except KafkaError as error:
            self._raise_if_hopeless(error)
            log.warning("commit failed", error=error or type(error).__name__)
        else:
            self._done.clear()


def run_stage(
    make_stage: Callable[[Service, Sender], Stage[ItemT]],
    settings: ConsumerSettings,
    service: Service,
) -> None:
    """Connect to Kafka, make the stage, and run the loop until the service is asked to stop.

    Args:
        make_stage: makes the stage, warm and ready. It gets the sender that also sends the dead
            letters.
        settings: the stage's settings.
        service: the process around it, already entered.
    """
    sender = connect(lambda: Sender(settings), service, settings.bootstrap_servers)
    if sender is None:
        return
    try:
        stage = make_stage(service, sender)
        membership = Membership()
        consumer = connect(lambda: make_consumer(settings), service, settings.bootstrap_servers)
        if consumer is None:
            return
        if not wait_for_topics(consumer, stage.topics, service):
            consumer.close(autocommit=False)
            return
        consumer.subscribe(topics=list(stage.topics), listener=membership)
        Worker(stage, settings, service, consumer, sender, membership).run()
    finally:
        sender.close(CLOSE_TIMEOUT_SECONDS)
