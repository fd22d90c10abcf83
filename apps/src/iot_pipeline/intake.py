"""Polled records that wait for their turn.

Each partition may hold so much and is paused beyond that, so memory stays bounded while the broker
keeps what does not fit. Batches are dealt in equal shares from all partitions: an image and its
prediction lie in partitions of the same number, at about the same depth, and so come into the
same batch, however far both topics have grown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

from kafka.structs import TopicPartition

from iot_pipeline.schema import Record


def size(record: Record) -> int:
    """Bytes that a record holds in memory, roughly."""
    return 500 + len(record.key or b"") + len(record.value or b"")


class Intake:
    """Waiting records by partition, in the order of their offsets."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        """Start empty.

        Args:
            max_records: records that a partition may hold before it is full.
            max_bytes: bytes that all partitions together may hold before those are full that hold
                an equal share.
        """
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._waiting: dict[TopicPartition, deque[Record]] = {}
        self._bytes: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, partition: TopicPartition, records: Sequence[Record]) -> None:
        """Take the next records of a partition."""
        self._waiting.setdefault(partition, deque()).extend(records)
        self._bytes[partition] = self._bytes.get(partition, 0) + sum(map(size, records))
        self._ends[partition] = records[-1].offset + 1

    def drop(self, partitions: Collection[TopicPartition]) -> None:
        """Forget partitions that are no longer ours."""
        for partition in partitions:
            self._waiting.pop(partition, None)
            self._bytes.pop(partition, None)
            self._ends.pop(partition, None)

    def full(self, assigned: Collection[TopicPartition]) -> set[TopicPartition]:
        """The assigned partitions that hold as much as they may."""
        share = self._max_bytes // max(1, len(assigned))
        return {
            partition
            for partition in assigned
            if len(self._waiting.get(partition, ())) >= self._max_records
            or self._bytes.get(partition, 0) >= share
        }

    def lacking(self, ends: Mapping[TopicPartition, int | None]) -> bool:
        """Whether the next batch would lack records that the broker is known to have.

        It would, if a partition held less than its share of a batch. Others would fill the gap, and
        images and their predictions no longer come in step.

        Args:
            ends: the end of each assigned partition at the broker; None where it is not known yet,
                as in the first moments after the start. Many records of one partition then suggest
                that the others have as many.
        """
        share = max(1, self._max_records // max(1, len(ends)))
        backlog = len(self) >= self._max_records
        full = self.full(ends)
        return any(
            partition not in full
            and len(self._waiting.get(partition, ())) < share
            and (backlog if end is None else end > self._ends.get(partition, end))
            for partition, end in ends.items()
        )

    def take(self, max_records: int, max_bytes: int) -> list[Record]:
        """Take out the next batch, equal shares from all partitions.

        Args:
            max_records: the most records to take.
            max_bytes: take no further record once the batch holds so many bytes.
        """
        batch: list[Record] = []
        budget = max_bytes
        while budget > 0:
            partitions = sorted(partition for partition, some in self._waiting.items() if some)
            share = (max_records - len(batch)) // max(1, len(partitions))
            if not batch and partitions:
                # More partitions than a batch has room for: one record of each of the first.
                share = max(1, share)
            if not share or not partitions:
                break
            for partition in partitions[: max_records - len(batch)]:
                waiting = self._waiting[partition]
                for _ in range(min(share, len(waiting))):
                    if budget <= 0:
                        break
                    record = waiting.popleft()
                    self._bytes[partition] -= size(record)
                    budget -= size(record)
                    batch.append(record)
        return batch
