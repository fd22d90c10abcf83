"""Polled records that wait for their turn.

Each partition may hold so much and is paused beyond that, so memory stays bounded while the broker
keeps what does not fit. Batches are dealt in equal shares from all partitions: an image and its
prediction lie in partitions of the same number, at about the same depth, and so come into the
same batch, however far both topics have grown. What a partition missed, because its records came
late, it gets later, or the two would be out of step to the end of the backlog.
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
        # Records taken from each partition since nothing at all waited.
        self._served: dict[TopicPartition, int] = {}
        # Partitions that were waited for in vain.
        self._overdue: set[TopicPartition] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, partition: TopicPartition, records: Sequence[Record]) -> None:
        """Take the next records of a partition."""
        waiting = self._waiting.setdefault(partition, deque())
        if not waiting:
            # What it missed while it had none, but no more than a batch: others wait, too.
            most = max(self._served.values(), default=0)
            served = self._served.get(partition, 0)
            self._served[partition] = max(served, most - self._max_records)
        waiting.extend(records)
        self._bytes[partition] = self._bytes.get(partition, 0) + sum(map(size, records))
        if len(waiting) >= self._share(self._waiting) or partition in self.full(self._waiting):
            self._overdue.discard(partition)
        self._ends[partition] = records[-1].offset + 1

    def drop(self, partitions: Collection[TopicPartition]) -> None:
        """Forget partitions that are no longer ours."""
        for partition in partitions:
            self._waiting.pop(partition, None)
            self._bytes.pop(partition, None)
            self._ends.pop(partition, None)
            self._served.pop(partition, None)
            self._overdue.discard(partition)

    def full(self, assigned: Collection[TopicPartition]) -> set[TopicPartition]:
        """The assigned partitions that hold as much as they may."""
        share = self._max_bytes // max(1, len(assigned))
        return {
            partition
            for partition in assigned
            if len(self._waiting.get(partition, ())) >= self._max_records
            or self._bytes.get(partition, 0) >= share
        }

    def lacking(self, ends: Mapping[TopicPartition, int | None]) -> set[TopicPartition]:
        """The partitions of which the next batch would lack records that the broker has.

        It would where a partition holds less than its share of a batch. Others would fill the gap,
        and images and their predictions no longer come in step.

        Args:
            ends: the end of each assigned partition at the broker; None where it is not known yet,
                as in the first moments after the start. A backlog in the others then suggests that
                it has one, too.
        """
        share = self._share(ends)
        backlog = self.backlog(ends)
        full = self.full(ends)
        return {
            partition
            for partition, end in ends.items()
            if partition not in full
            and partition not in self._overdue
            and len(self._waiting.get(partition, ())) < share
            and (backlog if end is None else self._unread(partition, end) > 0)
        }

    def backlog(self, ends: Mapping[TopicPartition, int | None]) -> bool:
        """Whether a whole batch waits, here and, as far as is known, at the broker.

        Args:
            ends: as for `lacking`.
        """
        unread = (self._unread(partition, end) for partition, end in ends.items() if end)
        return len(self) + sum(unread) >= self._max_records

    def _share(self, partitions: Collection[TopicPartition]) -> int:
        """Records of each partition in a batch that has all that it may."""
        return max(1, self._max_records // max(1, len(partitions)))

    def _unread(self, partition: TopicPartition, end: int) -> int:
        return end - self._ends.get(partition, end)

    def give_up(self, partitions: Collection[TopicPartition]) -> None:
        """Miss these partitions no more until they have a whole share again.

        Some never give their last records, such as the mark that ends a transaction.
        """
        self._overdue.update(partitions)

    def take(self, max_records: int, max_bytes: int) -> list[Record]:
        """Take out the next batch: a record each of those that have been served least, and again.

        Args:
            max_records: the most records to take.
            max_bytes: take no further record once the batch holds so many bytes.

        Returns:
            The records, by partition.
        """
        batch: dict[TopicPartition, list[Record]] = {}
        while max_bytes > 0:
            turn = self._next_in_turn()
            # Half a turn would put an image into another batch than its prediction, but where a
            # batch has no room for a whole one.
            if not turn or (batch and len(turn) > max_records):
                break
            for partition in turn[:max_records]:
                if max_bytes <= 0:
                    break
                record = self._waiting[partition].popleft()
                self._bytes[partition] -= size(record)
                self._served[partition] += 1
                max_records -= 1
                max_bytes -= size(record)
                batch.setdefault(partition, []).append(record)
        if not self:
            # What comes next is no part of a backlog that was being taken in step.
            self._served.clear()
        return [record for partition in sorted(batch) for record in batch[partition]]

    def _next_in_turn(self) -> list[TopicPartition]:
        """Of the partitions that have records, those that have been served least."""
        occupied = [partition for partition, records in self._waiting.items() if records]
        least = min((self._served[partition] for partition in occupied), default=0)
        return sorted(partition for partition in occupied if self._served[partition] == least)
