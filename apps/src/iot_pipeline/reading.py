"""Reading topics from begin to end, as commands do that end by themselves.

::

    with reading(settings) as consumer:
        ends = ends_of(consumer, [settings.image_topic], settings)[settings.image_topic]
        read(consumer, begins_of(consumer, ends), ends, saw, Progress())
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from kafka.errors import AuthorizationError, KafkaError
from kafka.structs import TopicPartition

from iot_pipeline.errors import SinkUnavailable, UsageError
from iot_pipeline.kafka import describe_error, make_reader, no_such_topic, not_allowed
from iot_pipeline.progress import Progress
from iot_pipeline.schema import parse_time
from iot_pipeline.settings import Settings, flag_name

STALLED_SECONDS = 30.0
# How far the clocks of hosts may be apart.
CLOCK_SKEW = timedelta(minutes=1)

_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Offsets = Mapping[TopicPartition, int]


def parse_moment(name: str, text: str, at: datetime) -> datetime | None:
    """An RFC 3339 time, or an age such as 15m, as a time; None for the empty text.

    Args:
        name: the setting that holds it, which only a flag gives.
        text: its value.
        at: the present time.

    Raises:
        UsageError: it is neither.
    """
    if not text:
        return None
    age = _AGE.fullmatch(text)
    try:
        if age:
            return at - timedelta(seconds=float(age[1]) * _SECONDS[age[2]])
        return parse_time(text)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{flag_name(name)} must be an age such as 90s, 15m, 2h or 7d, or an RFC 3339 time "
            f"such as 2026-01-31T12:00:00Z, not {text!r}"
        ) from error


@contextlib.contextmanager
def reading(settings: Settings, group: str | None = None) -> Iterator[Any]:
    """A consumer that joins no group, for as long as one reads. It can ask where `group` stands.

    Raises:
        SinkUnavailable: the broker does not answer.
        ConfigError: a topic may not be read.
    """
    consumer = make_reader(settings, group)
    try:
        yield consumer
    except AuthorizationError as error:
        raise not_allowed(error, settings) from error
    except KafkaError as error:
        problem = describe_error(error, settings)
        raise SinkUnavailable(f"Kafka at {settings.bootstrap_servers}: {problem}") from error
    finally:
        consumer.close(autocommit=False)


def ends_of(consumer: Any, topics: Sequence[str], settings: Settings) -> dict[str, Offsets]:
    """Where topics end now, asked for in their order.

    Raises:
        SinkUnavailable: one does not exist.
    """
    for topic in topics:
        if not consumer.partitions_for_topic(topic):
            raise SinkUnavailable(
                f"Kafka at {settings.bootstrap_servers}: {no_such_topic([topic], settings)}"
            )
    return {
        topic: consumer.end_offsets(
            [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        )
        for topic in topics
    }


def begins_of(consumer: Any, ends: Offsets, since: datetime | None = None) -> Offsets:
    """Where a topic begins, or where its records since some time do."""
    begins: Offsets = consumer.beginning_offsets(list(ends))
    if since is None:
        return begins
    moment = int((since.timestamp() - CLOCK_SKEW.total_seconds()) * 1000)
    found = consumer.offsets_for_times(dict.fromkeys(ends, max(0, moment)))
    return {tp: found[tp].offset if found.get(tp) else ends[tp] for tp in ends}


def read(
    consumer: Any, begins: Offsets, ends: Offsets, saw: Callable[[Any], None], progress: Progress
) -> None:
    """Call `saw` with each record of one topic from `begins` up to `ends`.

    Raises:
        SinkUnavailable: the broker stopped to answer.
    """
    left = {partition for partition, end in ends.items() if end > begins[partition]}
    total = sum(ends[partition] - begins[partition] for partition in left)
    if not left:
        return
    consumer.assign(sorted(left))
    for partition in left:
        consumer.seek(partition, begins[partition])
    count = 0
    heard = time.monotonic()
    while left:
        for partition, records in consumer.poll(timeout_ms=1000).items():
            for record in records:
                if record.offset < ends[partition]:
                    saw(record)
                    count += 1
            heard = time.monotonic()
        # The last offsets may hold no record, so the position says when the end is reached.
        left = {tp for tp in left if consumer.position(tp) < ends[tp]}
        progress.show(f"reading {next(iter(ends)).topic}: {count} of {total} records")
        if time.monotonic() - heard > STALLED_SECONDS:
            raise SinkUnavailable(f"no records for {STALLED_SECONDS:.0f} s, though there are more")
