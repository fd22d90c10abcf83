"""Connections to Kafka: how clients are made, and sends that are confirmed.

A producer's use::

    sender = connect(lambda: Sender(settings), service, settings)
    sender.send(settings.image_topic, message.key, message.encode())   # RecordTooLarge: not sent
    sender.confirm(service.alive)                                     # SinkUnavailable: try again
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kafka.errors import (
    AuthorizationError,
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    KafkaConfigurationError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RetriableError,
    SaslAuthenticationFailedError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from iot_pipeline.access import find_problem, refused_problem, security_options
from iot_pipeline.errors import ConfigError, RecordTooLarge, SinkUnavailable
from iot_pipeline.kafka_internals import (
    POLL_BYTES,
    Consumer,
    CooperativeStickyAssignor,
    Producer,
)
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import ConsumerSettings, Settings

log = Log("kafka")

# A send is given up after this, so that the loop learns of an outage while it can still pause and
# keep its place in the group. Nothing is lost: the loop sends the batch again.
DELIVERY_TIMEOUT_MS = 20_000
# 2**31 - 1 milliseconds, 24 days, is the longest that Kafka's clients know.
NO_DELIVERY_TIMEOUT_MS = 2**31 - 1
REQUEST_TIMEOUT_MS = 10_000
PARTITION_FETCH_BYTES = 1024 * 1024
# Room in a request for what surrounds the largest record: its framing, and the reason in a dead
# letter.
REQUEST_OVERHEAD_BYTES = 131_072

ClientT = TypeVar("ClientT")


class Backoff:
    """Waiting times that double up to a limit, each shortened by chance.

    The chance keeps clients that lost the same server from returning to it all at once.
    """

    def __init__(self, first: float = 0.5, longest: float = 15.0) -> None:
        self._first = first
        self._longest = longest
        self._attempts = 0

    def next(self) -> float:
        """The seconds to wait before the next attempt."""
        upper = min(self._longest, self._first * 2.0**self._attempts)
        self._attempts += 1
        return upper * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start over: the server answered."""
        self._attempts = 0


def client_options(settings: Settings) -> dict[str, Any]:
    """The arguments that all clients have in common: where to connect, and how securely."""
    return {
        **security_options(settings),
        "bootstrap_servers": settings.servers,
        "client_id": settings.client_id,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        "bootstrap_timeout_ms": REQUEST_TIMEOUT_MS,
        # Whoever waits for a broker that is gone asks the others for its successor only between
        # two attempts.
        "reconnect_backoff_max_ms": 1_000,
        # A mistyped topic must be an error, not a new topic with the broker's defaults.
        "allow_auto_create_topics": False,
        # Prometheus has ours; the client's own would be computed for nobody.
        "metrics_enabled": False,
    }


def describe_error(error: KafkaError, settings: Settings) -> str:
    """An error of a client, with what to look at where we know it."""
    if isinstance(error, SaslAuthenticationFailedError):
        return f"Kafka {refused_problem(error, settings)}"
    return str(error) or type(error).__name__


def not_allowed(error: KafkaError, settings: Settings, topic: str = "") -> ConfigError:
    """What to grant after Kafka has refused something to who we are.

    Args:
        error: the refusal.
        settings: they say who we are.
        topic: the topic that was written to; empty: we were reading.
    """
    names = error.args[0] if error.args else ""
    if topic:
        what = f"write to topic {topic}: grant it WRITE"
    elif isinstance(error, TopicAuthorizationFailedError) and isinstance(names, set):
        what = f"read topic {', '.join(sorted(names))}: grant it READ"
    elif isinstance(error, GroupAuthorizationFailedError):
        group = getattr(settings, "group_id", names)
        what = f"use consumer group {group}: grant it READ on the group, or set IOT_GROUP_ID"
    else:
        what = "do this"
    return ConfigError(f"Kafka does not let {settings.principal} {what} ({error})")


def connect(make: Callable[[], ClientT], service: Service, settings: Settings) -> ClientT | None:
    """Make a client, waiting for the broker as long as it takes.

    A user or certificate that is refused is waited for too: while a password is being changed, one
    side has it before the other.

    Returns:
        The client, or None when the service was asked to stop meanwhile.

    Raises:
        ConfigError: the client refuses its settings.
    """
    backoff = Backoff(first=1.0, longest=15.0)
    while not service.stopping:
        # A client that fails to connect leaves its thread behind and does not say why, so see
        # whether one would be let in before making it.
        problem = find_problem(settings)
        if not problem:
            try:
                return make()
            except (KafkaConfigurationError, AssertionError, ValueError) as error:
                raise ConfigError(f"the Kafka client refuses its settings: {error}") from error
            except KafkaError as error:
                problem = describe_error(error, settings)
        wait = backoff.next()
        log.warning(
            "broker unreachable",
            servers=settings.bootstrap_servers,
            error=problem,
            retry_seconds=wait,
        )
        service.status(f"waiting for the broker: {problem}")
        service.wait(wait)
    return None


def make_consumer(settings: ConsumerSettings) -> Consumer:
    """A consumer that joins its group, once subscribed, and commits nothing by itself.

    Raises:
        KafkaError: no broker answered.
    """
    return Consumer(
        **_reader_options(settings),
        # No stage looks at headers.
        headers=False,
        group_id=settings.group_id,
        group_instance_id=settings.group_instance_id or None,
        # Members keep their partitions through a rebalance, but for those that move.
        partition_assignment_strategy=[CooperativeStickyAssignor],
        # New partitions are noticed within this time.
        metadata_max_age_ms=60_000,
    )


def _reader_options(settings: Settings) -> dict[str, Any]:
    return {
        **client_options(settings),
        # What was sent before the first start is work too.
        "auto_offset_reset": "earliest",
        "enable_auto_commit": False,
        # What waits in the client. A batch that is larger comes alone.
        "max_partition_fetch_bytes": PARTITION_FETCH_BYTES,
        "fetch_max_bytes": POLL_BYTES,
        # What is larger does not fit into a dead letter.
        "max_record_bytes": settings.max_record_bytes + REQUEST_OVERHEAD_BYTES,
    }


def make_reader(settings: Settings, group: str | None = None) -> Consumer:
    """A consumer that joins no group, for reading topics from begin to end.

    Args:
        settings: where the brokers are, and who we are.
        group: one whose committed offsets it may be asked for.

    Raises:
        SinkUnavailable: no broker answers.
    """
    problem = find_problem(settings)
    if not problem:
        try:
            return Consumer(**_reader_options(settings), headers=True, group_id=group)
        except KafkaError as error:
            problem = describe_error(error, settings)
    raise SinkUnavailable(f"Kafka is not reachable: {problem}")


def wait_for_topics(
    consumer: Consumer, topics: Sequence[str], service: Service, settings: Settings
) -> bool:
    """Wait until all topics exist: a subscription to one that does not is silently empty.

    Returns:
        Whether they do; not so when the service was asked to stop meanwhile.
    """
    backoff = Backoff(first=1.0, longest=15.0)
    while not service.stopping:
        problem = ""
        missing: list[str] = []
        try:
            missing = [topic for topic in topics if not consumer.partitions_for_topic(topic)]
        except KafkaError as error:
            problem = describe_error(error, settings)
        if not missing and not problem:
            return True
        wait = backoff.next()
        problem = problem or no_such_topic(missing, settings)
        log.warning("waiting for topics", error=problem, retry_seconds=wait)
        service.status(f"waiting for topics: {problem}")
        service.wait(wait)
    return False


def no_such_topic(missing: Sequence[str], settings: Settings) -> str:
    """Why topics do not show: Kafka hides those that we have no business with."""
    names = ", ".join(missing)
    if settings.uses_tls:
        return f"no such topic, or {settings.principal} may not read it: {names}"
    return f"no such topic: {names}"


class Sender:
    """Sends records and makes sure that each was taken.

    `send` hands a record to the client, `confirm` waits until the broker has taken all of them.
    The client is idempotent with acks=all: its own retries never write a record twice.
    """

    def __init__(
        self,
        settings: Settings,
        delivery_timeout_ms: int = DELIVERY_TIMEOUT_MS,
        *,
        linger_ms: int = 0,
        batch_size: int = 16_384,
        compression: str = "none",
    ) -> None:
        """Connect.

        Args:
            settings: which brokers, and how large a record may be.
            delivery_timeout_ms: after this a record is given up. With NO_DELIVERY_TIMEOUT_MS the
                client goes on with what it was handed, also after an error of `send`.
            linger_ms: how long a record waits for others to travel with.
            batch_size: bytes, before compression, that travel together to one partition.
            compression: none, gzip, lz4 or zstd.

        Raises:
            KafkaError: no broker answered.
        """
        self._settings = settings
        self._max_record_bytes = settings.max_record_bytes
        self._delivery_timeout_ms = delivery_timeout_ms
        self._batching = {
            "linger_ms": linger_ms,
            # A larger batch might exceed the topic's limit, which is made for the largest record.
            "batch_size": min(batch_size, settings.max_record_bytes),
            "compression_type": None if compression == "none" else compression,
        }
        self._producer = self._make_client()
        self._spoiled = False
        self._pending: deque[tuple[str, bytes | None, Any]] = deque()

    def _make_client(self) -> Any:
        return Producer(
            **client_options(self._settings),
            acks="all",
            enable_idempotence=True,
            delivery_timeout_ms=self._delivery_timeout_ms,
            max_block_ms=REQUEST_TIMEOUT_MS,
            max_request_size=self._max_record_bytes + REQUEST_OVERHEAD_BYTES,
            # By its source, kafka-python puts back in reverse order what a lost connection left
            # unanswered. With one in flight there is no order to lose, and more were not faster.
            max_in_flight_requests_per_connection=1,
            **self._batching,
        )

    def _renew(self) -> None:
        """Replace the client after the broker has refused a record for good.

        The refused record leaves a gap in the sequence that makes a client idempotent, so
        kafka-python's then answers every record with the same refusal.

        Raises:
            SinkUnavailable: no broker would let a new one in.
        """
        problem = find_problem(self._settings)
        if problem:
            raise SinkUnavailable(f"Kafka is not reachable: {problem}")
        self.close(timeout=1.0)
        self._producer = self._make_client()
        self._spoiled = False

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
        *,
        limited: bool = True,
        partition: int | None = None,
    ) -> None:
        """Hand over one record.

        Args:
            topic: where to.
            key: decides the partition, unless that is given.
            value: the payload.
            headers: names and values.
            limited: whether IOT_MAX_RECORD_BYTES holds. A dead letter carries a record that came
                through Kafka already and its reason beside it, so it may be larger.
            partition: where to.

        Raises:
            RecordTooLarge: it exceeds IOT_MAX_RECORD_BYTES, and was not sent.
            SinkUnavailable: the broker does not answer.
            ConfigError: the topic does not exist or may not be written to.
        """
        size = len(key or b"") + len(value or b"")
        if headers:
            size += sum(len(name) + len(text) for name, text in headers)
        if limited and size > self._max_record_bytes:
            raise RecordTooLarge(
                f"a record of {size} bytes exceeds IOT_MAX_RECORD_BYTES={self._max_record_bytes}"
            )
        try:
            if self._spoiled:
                self._renew()
            future = self._producer.send_any(topic, key, value, headers, partition)
        except KafkaTimeoutError as error:
            self._give_up()
            problem = find_problem(self._settings) or (
                f"it says nothing about topic {topic}: is the broker up, and does the topic "
                f"exist? ({error})"
            )
            raise SinkUnavailable(f"Kafka is not reachable: {problem}") from error
        except KafkaError as error:
            self._give_up()
            raise self._explain(error, topic) from error
        self._pending.append((topic, key, future))

    def _give_up(self) -> None:
        """After an error of `send`: what was handed over before will be sent again."""
        if self._delivery_timeout_ms < NO_DELIVERY_TIMEOUT_MS:
            self._pending.clear()

    def confirm(
        self,
        alive: Callable[[], None],
        taken: Callable[[bytes | None], None] | None = None,
        *,
        leave: int = 0,
    ) -> None:
        """Wait until the broker has taken the records handed over, calling `alive` meanwhile.

        Args:
            alive: called at least once a second while there is something to wait for.
            taken: called with the key of each record that the broker has taken, in the order in
                which they were handed over, also when another fails.
            leave: how many of the last ones need not be taken yet. After a failure none is left.

        Raises:
            SinkUnavailable: at least one was not taken. Send again all that `taken` did not name:
                one that was taken after all arrives twice, which the keys make harmless.
            RecordTooLarge: the topic's own limit is lower than ours. Others that were not taken
                may be fit: kafka-python answers for them with the same error.
            ConfigError: the topic does not exist or may not be written to.
        """
        pending = self._pending
        failures: list[Exception] = []
        deadline = time.monotonic() + (self._delivery_timeout_ms + REQUEST_TIMEOUT_MS) / 1000
        while len(pending) > (0 if failures else leave):
            topic, key, future = pending[0]
            try:
                # Most are done by the time that they are looked at.
                if not future.is_done or future.exception is not None:
                    self._wait(future, deadline, alive)
            except KafkaError as error:
                self._note(error, topic, failures)
            except BaseException:
                self._give_up()
                raise
            else:
                if taken:
                    taken(key)
            pending.popleft()
        # What a retry cannot mend must be heard of before what it can.
        for kind in (ConfigError, RecordTooLarge, SinkUnavailable):
            for failure in failures:
                if isinstance(failure, kind):
                    raise failure

    def _note(self, error: KafkaError, topic: str, failures: list[Exception]) -> None:
        """Add what a record was not taken for to the failures, and judge the client by it."""
        # A client that gave a record up may send to that partition no more, and never say so.
        gave_up = isinstance(error, KafkaTimeoutError)
        self._spoiled |= gave_up or not isinstance(error, RetriableError)
        # To explain it asks the brokers, which takes seconds where none answers. What was told of
        # the first one holds for the others.
        if not (failures and gave_up):
            failures.append(self._explain(error, topic))

    @staticmethod
    def _wait(future: Any, deadline: float, alive: Callable[[], None]) -> None:
        while True:
            alive()
            try:
                future.get(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            except KafkaTimeoutError:
                if future.is_done or time.monotonic() >= deadline:
                    raise
            else:
                return

    def close(self, timeout: float = 5.0) -> None:
        """Leave. What was not confirmed may be lost."""
        try:
            self._producer.close(timeout=timeout)
        except KafkaTimeoutError:
            self._producer.abandon(timeout)

    def _explain(self, error: KafkaError, topic: str) -> Exception:
        text = str(error) or type(error).__name__
        if isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError):
            return RecordTooLarge(
                f"{topic} refuses a record as too large: raise the topic's max.message.bytes or "
                f"lower IOT_MAX_RECORD_BYTES ({text})"
            )
        if isinstance(error, UnknownTopicOrPartitionError):
            return SinkUnavailable(
                f"topic {topic} does not exist: make it, or set its name ({text})"
            )
        # Who may write to no topic at all gets no id as an idempotent producer. The library says so
        # in the text of an error that is of no kind.
        without_id = ClusterAuthorizationFailedError.__name__ in text
        if without_id or isinstance(error, AuthorizationError):
            return not_allowed(error, self._settings, topic)
        problem = ""
        if isinstance(error, KafkaTimeoutError):
            problem = find_problem(self._settings)
        problem = problem or describe_error(error, self._settings)
        return SinkUnavailable(f"Kafka did not take a record for {topic}: {problem}")
