"""Waiting records: equal shares, bounds, and what is worth waiting for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from kafka.structs import TopicPartition

from iot_pipeline.intake import Intake, size
from iot_pipeline.schema import Record

PARTITIONS = [
    TopicPartition(topic, number) for topic in ("images", "predictions") for number in (0, 1)
]
ONE, TWO, THREE, FOUR = PARTITIONS
PLENTY = 1 << 30


@dataclass
class KafkaRecord:
    topic: str
    partition: int
    offset: int
    value: bytes | None = b"value"
    key: bytes | None = None
    timestamp: int = 0


def records(partition: TopicPartition, count: int, start: int = 0) -> list[Record]:
    return [
        KafkaRecord(partition.topic, partition.partition, start + place) for place in range(count)
    ]


def taken(batch: Sequence[Record]) -> dict[TopicPartition, list[int]]:
    found: dict[TopicPartition, list[int]] = {}
    for record in batch:
        found.setdefault(TopicPartition(record.topic, record.partition), []).append(record.offset)
    return found


def test_images_and_predictions_of_a_backlog_come_in_step() -> None:
    intake = Intake(500, PLENTY)
    for partition in PARTITIONS:
        intake.add(partition, records(partition, 500))
    for start in range(0, 500, 25):
        batch = taken(intake.take(103, PLENTY))
        assert batch == {partition: list(range(start, start + 25)) for partition in PARTITIONS}
    assert not intake


def test_what_one_partition_lacks_others_fill() -> None:
    intake = Intake(500, PLENTY)
    intake.add(ONE, records(ONE, 2))
    intake.add(TWO, records(TWO, 100))
    assert {
        partition: len(offsets) for partition, offsets in taken(intake.take(20, PLENTY)).items()
    } == {
        ONE: 2,
        TWO: 18,
    }


def test_more_partitions_than_a_batch_has_room_for() -> None:
    intake = Intake(10, PLENTY)
    for partition in PARTITIONS:
        intake.add(partition, records(partition, 2))
    seen = [record for _ in range(8) for record in intake.take(1, PLENTY)]
    assert len(seen) == 8
    assert not intake


@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=4),
    st.integers(1, 30),
    st.integers(1, 20_000),
)
def test_every_record_comes_once_and_in_order(
    counts: list[int], max_records: int, max_bytes: int
) -> None:
    intake = Intake(100, PLENTY)
    for partition, count in zip(PARTITIONS, counts, strict=True):
        if count:
            intake.add(partition, records(partition, count))
    found: dict[TopicPartition, list[int]] = {}
    while intake:
        batch = intake.take(max_records, max_bytes)
        assert 0 < len(batch) <= max_records
        assert sum(map(size, batch[:-1])) < max_bytes
        for partition, offsets in taken(batch).items():
            found.setdefault(partition, []).extend(offsets)
    assert found == {
        partition: list(range(count))
        for partition, count in zip(PARTITIONS, counts, strict=True)
        if count
    }


def test_a_partition_is_full_by_records_or_by_its_share_of_bytes() -> None:
    intake = Intake(3, 4000)
    intake.add(ONE, records(ONE, 2))
    assert intake.full([ONE, TWO]) == set()
    intake.add(ONE, records(ONE, 1, 2))
    assert intake.full([ONE, TWO]) == {ONE}
    intake.add(TWO, [KafkaRecord(TWO.topic, TWO.partition, 0, bytes(2000))])
    assert intake.full([ONE, TWO]) == {ONE, TWO}
    intake.take(3, PLENTY)
    assert intake.full([ONE, TWO]) == set()


def test_a_partition_that_is_gone_is_forgotten() -> None:
    intake = Intake(3, PLENTY)
    intake.add(ONE, records(ONE, 3))
    intake.add(TWO, records(TWO, 1))
    intake.drop({ONE, THREE})
    assert taken(intake.take(9, PLENTY)) == {TWO: [0]}
    # Given again later, from an earlier place.
    intake.add(ONE, records(ONE, 1, 1))
    assert taken(intake.take(9, PLENTY)) == {ONE: [1]}


def test_only_what_the_broker_is_known_to_have_is_waited_for() -> None:
    intake = Intake(4, PLENTY)
    intake.add(ONE, records(ONE, 1))
    intake.add(TWO, records(TWO, 1))
    intake.take(2, PLENTY)
    intake.add(ONE, records(ONE, 1, 1))
    assert not intake.lacking({ONE: 2, TWO: 1})
    assert intake.lacking({ONE: 3, TWO: 1}), "its share of a batch is two"
    assert intake.lacking({ONE: 2, TWO: 2})
    assert not intake.lacking({ONE: 2, TWO: 1, THREE: 500}), "it was read before this start"
    assert not intake.lacking({ONE: 2, TWO: 1, THREE: None}), "nothing suggests a backlog"
    intake.add(ONE, records(ONE, 3, 2))
    assert not intake.lacking({ONE: 9, TWO: 1}), "there are enough to go on with"
    assert intake.lacking({ONE: 5, TWO: 1, THREE: None})
    large = Intake(3, 4000)
    large.add(ONE, [KafkaRecord(ONE.topic, ONE.partition, 0, bytes(2000))])
    assert not large.lacking({ONE: 9, TWO: 0}), "it is full already"
