"""The stage's three threads: one decodes, one handles, one delivers.

::

    loop ── put ──▶ decode ──▶ handle ──▶ deliver ── finished ──▶ loop

Each works on another batch, so decoding runs ahead of the model and the model does not wait for
the sink. All three are first in, first out: batches finish in the order in which they were put.
What the loop puts it bounds itself, by `MAX_IN_FLIGHT`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from kafka.structs import TopicPartition

from iot_pipeline import metrics
from iot_pipeline.dead_letters import DeadLetterLimit, bury
from iot_pipeline.errors import InvalidMessage, SinkUnavailable
from iot_pipeline.kafka import Backoff, Sender
from iot_pipeline.schema import Record
from iot_pipeline.service import Log
from iot_pipeline.settings import ConsumerSettings

log = Log("pipeline")

# One batch with each thread, and one decoded in advance.
MAX_IN_FLIGHT = 4
BEAT_SECONDS = 1.0

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Beat = Callable[[], None]
"""To be called now and then in long work: what does not beat for long is taken for hung."""


class Stage(Protocol[ItemT, ResultT]):
    """What one stage adds to the loop. Each method is called from a thread of its own."""

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

    def handle(self, items: Sequence[ItemT], beat: Beat) -> ResultT:
        """Do the work for decoded records that needs no other service."""
        ...

    def deliver(self, result: ResultT, beat: Beat) -> Mapping[int, InvalidMessage]:
        """Send the result and return once the sink has confirmed it.

        Returns:
            Refused items by their place in the batch: they go to the dead-letter topic. The rest
            is done.

        Raises:
            SinkUnavailable: call it with the same result again later. What was written stays;
                writing it again must make no difference.
        """
        ...


@dataclass
class Batch(Generic[ItemT, ResultT]):
    """Records on their way through the threads."""

    records: list[Record]
    offsets: dict[TopicPartition, int]
    """Where each partition goes on once the batch is done. The loop alone looks at it, and takes
    out partitions that are no longer ours."""
    oldest: int
    """When the oldest record was sent, milliseconds since 1970."""
    outcomes: list[ItemT | InvalidMessage] = field(default_factory=list)
    """What decoding made of each record."""
    result: ResultT | None = None
    """What handling made of the items; None where there are none."""
    absorbed: list[Batch[ItemT, ResultT]] = field(default_factory=list)
    """Batches that are handled together with this one."""

    def absorb(self, other: Batch[ItemT, ResultT]) -> None:
        """Take in the batch behind, so that the two are handled at once."""
        self.records = [*self.records, *other.records]
        self.outcomes = [*self.outcomes, *other.outcomes]
        self.absorbed.append(other)

    def parts(self) -> list[Batch[ItemT, ResultT]]:
        """The batches that the loop knows this one by."""
        return [self, *self.absorbed]

    def abandoned(self) -> bool:
        """Whether all its records belong to other members of the group by now."""
        return not any(part.offsets for part in self.parts())

    def items(self) -> list[ItemT]:
        """What was decoded, without what was refused."""
        return [outcome for outcome in self.outcomes if not isinstance(outcome, InvalidMessage)]


class Pipeline(Generic[ItemT, ResultT]):
    """Runs a stage's threads between the loop's `put` and `finished`."""

    def __init__(
        self, stage: Stage[ItemT, ResultT], settings: ConsumerSettings, sender: Sender
    ) -> None:
        self.progress = threading.Event()
        """Set whenever a batch is done or given up, or a thread has failed; the loop clears it."""
        self.outage: SinkUnavailable | None = None
        """Why the sink takes nothing at present."""
        self.in_flight: deque[Batch[ItemT, ResultT]] = deque()
        """Batches that were put and are not finished, oldest first. The loop's."""
        self._stage = stage
        self._settings = settings
        self._sender = sender
        self._limit = DeadLetterLimit(
            settings.max_consecutive_dead_letters, settings.max_dead_letter_share
        )
        self._to_decode: SimpleQueue[Batch[ItemT, ResultT] | None] = SimpleQueue()
        self._to_handle: SimpleQueue[Batch[ItemT, ResultT] | None] = SimpleQueue()
        self._to_deliver: SimpleQueue[Batch[ItemT, ResultT] | None] = SimpleQueue()
        self._done: deque[Batch[ItemT, ResultT]] = deque()
        # Decoded, but one too many for the batch in hand.
        self._held: Batch[ItemT, ResultT] | None = None
        self._closing = threading.Event()
        self._down_since = 0.0
        self._error: BaseException | None = None
        # When each thread last showed a sign of life; without an entry it has nothing to do.
        self._beats: dict[str, float] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
            for name, work in (
                ("decode", self._decode_next),
                ("handle", self._handle_next),
                ("deliver", self._deliver_next),
            )
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def put(self, records: list[Record]) -> None:
        """Take a batch, which the caller has made sure there is room for."""
        offsets: dict[TopicPartition, int] = {}
        for record in records:
            partition = TopicPartition(record.topic, record.partition)
            offsets[partition] = max(offsets.get(partition, 0), record.offset + 1)
        oldest = min(record.timestamp for record in records)
        batch: Batch[ItemT, ResultT] = Batch(records, offsets, oldest)
        self.in_flight.append(batch)
        self._to_decode.put(batch)

    def finished(self) -> list[Batch[ItemT, ResultT]]:
        """The batches that were done since the last call, in order.

        Raises:
            PipelineError, Exception: what a thread has failed with.
        """
        if self._error is not None:
            raise self._error
        done = []
        while self._done:
            for part in self._done.popleft().parts():
                self.in_flight.popleft()
                done.append(part)
        return done

    def drop(self, partitions: set[TopicPartition]) -> None:
        """Finish nothing of partitions that are no longer ours: their new owners read it again."""
        for batch in self.in_flight:
            for partition in partitions:
                batch.offsets.pop(partition, None)

    def silence(self) -> float:
        """Seconds since the busiest thread showed a sign of life; 0 when all are idle."""
        return max((time.monotonic() - beat for beat in self._beats.copy().values()), default=0.0)

    def close(self, timeout: float) -> None:
        """End the threads. What is not finished is left as it is.

        Args:
            timeout: the seconds that all of them together may take for what they are at.
        """
        until = time.monotonic() + timeout
        self._closing.set()
        for queue in (self._to_decode, self._to_handle, self._to_deliver):
            queue.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))

    def _run(self, work: Callable[[], bool]) -> None:
        name = threading.current_thread().name
        try:
            while not self._closing.is_set() and work():
                self._beats.pop(name, None)
        except BaseException as error:  # noqa: BLE001 - the loop raises it again
            self._error = self._error or error
            self.progress.set()

    def _beat(self) -> None:
        self._beats[threading.current_thread().name] = time.monotonic()

    def _decode_next(self) -> bool:
        batch = self._to_decode.get()
        if batch is None:
            return False
        self._beat()
        started = time.monotonic()
        for topic, count in Counter(record.topic for record in batch.records).items():
            metrics.RECORDS_IN.labels(topic).inc(count)
        for record in batch.records:
            self._beat()
            try:
                batch.outcomes.append(self._stage.decode(record))
            except InvalidMessage as error:
                batch.outcomes.append(error)
        metrics.DECODE_SECONDS.observe(time.monotonic() - started)
        self._to_handle.put(batch)
        return True

    def _handle_next(self) -> bool:
        batch = self._held or self._to_handle.get()
        self._held = None
        if batch is None:
            return False
        self._beat()
        self._gather(batch)
        metrics.BATCH_SIZE.observe(len(batch.records))
        items = batch.items()
        if items:
            started = time.monotonic()
            batch.result = self._stage.handle(items, self._beat)
            metrics.HANDLE_SECONDS.observe(time.monotonic() - started)
        self._to_deliver.put(batch)
        return True

    def _gather(self, batch: Batch[ItemT, ResultT]) -> None:
        """Add what has been decoded meanwhile, as far as the largest batch goes."""
        while True:
            try:
                other = self._to_handle.get_nowait()
            except Empty:
                return
            if other is None or (
                len(batch.records) + len(other.records) > self._settings.max_batch_size
            ):
                self._held = other
                return
            batch.absorb(other)

    def _deliver_next(self) -> bool:
        batch = self._to_deliver.get()
        if batch is None:
            return False
        self._beat()
        delivered = missed = False
        refused: list[tuple[Record, InvalidMessage]] = []
        backoff = Backoff()
        while not batch.abandoned():
            try:
                if not delivered:
                    self._deliver(batch)
                    delivered = True
                    refused = self._refused(batch)
                while refused:
                    bury(self._sender, self._settings, *refused[0], self._beat)
                    del refused[0]
            except SinkUnavailable as error:
                missed = True
                self._wait_for_sink(batch, error, backoff.next())
                if self._closing.is_set():
                    return False
            else:
                # A batch that is given up, or has nothing for the sink, tells nothing about it.
                if missed or batch.result is not None:
                    self._sink_is_up()
                break
        self._done.append(batch)
        self.progress.set()
        return True

    def _deliver(self, batch: Batch[ItemT, ResultT]) -> None:
        """Deliver a batch's result, and note what the sink refuses for good."""
        if batch.result is None:
            return
        started = time.monotonic()
        refused = self._stage.deliver(batch.result, self._beat)
        metrics.SINK_SECONDS.observe(time.monotonic() - started)
        good = [
            place
            for place, outcome in enumerate(batch.outcomes)
            if not isinstance(outcome, InvalidMessage)
        ]
        metrics.RECORDS_OUT.labels(self._stage.sink).inc(len(good) - len(refused))
        for place, error in refused.items():
            batch.outcomes[good[place]] = error

    def _refused(self, batch: Batch[ItemT, ResultT]) -> list[tuple[Record, InvalidMessage]]:
        """Pick out the records to bury, counting all of them: each one's fate is known by now.

        Raises:
            TooManyDeadLetters: it is one too many.
        """
        refused = []
        for record, outcome in zip(batch.records, batch.outcomes, strict=True):
            if isinstance(outcome, InvalidMessage):
                refused.append((record, outcome))
                metrics.DEAD_LETTERS.labels(outcome.reason.value).inc()
                log.warning(
                    "refused",
                    reason=outcome.reason.value,
                    error=outcome,
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                )
            self._limit.count(refused=isinstance(outcome, InvalidMessage))
        return refused

    def _wait_for_sink(
        self, batch: Batch[ItemT, ResultT], error: SinkUnavailable, seconds: float
    ) -> None:
        metrics.SINK_FAILURES.labels(self._stage.sink).inc()
        metrics.SINK_UP.set(0)
        log.warning("sink down", sink=self._stage.sink, error=error, retry_seconds=seconds)
        self._down_since = self._down_since or time.monotonic()
        self.outage = error
        self.progress.set()
        until = time.monotonic() + seconds
        while not batch.abandoned():
            self._beat()
            left = until - time.monotonic()
            if left <= 0 or self._closing.wait(min(left, BEAT_SECONDS)):
                return

    def _sink_is_up(self) -> None:
        metrics.SINK_UP.set(1)
        if self.outage is None:
            return
        self.outage = None
        seconds = time.monotonic() - self._down_since
        self._down_since = 0.0
        log.info("sink up", sink=self._stage.sink, down_seconds=seconds)
