"""`iot-pipeline audit`: is every image that was produced stored, and predicted, once?

What the words in its report mean:

produced
    Images known, by id: seen in the image topic, in the prediction topic or in the database. (Kafka
    keeps records for a while only; the database then still knows of the older ones.)
stored
    Of these, images whose document holds the image.
predicted
    Of these, images with a prediction, in the topic or in the database.
missing
    Images that should be stored with their prediction by now and are not, without a dead letter to
    say why; and invalid records that are in no dead letter either.
pending
    The same, but younger than `--grace`.
expired
    Documents that lack something, of images older than all that the image topic holds: Kafka's
    retention of their records is over, or the cluster was built anew. Nobody can say any more
    whether a dead letter told why. With `--since` they are missing.
duplicated
    Documents beyond the first that stand for one image.
redelivered
    Records beyond the first of one image in a topic. Kafka delivers at least once, so these are no
    fault; what matters is that the database holds one document.
dead_lettered
    Records in the dead-letter topic, by where they came from.
accuracy
    Share of the predicted images whose prediction is the ground truth.
latency_p50, latency_p95
    Seconds from an image's production to the write that completed its document.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from kafka.errors import AuthorizationError, KafkaError
from kafka.structs import TopicPartition

from iot_pipeline.couch import CouchDatabase
from iot_pipeline.errors import ConfigError, Exit, InvalidMessage, SinkUnavailable
from iot_pipeline.kafka import describe_error, make_reader, no_such_topic, not_allowed
from iot_pipeline.progress import Progress
from iot_pipeline.schema import (
    IMAGE_FIELDS,
    PREDICTION_FIELDS,
    STORED_AT,
    DeadLetter,
    Document,
    ImageMessage,
    PredictionMessage,
    Record,
    decode_record,
    first_uuid7,
    format_time,
    is_uuid7,
    now,
    parse_time,
    uuid7_time,
)
from iot_pipeline.service import set_up_logging
from iot_pipeline.settings import AuditSettings

SHOWN_MISSING = 10
STALLED_SECONDS = 30.0
# How far the clocks of hosts may be apart.
CLOCK_SKEW = timedelta(minutes=1)
# No limit of a stage: what one refused for its size is in the dead-letter topic.
ANY_SIZE = sys.maxsize

_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Place = tuple[str, int, int]
"""Where a record stands: topic, partition, offset."""


@dataclass(slots=True)
class _Image:
    """What was seen of one image."""

    truth: str | None = None
    inferred: str | None = None
    image_records: int = 0
    prediction_records: int = 0
    image_stored: bool = False
    prediction_stored: bool = False
    dead: bool = False

    def lacks(self) -> list[str]:
        """What keeps it from being done."""
        lacks = [] if self.image_stored else ["image not stored"]
        if not self.prediction_stored:
            lacks.append("prediction not stored" if self.prediction_records else "not predicted")
        return lacks


@dataclass(frozen=True, kw_only=True)
class Report:
    """The audit's result; see the module's description for what each figure means."""

    produced: int
    stored: int
    predicted: int
    pending: int
    missing: int
    expired: int
    duplicated: int
    redelivered: int
    dead_lettered: int
    accuracy: float | None
    latency_p50: float | None
    latency_p95: float | None
    dead_letter_reasons: Mapping[str, int] = field(default_factory=dict)
    missing_examples: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One object on one line."""
        return json.dumps(self.__dict__, separators=(", ", ": "))

    def is_clean(self) -> bool:
        """Whether every image that had the time is stored and predicted, once."""
        return not self.missing and not self.duplicated


class Ledger:
    """Gathers what is seen in the topics and in the database, and sums it up.

    Feed it the dead letters first: they explain what the records after them lack.
    """

    def __init__(self, since: datetime | None = None) -> None:
        self._since = since
        self._topic_begins = datetime.max.replace(tzinfo=UTC)
        self._images: dict[str, _Image] = {}
        self._dead_letters: dict[Place, str] = {}
        self._invalid: dict[Place, datetime] = {}
        self._duplicated = 0
        self._latencies: list[float] = []

    def saw_dead_letter(self, record: Any) -> None:
        """A record of the dead-letter topic."""
        if self._is_before(_record_time(record)):
            return
        letter = DeadLetter.from_headers(record.headers)
        self._dead_letters[letter.topic, letter.partition, letter.offset] = letter.reason

    def saw_image(self, record: Record) -> None:
        """A record of the image topic."""
        try:
            message = decode_record(ImageMessage, record, ANY_SIZE)
        except InvalidMessage:
            self._saw_invalid(record)
            return
        self._topic_begins = min(self._topic_begins, uuid7_time(message.id))
        image = self._image(message.id)
        if image:
            image.image_records += 1
            image.truth = message.ground_truth
            image.dead |= _place(record) in self._dead_letters

    def saw_prediction(self, record: Record) -> None:
        """A record of the prediction topic."""
        try:
            message = decode_record(PredictionMessage, record, ANY_SIZE)
        except InvalidMessage:
            self._saw_invalid(record)
            return
        image = self._image(message.id)
        if image:
            image.prediction_records += 1
            image.inferred = message.inferred_value
            image.dead |= _place(record) in self._dead_letters

    def saw_document(self, document: Document) -> None:
        """A document of the database; those that stand for no image are passed over."""
        identifier = document["_id"]
        claimed = document.get("ID", identifier)
        if isinstance(claimed, str) and claimed != identifier and is_uuid7(claimed):
            self._duplicated += 1
            return
        image = self._image(identifier) if is_uuid7(identifier) else None
        if image is None:
            return
        image.image_stored = all(name in document for name in IMAGE_FIELDS)
        image.prediction_stored = all(name in document for name in PREDICTION_FIELDS)
        image.truth = document.get("GroundTruth", image.truth)
        image.inferred = document.get("InferredValue", image.inferred)
        try:
            produced_at, stored_at = document["ProducedAt"], document[STORED_AT]
            latency = parse_time(stored_at) - parse_time(produced_at)
        except (KeyError, TypeError, ValueError):
            return
        self._latencies.append(latency.total_seconds())

    def _image(self, identifier: str) -> _Image | None:
        if self._is_before(uuid7_time(identifier)):
            return None
        return self._images.setdefault(identifier, _Image())

    def _saw_invalid(self, record: Record) -> None:
        moment = _record_time(record)
        if not self._is_before(moment) and _place(record) not in self._dead_letters:
            self._invalid[_place(record)] = moment

    def _is_before(self, moment: datetime) -> bool:
        return self._since is not None and moment < self._since

    def _is_expired(self, identifier: str, image: _Image) -> bool:
        if self._since is not None or image.image_records or image.prediction_records:
            return False
        return uuid7_time(identifier) < self._topic_begins

    def report(self, grace: float, at: datetime) -> Report:
        """Sum up.

        Args:
            grace: age in seconds below which what lacks something is pending, not missing.
            at: the present time.
        """
        young = at - timedelta(seconds=grace)
        pending = expired = 0
        missing: dict[str, str] = {}
        for identifier, image in sorted(self._images.items()):
            lacks = image.lacks()
            if not lacks or image.dead:
                continue
            if uuid7_time(identifier) > young:
                pending += 1
            elif self._is_expired(identifier, image):
                expired += 1
            else:
                missing[identifier] = ", ".join(lacks)
        for (topic, partition, offset), moment in self._invalid.items():
            if moment > young:
                pending += 1
            else:
                missing[f"{topic}-{partition}@{offset}"] = "invalid, and in no dead letter"
        images = self._images.values()
        judged = [image for image in images if image.truth and image.inferred]
        right = sum(image.truth == image.inferred for image in judged)
        latencies = sorted(self._latencies)
        return Report(
            produced=len(self._images),
            stored=sum(image.image_stored for image in images),
            predicted=sum(
                image.prediction_stored or image.prediction_records > 0 for image in images
            ),
            pending=pending,
            missing=len(missing),
            expired=expired,
            duplicated=self._duplicated,
            redelivered=sum(
                max(0, image.image_records - 1) + max(0, image.prediction_records - 1)
                for image in images
            ),
            dead_lettered=len(self._dead_letters),
            accuracy=round(right / len(judged), 4) if judged else None,
            latency_p50=_percentile(latencies, 50),
            latency_p95=_percentile(latencies, 95),
            dead_letter_reasons=dict(Counter(self._dead_letters.values()).most_common()),
            missing_examples=dict(list(missing.items())[:SHOWN_MISSING]),
        )


def _place(record: Record) -> Place:
    return (record.topic, record.partition, record.offset)


def _record_time(record: Record) -> datetime:
    return datetime.fromtimestamp(max(0, record.timestamp) / 1000, tz=now().tzinfo)


def _percentile(ordered: list[float], percent: int) -> float | None:
    """The nearest rank: a value that was measured."""
    if not ordered:
        return None
    return round(ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 3)


def parse_since(text: str, at: datetime) -> datetime | None:
    """An RFC 3339 time, or an age such as 15m, as a time; None for the empty text.

    Raises:
        ConfigError: it is neither.
    """
    if not text:
        return None
    age = _AGE.fullmatch(text)
    if age:
        return at - timedelta(seconds=float(age[1]) * _SECONDS[age[2]])
    try:
        return parse_time(text)
    except ValueError as error:
        raise ConfigError(
            f"--since (IOT_SINCE) must be an age such as 90s, 15m, 2h or 7d, or an RFC 3339 time "
            f"such as 2026-01-31T12:00:00Z, not {text!r}"
        ) from error


def _read_topics(
    settings: AuditSettings, ledger: Ledger, since: datetime | None, progress: Progress
) -> None:
    """Feed the ledger all three topics, from `since` on and each up to where it ends now.

    Raises:
        SinkUnavailable: the broker does not answer, or a topic does not exist.
        ConfigError: a topic may not be read.
    """
    readers: list[tuple[str, Callable[[Any], None]]] = [
        (settings.dead_letter_topic, ledger.saw_dead_letter),
        (settings.image_topic, ledger.saw_image),
        (settings.prediction_topic, ledger.saw_prediction),
    ]
    consumer = make_reader(settings)
    try:
        # The ends are taken in the order in which records arise, so that each that is seen has what
        # follows from it in what is read after.
        for topic in (settings.image_topic, settings.prediction_topic, settings.dead_letter_topic):
            if not consumer.partitions_for_topic(topic):
                raise SinkUnavailable(
                    f"Kafka at {settings.bootstrap_servers}: {no_such_topic([topic], settings)}"
                )
        ends = {
            topic: consumer.end_offsets(
                [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
            )
            for topic in (
                settings.image_topic,
                settings.prediction_topic,
                settings.dead_letter_topic,
            )
        }
        for topic, saw in readers:
            _read_topic(consumer, ends[topic], since, saw, progress)
    except AuthorizationError as error:
        raise not_allowed(error, settings) from error
    except KafkaError as error:
        problem = describe_error(error, settings)
        raise SinkUnavailable(f"Kafka at {settings.bootstrap_servers}: {problem}") from error
    finally:
        progress.clear()
        consumer.close(autocommit=False)


def _read_topic(
    consumer: Any,
    ends: Mapping[TopicPartition, int],
    since: datetime | None,
    saw: Callable[[Any], None],
    progress: Progress,
) -> None:
    begins = _begins(consumer, ends, since)
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
        polled = consumer.poll(timeout_ms=1000)
        for partition, records in polled.items():
            heard = time.monotonic()
            for record in records:
                if record.offset < ends[partition]:
                    saw(record)
                    count += 1
        # The last offsets may hold no record, so the position says when the end is reached.
        left = {tp for tp in left if consumer.position(tp) < ends[tp]}
        progress.show(f"reading {next(iter(ends)).topic}: {count} of {total} records")
        if time.monotonic() - heard > STALLED_SECONDS:
            raise SinkUnavailable(f"no records for {STALLED_SECONDS:.0f} s, though there are more")


def _begins(
    consumer: Any, ends: Mapping[TopicPartition, int], since: datetime | None
) -> dict[TopicPartition, int]:
    """Where to start reading. A record is never older than the image it tells of."""
    begins: dict[TopicPartition, int] = consumer.beginning_offsets(list(ends))
    if since is None:
        return begins
    moment = int((since - CLOCK_SKEW).timestamp() * 1000)
    found = consumer.offsets_for_times(dict.fromkeys(ends, max(0, moment)))
    return {tp: found[tp].offset if found.get(tp) else ends[tp] for tp in ends}


def _read_database(
    settings: AuditSettings, ledger: Ledger, since: datetime | None, progress: Progress
) -> None:
    database = CouchDatabase(settings)
    for count, document in enumerate(database.scan(first_uuid7(since) if since else "")):
        ledger.saw_document(document)
        progress.show(f"reading {settings.couchdb_database}: {count + 1} documents")
    progress.clear()


def _table(report: Report, settings: AuditSettings, at: datetime) -> str:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    reasons = ", ".join(f"{reason} {count}" for reason, count in report.dead_letter_reasons.items())
    rows = [
        ("produced", str(report.produced), ""),
        ("stored", str(report.stored), ""),
        ("predicted", str(report.predicted), ""),
        ("pending", str(report.pending), f"younger than {settings.grace:g} s"),
        ("missing", str(report.missing), ""),
        ("expired", str(report.expired), "incomplete, and older than the image topic"),
        ("duplicated", str(report.duplicated), "documents beyond one an image"),
        ("redelivered", str(report.redelivered), "records that came again, stored once"),
        ("dead-lettered", str(report.dead_lettered), reasons),
        ("accuracy", "-" if report.accuracy is None else f"{report.accuracy:.1%}", ""),
        ("latency p50", seconds(report.latency_p50), "produced to stored with its prediction"),
        ("latency p95", seconds(report.latency_p95), ""),
    ]
    place = f"{settings.bootstrap_servers} and {settings.couchdb_url}/{settings.couchdb_database}"
    lines = [f"Audit of {place}", f"at {format_time(at)}", ""]
    lines += [f"  {name:<14}{value:>10}   {note}".rstrip() for name, value, note in rows]
    lines.append("")
    if report.missing:
        lines.append(f"{report.missing} missing:")
        lines += [f"  {place}  {lacks}" for place, lacks in report.missing_examples.items()]
        if report.missing > len(report.missing_examples):
            lines.append(f"  … and {report.missing - len(report.missing_examples)} more")
    else:
        lines.append("Nothing is missing.")
    return "\n".join(lines)


def run(settings: AuditSettings) -> int:
    """Read everything, print the report, and return the exit status.

    Raises:
        SinkUnavailable: the broker or the database does not answer.
        ConfigError: a setting cannot be used.
    """
    set_up_logging(settings.log_level if settings.log_level != "info" else "warning")
    at = now()
    since = parse_since(settings.since, at)
    ledger = Ledger(since)
    progress = Progress()
    _read_topics(settings, ledger, since, progress)
    _read_database(settings, ledger, since, progress)
    report = ledger.report(settings.grace, at)
    print(report.to_json() if settings.json else _table(report, settings, at))
    if report.produced < settings.expect:
        print(
            f"iot-pipeline audit: {report.produced} images were produced, fewer than the "
            f"{settings.expect} expected",
            file=sys.stderr,
        )
        return Exit.FAILED
    return Exit.OK if report.is_clean() else Exit.FAILED
