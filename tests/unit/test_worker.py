"""The loop: nothing is committed before its sink has confirmed, whatever goes wrong and when."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kafka.errors import (
    CommitFailedError,
    FencedInstanceIdError,
    GroupAuthorizationFailedError,
    KafkaTimeoutError,
    NodeNotReadyError,
    RebalanceInProgressError,
    SaslAuthenticationFailedError,
    TopicAuthorizationFailedError,
)
from kafka.structs import MemberState, OffsetAndMetadata, TopicPartition

from iot_pipeline import metrics, produce, worker
from iot_pipeline import service as service_module
from iot_pipeline.dead_letters import DeadLetterLimit
from iot_pipeline.errors import (
    ConfigError,
    InvalidMessage,
    Reason,
    RecordTooLarge,
    SinkUnavailable,
    TooManyDeadLetters,
)
from iot_pipeline.pipeline import MAX_IN_FLIGHT, Beat
from iot_pipeline.schema import DeadLetter, Record
from iot_pipeline.service import Service
from iot_pipeline.settings import InferSettings
from iot_pipeline.stores import mongodb
from iot_pipeline.worker import Membership, Worker

ONE = TopicPartition("iot-topic", 0)
TWO = TopicPartition("iot-topic", 1)
ROOT = Path(__file__).parents[2]
FETCHED = 3  # records of a partition that come at once


@dataclass
class KafkaRecord:
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int = 1_700_000_000_000


class Log:
    """What happened, in order, across all parts."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def add(self, name: str, value: Any = None) -> None:
        self.events.append((name, value))

    def named(self, name: str) -> list[Any]:
        return [value for event, value in self.events if event == name]

    def names(self) -> list[str]:
        return [event for event, _ in self.events]


class FakeConsumer:
    """A consumer over partitions held in memory, with the client's rules for pausing.

    It stops the service once everything is committed.
    """

    def __init__(self, log: Log, membership: Membership, service: Service) -> None:
        self.log = log
        self.membership = membership
        self.service = service
        self.partitions: dict[TopicPartition, list[bytes]] = defaultdict(list)
        self.positions: dict[TopicPartition, int] = {}
        self.paused_partitions: set[TopicPartition] = set()
        self.hidden: set[TopicPartition] = set()
        self.unknown: set[TopicPartition] = set()
        self.give_up_at = time.monotonic() + 10
        self.committed: dict[TopicPartition, int] = {}
        self.commit_errors: list[Exception] = []
        self.poll_errors: list[Exception] = []
        self.on_poll: list[Callable[[], None]] = []
        self.state = MemberState.STABLE

    def add(self, partition: TopicPartition, *values: bytes) -> None:
        self.partitions[partition].extend(values)
        self.positions.setdefault(partition, 0)

    def assign(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            self.positions[partition] = self.committed.get(partition, 0)
        self.membership.on_partitions_assigned(list(partitions))

    def revoke(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            del self.positions[partition]
            self.paused_partitions.discard(partition)
        self.membership.on_partitions_revoked(set(partitions))

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        assert timeout_ms >= 0
        self.log.add("poll", set(self.paused_partitions))
        if self.on_poll:
            self.on_poll.pop(0)()
        if self.poll_errors:
            raise self.poll_errors.pop(0)
        polled: dict[TopicPartition, list[Any]] = {}
        for partition, start in list(self.positions.items()):
            if partition in self.paused_partitions | self.hidden:
                continue
            assert (
                max_records >= FETCHED
            )  # as much as was fetched, or kafka-python forgets the rest
            values = self.partitions[partition][start : start + FETCHED]
            if values:
                polled[partition] = [
                    KafkaRecord(partition.topic, partition.partition, start + place, b"key", value)
                    for place, value in enumerate(values)
                ]
                self.positions[partition] = start + len(values)
        if not polled:
            time.sleep(min(timeout_ms / 1000, 0.001))
        ends = {partition: len(self.partitions[partition]) for partition in self.positions}
        if ends == {partition: self.committed.get(partition, 0) for partition in ends}:
            self.service.stop()
        if time.monotonic() > self.give_up_at:
            self.service.stop()
        return polled

    def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata], timeout_ms: int) -> None:
        assert timeout_ms > 0
        if self.commit_errors:
            raise self.commit_errors.pop(0)
        plain = {partition: offset.offset for partition, offset in offsets.items()}
        self.log.add("commit", plain)
        self.committed |= plain

    def assignment(self) -> set[TopicPartition]:
        return set(self.positions)

    def group_metadata(self) -> Any:
        return SimpleNamespace(state=self.state)

    def rejoin(self) -> None:
        self.log.add("rejoin")
        self.state = MemberState.STABLE

    def highwater(self, partition: TopicPartition) -> int | None:
        return None if partition in self.unknown else len(self.partitions[partition])

    def paused(self) -> set[TopicPartition]:
        return set(self.paused_partitions)

    def pause(self, *partitions: TopicPartition) -> None:
        assert set(partitions) <= self.assignment()
        self.paused_partitions |= set(partitions)

    def resume(self, *partitions: TopicPartition) -> None:
        assert set(partitions) <= self.assignment()
        self.paused_partitions -= set(partitions)

    def close(self, autocommit: bool, timeout_ms: int) -> None:
        assert not autocommit
        assert timeout_ms > 0
        self.log.add("close", timeout_ms)


class FakeSender:
    """Takes dead letters; refuses as told."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.errors: list[Exception] = []
        self.too_large: int | None = None
        self._pending: list[Any] = []

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
        *,
        limited: bool = True,
    ) -> None:
        assert topic == "iot-dead-letter"
        assert not limited
        self._pending.append((key, value, DeadLetter.from_headers(headers)))

    def confirm(self, alive: Callable[[], None]) -> None:
        alive()
        pending, self._pending = self._pending, []
        if self.errors:
            raise self.errors.pop(0)
        for letter in pending:
            if self.too_large is not None and len(letter[1]) > self.too_large:
                raise RecordTooLarge("too large for the topic")
            self.log.add("buried", letter)


class FakeStage:
    """Refuses what starts with `bad`; its sink fails as told."""

    topics: Sequence[str] = ("iot-topic",)
    sink = "memory"

    def __init__(self, log: Log) -> None:
        self.log = log
        self.errors: list[Exception] = []
        self.beat: Beat
        self.on_handle: list[Callable[[], None]] = []
        self.on_deliver: list[Callable[[], None]] = []

    def decode(self, record: Record) -> bytes:
        assert record.value is not None
        if record.value.startswith(b"bad"):
            raise InvalidMessage(Reason.INVALID_JSON, "not JSON")
        return record.value

    def handle(self, items: Sequence[bytes], beat: Beat) -> list[bytes]:
        self.beat = beat
        self.log.add("handle", list(items))
        if self.on_handle:
            self.on_handle.pop(0)()
        return list(items)

    def deliver(self, result: list[bytes], beat: Beat) -> Mapping[int, InvalidMessage]:
        beat()
        self.log.add("try", result)
        if self.on_deliver:
            self.on_deliver.pop(0)()
        if self.errors:
            raise self.errors.pop(0)
        self.log.add("written", [value for value in result if value != b"refused by sink"])
        return {
            place: InvalidMessage(Reason.REFUSED_BY_DATABASE, "no")
            for place, value in enumerate(result)
            if value == b"refused by sink"
        }


@dataclass
class Rig:
    log: Log
    service: Service
    membership: Membership
    consumer: FakeConsumer
    sender: FakeSender
    stage: FakeStage
    settings: InferSettings

    def run(self) -> DeadLetterLimit:
        worker = Worker(
            self.stage,
            self.settings,
            self.service,
            self.consumer,
            self.sender,  # type: ignore[arg-type] # only what the loop uses of it
            self.membership,
        )
        worker.run()
        return worker._pipeline._limit


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(random, "uniform", lambda _low, _high: 0.01)  # back-off, in no time
    settings = InferSettings(group_instance_id="test")
    log = Log()
    service = Service(settings)
    membership = Membership()
    consumer = FakeConsumer(log, membership, service)
    yield Rig(log, service, membership, consumer, FakeSender(log), FakeStage(log), settings)
    metrics.LAG.clear()
    service._notifier.close()


def test_a_batch_is_committed_after_it_is_written(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"b")
    rig.consumer.add(TWO, b"c")
    rig.run()
    assert rig.log.named("written") == [[b"a", b"b", b"c"]]
    assert rig.consumer.committed == {ONE: 2, TWO: 1}
    names = rig.log.names()
    assert names.index("written") < names.index("commit") < names.index("close")


def test_no_batch_is_larger_than_set(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_size=2)
    rig.consumer.add(ONE, b"a", b"b", b"c", b"d", b"e")
    rig.run()
    assert rig.log.named("written") == [[b"a", b"b"], [b"c", b"d"], [b"e"]]
    commits = [commit[ONE] for commit in rig.log.named("commit")]
    assert commits == sorted(commits)
    assert set(commits) <= {2, 4, 5}
    assert commits[-1] == 5


def test_nothing_is_committed_while_the_sink_is_down(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"b")
    rig.stage.errors = [SinkUnavailable("down")] * 3
    rig.run()
    names = rig.log.names()
    assert rig.log.named("try") == [[b"a", b"b"]] * 4  # the same batch each time
    assert names.index("commit") > names.index("written")
    assert rig.consumer.committed == {ONE: 2}


def test_while_the_sink_is_down_polling_goes_on_and_full_partitions_are_paused(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_size=2)
    values = [b"%d" % number for number in range(100)]
    rig.consumer.add(ONE, *values)
    rig.stage.errors = [SinkUnavailable("down")] * 20
    taken: list[int] = []
    rig.stage.on_deliver = [lambda: taken.append(rig.consumer.positions[ONE])] * 20
    rig.run()
    names = rig.log.names()
    between = rig.log.events[names.index("try") : names.index("written")]
    polls = [paused for name, paused in between if name == "poll"]
    assert polls
    assert polls[-1] == {ONE}
    assert max(taken) <= 2 * MAX_IN_FLIGHT + 2 + FETCHED
    assert [value for batch in rig.log.named("written") for value in batch] == values
    assert rig.consumer.committed == {ONE: 100}


def test_a_partition_that_comes_during_an_outage_waits_and_loses_nothing(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.partitions[TWO] = [b"b", b"c"]
    rig.stage.errors = [SinkUnavailable("down")] * 2
    rig.consumer.on_poll = [lambda: None, lambda: rig.consumer.assign(TWO)]
    rig.run()
    assert [value for batch in rig.log.named("written") for value in batch] == [b"a", b"b", b"c"]
    assert rig.consumer.committed == {ONE: 1, TWO: 2}


def test_a_revoked_partition_s_records_are_left_to_their_new_owner(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.add(TWO, b"b")
    rig.stage.errors = [SinkUnavailable("down")]
    rig.consumer.on_poll = [lambda: None, lambda: rig.consumer.revoke(TWO)]
    rig.run()
    assert rig.consumer.committed == {ONE: 1}


def test_a_batch_whose_partitions_are_all_revoked_is_dropped(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.add(TWO)
    rig.stage.errors = [SinkUnavailable("down")] * 1_000_000
    rig.consumer.on_poll = [lambda: None, lambda: rig.consumer.revoke(ONE)]
    started = time.monotonic()
    rig.run()
    assert time.monotonic() < rig.consumer.give_up_at, time.monotonic() - started
    assert rig.log.named("written") == []
    assert rig.consumer.committed == {}


def test_a_sink_is_up_once_it_takes_something_and_not_before(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch that was given up says nothing of the sink, nor does one that it need not take."""
    rig.settings = replace(rig.settings, max_batch_size=1)
    rig.consumer.add(ONE, b"a")
    rig.consumer.add(TWO)
    rig.stage.errors = [SinkUnavailable("down")] * 1_000_000
    seen: list[tuple[float, bool]] = []

    def look() -> None:
        seen.append((metrics.SINK_UP._value.get(), "sink up" in caplog.text))

    def recover() -> None:
        look()
        rig.stage.errors = []

    def lose_it() -> None:
        rig.consumer.revoke(ONE)
        rig.consumer.add(TWO, b"bad", b"b", b"c")

    rig.stage.on_deliver = [
        lambda: rig.consumer.on_poll.append(lose_it),
        *[lambda: None if rig.consumer.assignment() == {ONE, TWO} else recover()] * 1000,
    ]
    with caplog.at_level("INFO", "iot_pipeline"):
        rig.run()
        look()
    assert [value for _, value, _ in rig.log.named("buried")] == [b"bad"]
    assert rig.consumer.committed == {TWO: 3}
    assert (seen[0], seen[-1]) == ((0, False), (1, True))
    assert caplog.text.count("sink up") == 1


def test_an_offset_is_not_committed_for_a_partition_that_is_gone(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.add(TWO, b"b")
    rig.consumer.commit_errors = [CommitFailedError()]
    rig.stage.on_deliver = [
        lambda: rig.consumer.on_poll.append(lambda: rig.consumer.revoke(TWO)),
    ]
    rig.run()
    assert all(TWO not in commit for commit in rig.log.named("commit")[1:])
    assert rig.consumer.committed[ONE] == 1


def test_sigterm_lets_the_batch_in_hand_finish_and_commits_it(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    rig.stage.on_handle = [lambda: os.kill(os.getpid(), signal.SIGTERM)]
    try:
        with rig.service:
            rig.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert rig.log.named("written") == [[b"a"]]
    assert rig.consumer.committed == {ONE: 1}
    assert rig.log.names()[-1] == "close"


def test_stopping_while_the_sink_is_down_commits_nothing(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.stage.errors = [SinkUnavailable("down")] * 1_000_000
    rig.stage.on_deliver = [rig.service.stop]
    rig.run()
    assert rig.log.named("written") == []
    assert rig.consumer.committed == {}
    assert rig.log.names()[-1] == "close"


def test_stopping_during_an_outage_commits_only_what_was_done(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_size=1)
    rig.consumer.add(ONE, b"a", b"b")

    def fail_from_now_on() -> None:
        rig.stage.errors = [SinkUnavailable("down")] * 1_000_000
        rig.consumer.on_poll = [rig.service.stop]

    rig.stage.on_deliver = [lambda: None, fail_from_now_on]
    rig.run()
    assert rig.log.named("written") == [[b"a"]]
    assert rig.consumer.committed == {ONE: 1}


def test_what_hangs_at_the_end_is_not_waited_for_beyond_the_deadline(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(worker, "COMMIT_RESERVE_SECONDS", 0.3)
    rig.settings = replace(rig.settings, max_batch_size=1)
    rig.consumer.add(ONE, b"a", b"b")
    over = threading.Event()

    def hang() -> None:
        rig.service.stop()
        over.wait(10)

    rig.stage.on_deliver = [lambda: None, hang]
    try:
        rig.run()
        assert not over.is_set()
    finally:
        over.set()
    assert rig.consumer.committed == {ONE: 1}
    # All that was left, for leaving the group.
    assert rig.log.named("close") == [int(service_module.LAST_SECONDS * 1000)]


def test_the_end_fits_into_what_systemd_allows() -> None:
    unit = (ROOT / "roles/pipeline_app/templates/service.j2").read_text()
    allowed = int(unit.partition("TimeoutStopSec=")[2].split()[0])
    # A sender takes its time twice where the broker does not answer; one poll may be under way.
    most = max(worker.CLOSE_TIMEOUT_SECONDS, produce.CLOSE_TIMEOUT) + mongodb.CLOSE_SECONDS
    assert service_module.STOP_SECONDS + most + worker.POLL_SECONDS < allowed
    assert produce.LAST_CHANCE < service_module.STOP_SECONDS
    assert worker.COMMIT_RESERVE_SECONDS < service_module.STOP_SECONDS


def test_decoding_runs_ahead_of_the_model(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_size=1)
    rig.consumer.add(ONE, b"a", b"b")
    decoded = threading.Event()
    decode = rig.stage.decode

    def watched(record: Record) -> bytes:
        if record.value == b"b":
            decoded.set()
        return decode(record)

    rig.stage.decode = watched  # type: ignore[method-assign] # to see when
    waited: list[bool] = []
    rig.stage.on_handle = [lambda: waited.append(decoded.wait(5))]
    rig.run()
    assert waited == [True]


def test_the_model_does_not_wait_for_the_sink_and_nothing_is_committed_early(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_size=1)
    rig.consumer.add(ONE, b"a", b"b")
    handled = threading.Event()
    seen: list[tuple[bool, dict[TopicPartition, int]]] = []
    rig.stage.on_handle = [lambda: None, handled.set]
    rig.stage.on_deliver = [lambda: seen.append((handled.wait(5), dict(rig.consumer.committed)))]
    rig.run()
    assert seen == [(True, {})]
    assert rig.log.named("written") == [[b"a"], [b"b"]]
    assert rig.consumer.committed == {ONE: 2}


def test_what_comes_while_the_model_works_is_handled_together(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    more = [lambda value=value: rig.consumer.add(ONE, value) for value in (b"b", b"c")]
    decoded = threading.Event()
    decode = rig.stage.decode

    def watched(record: Record) -> bytes:
        if record.value == b"c":
            decoded.set()
        return decode(record)

    def work() -> None:
        rig.consumer.on_poll += more
        assert decoded.wait(5)
        time.sleep(0.05)

    rig.stage.decode = watched  # type: ignore[method-assign] # to see when
    rig.stage.on_handle = [work]
    rig.run()
    assert rig.log.named("handle") == [[b"a"], [b"b", b"c"]]
    assert rig.consumer.committed == {ONE: 3}


def test_a_lone_record_is_not_held_back(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_delay=60.0)
    rig.consumer.add(ONE, b"a")
    rig.consumer.add(TWO)
    rig.run()
    assert rig.log.named("written") == [[b"a"]]
    assert time.monotonic() < rig.consumer.give_up_at


def test_a_batch_waits_for_records_that_the_broker_is_known_to_have(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_delay=60.0)
    rig.consumer.add(ONE, b"a")
    rig.consumer.add(TWO, b"b")
    # So that there is something to compare the partition's end with.
    rig.consumer.on_poll = [
        lambda: None,
        lambda: rig.consumer.hidden.add(TWO),
        lambda: rig.consumer.add(TWO, b"d"),
        lambda: rig.consumer.add(ONE, b"c"),
        *[lambda: None] * 20,
        rig.consumer.hidden.clear,
    ]
    rig.run()
    assert rig.log.named("written") == [[b"a", b"b"], [b"c", b"d"]]


def test_a_batch_does_not_wait_longer_than_set(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_delay=0.05)
    rig.consumer.add(ONE, b"a")
    rig.consumer.add(TWO, b"b")
    rig.consumer.on_poll = [
        lambda: None,
        lambda: rig.consumer.hidden.add(TWO),
        lambda: rig.consumer.add(TWO, b"d"),
        lambda: rig.consumer.add(ONE, b"c"),
    ]
    rig.stage.on_deliver = [lambda: None, rig.consumer.hidden.clear]
    rig.run()
    assert rig.log.named("written") == [[b"a", b"b"], [b"c"], [b"d"]]


def test_a_backlog_of_two_topics_waits_until_they_are_in_step(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_batch_delay=0.0, max_batch_size=4)
    images, predictions = ONE, TopicPartition("iot-predictions", 0)
    rig.stage.topics = ("iot-topic", "iot-predictions")
    rig.consumer.add(images, b"1", b"2", b"3", b"4", b"5", b"6")
    rig.consumer.add(predictions, b"a", b"b", b"c", b"d", b"e", b"f")
    rig.consumer.unknown = {images}
    rig.consumer.hidden = {images}

    def show() -> None:
        rig.consumer.hidden.clear()
        rig.consumer.unknown.clear()

    rig.consumer.on_poll = [*[lambda: None] * 20, show]
    rig.run()
    written = [value for batch in rig.log.named("written") for value in batch]
    assert sorted(written[:4]) == [b"1", b"2", b"a", b"b"]
    assert sorted(written[4:8]) == [b"3", b"4", b"c", b"d"]


def test_a_partition_that_does_not_come_is_waited_for_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "STEP_SECONDS", 0.05)
    rig.settings = replace(rig.settings, max_batch_delay=0.0, max_batch_size=2)
    lost, there = ONE, TopicPartition("iot-predictions", 0)
    rig.stage.topics = ("iot-topic", "iot-predictions")
    rig.consumer.add(lost, b"1")
    rig.consumer.unknown = rig.consumer.hidden = {lost}
    values = [b"%d" % number for number in range(20)]
    rig.consumer.add(there, *values)
    decode = rig.stage.decode

    def stop_at_the_last(record: Record) -> bytes:
        if record.value == values[-1]:
            rig.service.stop()
        return decode(record)

    rig.stage.decode = stop_at_the_last  # type: ignore[method-assign] # to know when
    rig.run()
    assert [value for batch in rig.log.named("written") for value in batch] == values
    assert caplog.text.count("partitions overdue partitions=iot-topic-0") == 1


def test_a_commit_that_fails_is_tried_again(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.commit_errors = [KafkaTimeoutError(), CommitFailedError()]
    rig.run()
    assert rig.log.named("written") == [[b"a"]]
    assert rig.consumer.committed == {ONE: 1}


def test_a_bad_record_is_buried_untouched_and_the_next_is_handled(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"bad one", b"c")
    rig.run()
    assert rig.log.named("written") == [[b"a", b"c"]]
    [(key, value, letter)] = rig.log.named("buried")
    assert (key, value) == (b"key", b"bad one")
    assert (letter.reason, letter.stage) == ("invalid-json", "iot-inference")
    assert (letter.topic, letter.partition, letter.offset) == ("iot-topic", 0, 1)
    assert rig.consumer.committed == {ONE: 3}


def test_a_record_the_sink_refuses_is_buried_and_the_rest_stays_written(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"refused by sink", b"c")
    rig.run()
    assert rig.log.named("written") == [[b"a", b"c"]]
    [(_, value, letter)] = rig.log.named("buried")
    assert value == b"refused by sink"
    assert letter.reason == "refused-by-database"
    assert letter.offset == 1
    assert rig.consumer.committed == {ONE: 3}


def test_a_dead_letter_is_committed_only_once_it_is_confirmed(rig: Rig) -> None:
    rig.consumer.add(ONE, b"bad")
    rig.sender.errors = [SinkUnavailable("broker down")] * 2
    rig.run()
    names = rig.log.names()
    assert names.count("buried") == 1
    assert names.index("buried") < names.index("commit")


def test_work_is_not_repeated_for_a_dead_letter_that_waits(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"bad 1", b"bad 2")
    rig.sender.errors = [SinkUnavailable("broker down")]
    rig.run()
    assert rig.log.named("written") == [[b"a"]]
    assert [value for _, value, _ in rig.log.named("buried")] == [b"bad 1", b"bad 2"]


def test_a_dead_letter_too_large_for_its_topic_goes_without_its_value(rig: Rig) -> None:
    rig.consumer.add(ONE, b"bad" * 1000, b"b")
    rig.sender.too_large = 100
    rig.run()
    [(key, value, letter)] = rig.log.named("buried")
    assert (key, value, letter.offset) == (b"key", b"", 0)
    assert rig.consumer.committed == {ONE: 2}


def test_too_many_bad_records_in_a_row_stop_the_service_uncommitted(rig: Rig) -> None:
    rig.settings = replace(rig.settings, max_consecutive_dead_letters=3)
    rig.consumer.add(ONE, b"a", b"bad 1", b"bad 2", b"bad 3")
    with pytest.raises(TooManyDeadLetters, match="IOT_MAX_CONSECUTIVE_DEAD_LETTERS"):
        rig.run()
    assert rig.consumer.committed == {}
    assert rig.log.names()[-1] == "close"


@pytest.mark.parametrize("value", [b"bad", b"refused by sink"])
def test_records_that_come_alone_are_too_many_in_the_end(rig: Rig, value: bytes) -> None:
    rig.settings = replace(rig.settings, max_batch_size=1, max_consecutive_dead_letters=30)
    rig.consumer.add(ONE, b"a", *[value] * 60)
    with pytest.raises(TooManyDeadLetters, match="30 records in a row"):
        rig.run()
    assert rig.consumer.committed[ONE] <= 30


def test_a_record_counts_once_however_often_its_batch_is_delivered(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"bad", b"refused by sink")
    rig.stage.errors = [SinkUnavailable("down")] * 3
    rig.sender.errors = [SinkUnavailable("broker down")] * 3
    limit = rig.run()
    assert list(limit._window) == [False, True, True]
    assert len(rig.log.named("buried")) == 2


def test_a_batch_that_is_given_up_counts_for_nothing(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"bad")
    rig.consumer.add(TWO)
    rig.stage.errors = [SinkUnavailable("down")] * 1_000_000
    rig.consumer.on_poll = [lambda: None, lambda: rig.consumer.revoke(ONE)]
    assert not rig.run()._window


def test_the_dead_letter_limit_counts_a_row() -> None:
    limit = DeadLetterLimit(3, 1.0)
    for refused in [True, True, False, True, True]:
        limit.count(refused=refused)
    with pytest.raises(TooManyDeadLetters, match="3 records in a row"):
        limit.count(refused=True)


def test_the_dead_letter_limit_counts_a_share() -> None:
    limit = DeadLetterLimit(0, 0.5)
    for number in range(199):
        limit.count(refused=number % 2 == 0)
    limit.count(refused=False)
    with pytest.raises(TooManyDeadLetters, match="101 of the last 201"):
        limit.count(refused=True)


def test_the_dead_letter_limit_forgets_what_is_long_past() -> None:
    limit = DeadLetterLimit(0, 0.5)
    for _ in range(600):
        limit.count(refused=False)
    for _ in range(400):
        limit.count(refused=True)
    for _ in range(500):
        limit.count(refused=False)
    assert limit._refused_in_window == 400
    for _ in range(500):
        limit.count(refused=False)
    assert limit._refused_in_window == 0


def test_the_dead_letter_limit_can_be_switched_off() -> None:
    limit = DeadLetterLimit(0, 1.0)
    for _ in range(2000):
        limit.count(refused=True)


def test_a_poll_that_fails_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    rig.consumer.add(ONE, b"a")
    rig.consumer.poll_errors = [NodeNotReadyError(), NodeNotReadyError()]
    rig.run()
    assert rig.consumer.committed == {ONE: 1}


def test_a_rebalance_that_the_client_has_forgotten_is_begun_anew(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.commit_errors = [RebalanceInProgressError()]
    rig.consumer.on_poll = [lambda: setattr(rig.consumer, "state", MemberState.REBALANCING)]
    rig.run()
    assert rig.log.named("rejoin") == [None]
    assert rig.consumer.committed == {ONE: 1}


def test_a_member_whose_name_was_taken_stops_and_says_so(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.commit_errors = [FencedInstanceIdError()]
    with pytest.raises(ConfigError, match="IOT_GROUP_INSTANCE_ID"):
        rig.run()


def test_an_unforeseen_error_commits_nothing_and_leaves(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.stage.errors = [ZeroDivisionError("a bug")]
    with pytest.raises(ZeroDivisionError):
        rig.run()
    assert rig.consumer.committed == {}
    assert rig.log.names()[-1] == "close"


def test_lag_and_age_are_measured(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a", b"b", b"c")
    seen: list[float] = []

    def look() -> None:
        seen.append(metrics.LAG.labels("iot-topic", "0")._value.get())
        seen.append(metrics.OLDEST_SECONDS._value.get())

    rig.stage.on_handle = [look]
    rig.run()
    assert seen[0] == 3
    assert seen[1] > 1_000_000
    assert metrics.LAG.labels("iot-topic", "0")._value.get() == 0
    assert metrics.OLDEST_SECONDS._value.get() == 0


class Systemd:
    """Stands at the other end of NOTIFY_SOCKET, and reads all the while: it holds few messages."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._closed.wait(0.001):
            self._read()

    def _read(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            while True:
                self._lines += self._socket.recv(4096).decode().split("\n")

    def heard(self) -> list[str]:
        """What was said since the last call."""
        self._read()
        with self._lock:
            lines, self._lines = self._lines, []
            return lines

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize("errors", ["poll_errors", "commit_errors"])
def test_a_consumer_that_was_shut_out_is_given_up_without_a_commit(rig: Rig, errors: str) -> None:
    rig.consumer.add(ONE, b"a")
    getattr(rig.consumer, errors).append(SaslAuthenticationFailedError("wrong password"))
    with pytest.raises(SaslAuthenticationFailedError):
        rig.run()
    assert rig.consumer.committed == {}
    assert "close" in rig.log.names()


def test_what_the_acls_do_not_grant_is_named(rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.poll_errors.append(TopicAuthorizationFailedError({"t2", "t1"}))
    with pytest.raises(ConfigError, match=r"a client without user .* read topic t1, t2: grant"):
        rig.run()
    rig.consumer.commit_errors.append(GroupAuthorizationFailedError("iot-inference"))
    with pytest.raises(ConfigError, match="use consumer group iot-inference: grant it READ"):
        rig.run()


def test_who_is_long_out_of_the_group_asks_the_broker_why(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "AWAY_SECONDS", 0.0)
    rig.settings = replace(rig.settings, bootstrap_servers="127.0.0.1:1")
    rig.consumer.add(ONE, b"a")
    rig.consumer.state = MemberState.UNJOINED
    rig.consumer.on_poll = [
        lambda: None,
        lambda: setattr(rig.consumer, "state", MemberState.STABLE),
    ]
    with caplog.at_level("WARNING", "iot_pipeline"):
        rig.run()
    assert "127.0.0.1:1: Connection refused" in caplog.text


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    listening = Systemd(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "20")  # so that each call of alive() counts
    yield listening
    listening.close()


def test_ready_is_said_once_and_only_when_in_the_group(systemd: Systemd, rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.consumer.state = MemberState.UNJOINED
    heard: list[list[str]] = []

    def join() -> None:
        heard.append(systemd.heard())
        rig.consumer.state = MemberState.STABLE

    rig.consumer.on_poll = [lambda: None, join]
    rig.run()
    heard.append(systemd.heard())
    assert "READY=1" not in heard[0]
    assert heard[1].count("READY=1") == 1
    assert "STOPPING=1" in heard[1]


def test_the_watchdog_is_fed_from_the_loop_also_while_the_sink_is_down(
    systemd: Systemd, rig: Rig
) -> None:
    rig.consumer.add(ONE, b"a")
    rig.stage.errors = [SinkUnavailable("down")] * 2
    fed: list[bool] = []
    rig.consumer.on_poll = [lambda: fed.append("WATCHDOG=1" in systemd.heard()) for _ in range(4)]
    rig.run()
    assert len(fed) == 4
    assert all(fed)


def test_the_watchdog_goes_hungry_when_the_stage_hangs(
    systemd: Systemd, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "SILENCE_SECONDS", 0.1)
    rig.consumer.add(ONE, b"a")
    heard: list[list[str]] = []

    def hang() -> None:
        for seconds in (0.4, 0.2):
            heard.append([])
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                heard[-1] += systemd.heard()
                time.sleep(0.001)

    rig.stage.on_handle = [hang]
    rig.run()
    assert "WATCHDOG=1" in heard[0]
    assert "WATCHDOG=1" not in heard[1]
    assert rig.log.named("written") == [[b"a"]]


@pytest.mark.parametrize("thread", ["decode", "handle"])
def test_long_work_with_signs_of_life_is_not_taken_for_hung(
    systemd: Systemd, rig: Rig, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    monkeypatch.setattr(worker, "SILENCE_SECONDS", 0.2)
    rig.consumer.add(ONE, b"a", b"b", b"c")
    heard: list[str] = []

    def work(beat: Beat) -> None:
        for _ in range(30):
            heard.clear()
            beat()
            time.sleep(0.02)
            heard.extend(systemd.heard())

    def slow(record: Record) -> bytes:
        for _ in range(20):
            time.sleep(0.01)
            heard.extend(systemd.heard())
        if record.value == b"b":
            heard.clear()
        return record.value or b""

    if thread == "handle":
        rig.stage.on_handle = [lambda: work(rig.stage.beat)]
    else:
        rig.stage.decode = slow  # type: ignore[method-assign]
    rig.run()
    assert "WATCHDOG=1" in heard
    assert rig.log.named("written") == [[b"a", b"b", b"c"]]


def test_the_outage_shows_in_the_status(systemd: Systemd, rig: Rig) -> None:
    rig.consumer.add(ONE, b"a")
    rig.stage.errors = [SinkUnavailable("connection refused")]
    rig.run()
    statuses = [line for line in systemd.heard() if line.startswith("STATUS=")]
    assert "STATUS=waiting for memory: connection refused" in statuses
