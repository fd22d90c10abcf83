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
    timestamp_type: int = 0


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
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30_000)), min_size=1, max_size=40),
)
def test_over_any_run_all_partitions_get_the_same(
    count: int, batches: list[tuple[int, int]]
) -> None:
    partitions = [TopicPartition("images", number) for number in range(count)]
    intake = Intake(50, PLENTY)
    served = dict.fromkeys(partitions, 0)
    ends = dict.fromkeys(partitions, 0)
    for max_records, max_bytes in batches:
        for partition in partitions:
            # Records of many sizes, always more than a batch may hold.
            more = [
                KafkaRecord("images", partition.partition, offset, bytes(offset * 7919 % 3000))
                for offset in range(ends[partition], served[partition] + 41)
            ]
            if more:
                intake.add(partition, more)
                ends[partition] += len(more)
        for partition, offsets in taken(intake.take(max_records, max_bytes)).items():
            served[partition] += len(offsets)
        assert max(served.values()) - min(served.values()) <= 1


def test_what_came_late_is_made_up_for() -> None:
    intake = Intake(100, PLENTY)
    intake.add(ONE, records(ONE, 90))
    assert taken(intake.take(30, PLENTY)) == {ONE: list(range(30))}
    intake.add(THREE, records(THREE, 90))
    assert taken(intake.take(40, PLENTY)) == {
        ONE: list(range(30, 35)),
        THREE: list(range(35)),
    }
    assert len(taken(intake.take(40, PLENTY))[ONE]) == 20


def test_who_had_nothing_for_long_makes_up_for_one_batch_at_most() -> None:
    intake = Intake(10, PLENTY)
    for start in range(0, 1000, 10):
        intake.add(ONE, records(ONE, 10, start))
        intake.take(9, PLENTY)
    intake.add(TWO, records(TWO, 100))
    batch = taken(intake.take(30, PLENTY))
    assert (len(batch[ONE]), len(batch[TWO])) == (10, 20)


def test_what_was_not_part_of_a_backlog_is_not_made_up_for() -> None:
    intake = Intake(100, PLENTY)
    intake.add(ONE, records(ONE, 50))
    assert len(intake.take(100, PLENTY)) == 50
    intake.add(ONE, records(ONE, 20, 50))
    intake.add(TWO, records(TWO, 20))
    assert {at: len(offsets) for at, offsets in taken(intake.take(20, PLENTY)).items()} == {
        ONE: 10,
        TWO: 10,
    }


def test_large_images_and_their_predictions_come_in_step() -> None:
    intake = Intake(2000, 32 * 1024 * 1024)
    for partition in PARTITIONS:
        large = 100_000 if partition.topic == "images" else 200
        few = [
            KafkaRecord(partition.topic, partition.partition, offset, bytes(large))
            for offset in range(80)
        ]
        intake.add(partition, few)
    batch = taken(intake.take(2000, 4 * 1024 * 1024))
    shares = {partition: len(offsets) for partition, offsets in batch.items()}
    assert max(shares.values()) - min(shares.values()) <= 1, shares


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


def test_who_was_waited_for_in_vain_is_waited_for_again_once_it_is_well() -> None:
    intake = Intake(40, PLENTY)
    intake.add(ONE, records(ONE, 40))
    # Its last record is the mark that ends a transaction, again and again.
    for end in (3, 6, 9):
        intake.add(TWO, records(TWO, 2, end - 3))
        ends = {ONE: 1000, TWO: end}
        assert intake.lacking(ends) == ({TWO} if end == 3 else set())
        intake.give_up({TWO})
    intake.add(TWO, records(TWO, 20, 10))
    intake.take(60, PLENTY)
    intake.add(ONE, records(ONE, 40, 40))
    assert intake.lacking({ONE: 1000, TWO: 1000}) == {TWO}


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
    intake.give_up({THREE})
    assert not intake.lacking({ONE: 5, TWO: 1, THREE: None}), "it was waited for in vain"
    intake.add(THREE, records(THREE, 1))
    intake.take(9, PLENTY)
    assert intake.lacking({ONE: 5, TWO: 1, THREE: 9}) == {THREE}
    few = Intake(100, PLENTY)
    few.add(ONE, records(ONE, 10))
    assert few.lacking({ONE: 99, TWO: None}) == {ONE}
    assert few.lacking({ONE: 100, TWO: None}) == {ONE, TWO}, "a batch's worth is known of"
    large = Intake(3, 4000)
    large.add(ONE, [KafkaRecord(ONE.topic, ONE.partition, 0, bytes(2000))])
    assert not large.lacking({ONE: 9, TWO: 0}), "it is full already"
