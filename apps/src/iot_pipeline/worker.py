"""The loop that every consuming stage runs.

Poll, hand the records to the stage's threads (see `pipeline`), and commit what they have finished.
In that order, because a commit is a promise that the records need not be read again: whatever
dies, and whenever, the records in hand come again, and since all results are keyed by the image's
id, a second time does no harm.

A lone record goes on at once. When there is a backlog, batches are full. While the sink is down
the batches in hand wait for it, the partitions are paused once enough records wait, and polling
goes on, so that no other member takes them over only to meet the same outage.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from typing import Any, Generic, Protocol, TypeVar

from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    InconsistentGroupProtocolError,
    KafkaError,
    SaslAuthenticationFailedError,
)
from kafka.structs import MemberState, OffsetAndMetadata, TopicPartition

from iot_pipeline import metrics
from iot_pipeline.access import find_problem
from iot_pipeline.errors import ConfigError
from iot_pipeline.intake import Intake
from iot_pipeline.kafka import (
    Sender,
    connect,
    describe_error,
    make_consumer,
    not_allowed,
    wait_for_topics,
)
from iot_pipeline.kafka_internals import UnreadablePartition
from iot_pipeline.pipeline import MAX_IN_FLIGHT, Pipeline, Stage
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import ConsumerSettings

log = Log("worker")

# Short enough to notice SIGTERM and feed the watchdog in time; a poll returns at once when there
# are records.
POLL_SECONDS = 1.0
# While batches are in flight: short enough that what is done is soon committed.
BUSY_POLL_SECONDS = 0.02
# kafka-python 3.0.12 does not return the rest of a fetch that was returned in part before its
# partition was paused and resumed. A fetch is bounded: see `kafka.make_consumer`.
ALL_THAT_WAS_FETCHED = 2**31
COMMIT_TIMEOUT_SECONDS = 10.0
# What is in hand on SIGTERM gets so long; see `Service.left` for all that comes at the end.
DRAIN_SECONDS = 20.0
# Of the time from SIGTERM on, what the drain leaves for committing what it has finished.
COMMIT_RESERVE_SECONDS = 10.0
JOIN_SECONDS = 5.0
CLOSE_TIMEOUT_SECONDS = 5.0
# A thread of the stage that is silent for longer is taken for hung: the watchdog then goes hungry.
SILENCE_SECONDS = 30.0

# A backlog waits so long for the records of a partition that the others are ahead of. The first
# fetch of a topic can take a second where the broker has just started.
STEP_SECONDS = 5.0

# Memory, whatever the records' sizes: those that wait, and those in one batch.
INTAKE_BYTES = 32 * 1024 * 1024
BATCH_BYTES = 8 * 1024 * 1024

# The threads take turns at Python's lock. By default one that computes keeps it for 5 ms, and the
# model's thread would wait as long for its turn several times in each batch.
SWITCH_SECONDS = 0.0005

# Who is not in the group, or hears of failures, asks the broker why, and again after as long.
AWAY_SECONDS = 10.0
# A failure may be followed by another one, so all is not well before there was none for so long.
TROUBLED_SECONDS = 3.0
# From a login that was refused to the next attempt.
SHUT_OUT_SECONDS = 2.0

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


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

    def rejoin(self) -> None:
        """Join the group anew at the next poll."""
        ...

    def highwater(self, partition: TopicPartition) -> int | None:
        """The partition's end as of the last fetch."""
        ...

    def paused(self) -> set[TopicPartition]:
        """Our paused partitions."""
        ...

    def pause(self, *partitions: TopicPartition) -> None:
        """Fetch no more from them."""
        ...

    def resume(self, *partitions: TopicPartition) -> None:
        """Fetch from them again."""
        ...

    def close(self, autocommit: bool, timeout_ms: int) -> None:
        """Leave."""
        ...


class Membership(ConsumerRebalanceListener):  # type: ignore[misc]
    """Keeps what Kafka says about our partitions until the loop asks.

    kafka-python calls it from its I/O thread, but only while the loop is inside `poll` or `close`,
    and must not be kept waiting there. So what is in hand of partitions that are taken away is
    dropped, not finished: their new owner reads it again.
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


class Worker(Generic[ItemT, ResultT]):
    """Runs a stage over a consumer until the service is asked to stop."""

    def __init__(
        self,
        stage: Stage[ItemT, ResultT],
        settings: ConsumerSettings,
        service: Service,
        consumer: Consumer,
        sender: Sender,
        membership: Membership,
    ) -> None:
        self._sink = stage.sink
        self._several_topics = len(stage.topics) > 1
        self._settings = settings
        self._service = service
        self._consumer = consumer
        self._membership = membership
        self._pipeline = Pipeline(stage, settings, sender)
        self._intake = Intake(settings.max_batch_size, INTAKE_BYTES)
        self._polled_at = 0.0
        self._asked_at = time.monotonic()
        self._troubled_at = -math.inf
        # Since when a batch has waited for more records.
        self._filling_since = 0.0
        # What is done but not committed yet: the offsets to go on from.
        self._done: dict[TopicPartition, int] = {}
        # The first record of each partition that is not done.
        self._next: dict[TopicPartition, int] = {}

    def run(self) -> None:
        """Work until the service is asked to stop, then leave with nothing half done.

        Raises:
            TooManyDeadLetters: the limit is reached. The batch in hand is not committed.
            ConfigError: Kafka refuses what we ask of it.
            SaslAuthenticationFailedError: Kafka does not know us any more. Start over, with another
                consumer: this one has given up parts of itself, such as its heartbeat.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        self._pipeline.start()
        try:
            while not self._service.stopping:
                self._turn()
            self._service.leaving("finishing what is in hand")
            self._drain()
        finally:
            self._pipeline.close(self._service.left(JOIN_SECONDS))
            timeout = self._service.left(CLOSE_TIMEOUT_SECONDS)
            self._consumer.close(autocommit=False, timeout_ms=int(timeout * 1000))

    def _turn(self) -> None:
        self._watch()
        if self._sated():
            self._pipeline.progress.wait(BUSY_POLL_SECONDS)
        else:
            self._poll(self._patience())
        self._feed()
        self._settle()
        self._commit()

    def _watch(self) -> None:
        """Feed the watchdog and tell of outages."""
        self._alive()
        outage = self._pipeline.outage
        if outage is not None:
            self._service.status(f"waiting for {self._sink}: {outage}")
        elif not self._member():
            self._tell(self._ask_broker())
        elif time.monotonic() - self._troubled_at > TROUBLED_SECONDS:
            self._service.ready("working")

    def _ask_broker(self) -> str:
        """What keeps the broker from answering, asked now and then: the client hides it."""
        if time.monotonic() - self._asked_at < AWAY_SECONDS:
            return ""
        problem = find_problem(self._settings)
        self._asked_at = time.monotonic()
        return problem

    def _tell(self, problem: str) -> None:
        if problem:
            log.warning("broker unreachable", error=problem)
            self._service.status(f"waiting for the broker: {problem}")
            self._troubled_at = time.monotonic()

    def _alive(self) -> None:
        """Feed the watchdog, unless one of the stage's threads hangs."""
        if self._pipeline.silence() < SILENCE_SECONDS:
            self._service.alive()

    def _sated(self) -> bool:
        """Whether the threads have all that they can take, and the next batch is there too.

        Polling can wait then, but not for long: by polling, a member shows that it is alive.
        """
        return (
            len(self._pipeline.in_flight) >= MAX_IN_FLIGHT
            and len(self._intake) >= self._settings.max_batch_size
            and not self._lacking()
            and time.monotonic() - self._polled_at < POLL_SECONDS
        )

    def _patience(self) -> float:
        """Seconds to wait for records."""
        if not self._member():
            return POLL_SECONDS
        if self._pipeline.in_flight or self._intake or self._done:
            return BUSY_POLL_SECONDS
        return POLL_SECONDS

    def _member(self) -> bool:
        """Whether we are in the group, and it is not being rebalanced."""
        return self._consumer.group_metadata().state is MemberState.STABLE

    def _poll(self, seconds: float) -> None:
        """Take in records that have come."""
        self._polled_at = time.monotonic()
        member = self._member()
        assigned = self._consumer.assignment()
        full, paused = self._intake.full(assigned), self._consumer.paused() & assigned
        if full - paused:
            self._consumer.pause(*(full - paused))
        if paused - full:
            self._consumer.resume(*(paused - full))
        started = time.monotonic()
        try:
            polled = self._consumer.poll(
                timeout_ms=int(seconds * 1000), max_records=ALL_THAT_WAS_FETCHED
            )
        except SaslAuthenticationFailedError:
            raise
        except UnreadablePartition as error:
            log.warning("cannot read on", error=error)
            self._service.status(f"cannot read on at {error}")
            self._troubled_at = time.monotonic()
            self._service.wait(POLL_SECONDS)
            polled = {}
        except KafkaError as error:
            self._raise_if_hopeless(error)
            self._tell(self._ask_broker() or describe_error(error, self._settings))
            self._service.wait(POLL_SECONDS)
            polled = {}
        metrics.POLL_SECONDS.observe(time.monotonic() - started)
        if not member and self._consumer.group_metadata().state is MemberState.REBALANCING:
            self._consumer.rejoin()
        self._forget(self._membership.take_revoked())
        for partition, records in polled.items():
            self._intake.add(partition, records)
            self._next.setdefault(partition, records[0].offset)

    def _forget(self, revoked: set[TopicPartition]) -> None:
        self._intake.drop(revoked)
        self._pipeline.drop(revoked)
        for partition in revoked:
            self._done.pop(partition, None)
            if self._next.pop(partition, None) is not None:
                metrics.LAG.remove(partition.topic, str(partition.partition))

    def _feed(self) -> None:
        """Hand records to the stage's threads as long as these have room."""
        while self._intake and len(self._pipeline.in_flight) < MAX_IN_FLIGHT:
            if self._worth_waiting():
                return
            self._filling_since = 0.0
            self._pipeline.put(self._intake.take(self._settings.max_batch_size, BATCH_BYTES))

    def _worth_waiting(self) -> bool:
        """Whether the batch should wait for records that the broker is known to have.

        A batch of a backlog in several topics waits longer, since nobody waits for it: if it went
        without some of them, the topics would be out of step.
        """
        ends = self._ends()
        lacking = self._intake.lacking(ends)
        if not lacking:
            return False
        self._filling_since = self._filling_since or time.monotonic()
        waited = time.monotonic() - self._filling_since
        if waited < self._settings.max_batch_delay:
            return True
        if not (self._several_topics and self._intake.backlog(ends)):
            return False
        if waited < STEP_SECONDS:
            return True
        log.warning("partitions overdue", partitions=_names(lacking), waited_seconds=waited)
        self._intake.give_up(lacking)
        return False

    def _lacking(self) -> bool:
        return bool(self._intake.lacking(self._ends()))

    def _ends(self) -> dict[TopicPartition, int | None]:
        """Where each of our partitions ends, as far as is known."""
        return {at: self._consumer.highwater(at) for at in self._consumer.assignment()}

    def _settle(self) -> None:
        """Note what has been finished, in order."""
        self._pipeline.progress.clear()
        for batch in self._pipeline.finished():
            for partition, offset in batch.offsets.items():
                self._done[partition] = self._next[partition] = offset
        self._measure()

    def _drain(self) -> None:
        """Finish and commit what is in flight, unless the sink is down."""
        left = self._service.left(DRAIN_SECONDS + COMMIT_RESERVE_SECONDS)
        until = time.monotonic() + left - COMMIT_RESERVE_SECONDS
        while self._pipeline.in_flight and time.monotonic() < until:
            if self._pipeline.outage is not None:
                log.warning(
                    "stopping before the sink is back", batches=len(self._pipeline.in_flight)
                )
                break
            self._alive()
            self._pipeline.progress.wait(BUSY_POLL_SECONDS)
            self._settle()
        self._settle()
        self._commit()

    def _measure(self) -> None:
        for partition in self._consumer.assignment() & self._next.keys():
            end = self._consumer.highwater(partition)
            lag = max(0, (end or 0) - self._next[partition])
            metrics.LAG.labels(partition.topic, str(partition.partition)).set(lag)
        in_flight = self._pipeline.in_flight
        sent = in_flight[0].oldest if in_flight else 0
        metrics.OLDEST_SECONDS.set(max(0.0, time.time() - sent / 1000) if sent > 0 else 0)

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
            raise not_allowed(error, self._settings) from error

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
            timeout = self._service.left(COMMIT_TIMEOUT_SECONDS)
            self._consumer.commit(offsets, timeout_ms=int(timeout * 1000))
        except SaslAuthenticationFailedError:
            raise
        except KafkaError as error:
            self._raise_if_hopeless(error)
            log.warning("commit failed", error=describe_error(error, self._settings))
        else:
            self._done.clear()


def run_stage(
    make_stage: Callable[[Sender], Stage[ItemT, ResultT]],
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
    metrics.SINK_UP.set(1)
    while not service.stopping:
        try:
            _run_with_new_clients(make_stage, settings, service)
        except SaslAuthenticationFailedError as error:
            # What was not committed is read again, and written to where it stands already.
            problem = describe_error(error, settings)
            log.warning("shut out", error=problem, retry_seconds=SHUT_OUT_SECONDS)
            service.status(f"waiting for the broker: {problem}")
            service.wait(SHUT_OUT_SECONDS)


def _run_with_new_clients(
    make_stage: Callable[[Sender], Stage[ItemT, ResultT]],
    settings: ConsumerSettings,
    service: Service,
) -> None:
    sender = connect(lambda: Sender(settings), service, settings)
    if sender is None:
        return
    try:
        stage = make_stage(sender)
        membership = Membership()
        consumer = connect(lambda: make_consumer(settings), service, settings)
        if consumer is None:
            return
        if not wait_for_topics(consumer, stage.topics, service, settings):
            timeout = service.left(CLOSE_TIMEOUT_SECONDS)
            consumer.close(autocommit=False, timeout_ms=int(timeout * 1000))
            return
        consumer.subscribe(topics=list(stage.topics), listener=membership)
        Worker(stage, settings, service, consumer, sender, membership).run()
    finally:
        sender.close(service.left(CLOSE_TIMEOUT_SECONDS))
