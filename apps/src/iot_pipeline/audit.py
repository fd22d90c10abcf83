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
    say why; and invalid records that are in no dead letter either. A dead letter that was replayed
    says no longer why.
pending
    The same, but younger than `--grace`, or replayed since.
lost
    Records that Kafka deleted before a stage had read them: where its group stands lies before the
    partition's first record. Once it has read what follows, nobody can tell any more.
expired
    Documents that lack something, of images older than all that the image topic holds: Kafka's
    retention of their records is over, or the cluster was built anew. Nobody can say any more
    whether a dead letter told why. With `--since` they are missing.
duplicated
    Documents beyond the first that stand for one image.
redelivered
    Records beyond the first of one image in a topic. Kafka delivers at least once, so these are no
    fault; what matters is that the database holds one document.
conflicting
    Images of which the image topic holds two that differ under one id. The database keeps the one
    that was produced first.
dead_lettered
    Records in the dead-letter topic, by where they came from.
open_dead_letters
    Of these, records that someone has still to look at: neither replayed nor dropped.
accuracy
    Share of the predicted images whose prediction is the ground truth.
latency_p50, latency_p95
    Seconds from an image's production to the write that completed its document.

When an image came is what the broker's clock says of its records (`message.timestamp.type` is
`LogAppendTime`). The time in its id is a device's, which may be years off: it counts where there is
no record with a broker's time, and not where it lies in the future.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kafka.errors import GroupAuthorizationFailedError
from kafka.structs import TopicPartition

from iot_pipeline.errors import ConfigError, Exit, FileError, InvalidMessage
from iot_pipeline.progress import Progress
from iot_pipeline.reading import CLOCK_SKEW, begins_of, ends_of, parse_moment, read, reading
from iot_pipeline.schema import (
    IMAGE_FIELDS,
    MAX_AHEAD,
    PREDICTION_FIELDS,
    REPLAYED,
    REPLAYED_FROM,
    STORED_AT,
    DeadLetter,
    Document,
    Handling,
    ImageMessage,
    PredictionMessage,
    Record,
    arrival_time,
    decode_record,
    first_uuid7,
    format_time,
    is_uuid7,
    now,
    parse_time,
    record_time,
    uuid7_time,
)
from iot_pipeline.service import set_up_logging
from iot_pipeline.settings import AuditSettings
from iot_pipeline.stores import READ_DOCUMENTS, open_store

SHOWN_MISSING = 10
# No limits of a stage: what one refused for its size or its time is in the dead-letter topic.
ANY_SIZE = sys.maxsize
ANY_TIME = timedelta.max

Place = tuple[str, int, int]
"""Where a record stands: topic, partition, offset."""
Partition = tuple[str, int]
"""A topic and the number of one of its partitions."""


NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class _Refusal:
    """A record that was refused, and what became of its dead letters."""

    reason: str
    counts: bool = False
    """Whether one of them was written since the time that is asked for."""
    open: set[Place] = field(default_factory=set)
    replayed_at: datetime = NEVER

    def explains(self) -> bool:
        """Whether it says why the record's image lacks something."""
        return bool(self.open) or self.replayed_at == NEVER


@dataclass(slots=True)
class _Image:
    """What was seen of one image."""

    came_at: datetime | None = None
    """When its first record came, by a broker's clock."""
    picture: int | None = None
    """A hash of the first image that came under its id."""
    conflicting: bool = False
    truth: str | None = None
    inferred: str | None = None
    image_records: int = 0
    prediction_records: int = 0
    image_stored: bool = False
    prediction_stored: bool = False
    dead: bool = False
    replayed_at: datetime = NEVER

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
    lost: int
    expired: int
    duplicated: int
    redelivered: int
    conflicting: int
    dead_lettered: int
    open_dead_letters: int
    accuracy: float | None
    latency_p50: float | None
    latency_p95: float | None
    dead_letter_reasons: Mapping[str, int] = field(default_factory=dict)
    missing_examples: Mapping[str, str] = field(default_factory=dict)
    lost_by_group: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """One object on one line."""
        return json.dumps(self.__dict__, separators=(", ", ": "))

    def is_clean(self) -> bool:
        """Whether every image that had the time is stored and predicted, once."""
        return not (self.missing or self.lost or self.duplicated)


class Ledger:
    """Gathers what is seen in the topics and in the database, and sums it up.

    Feed it the dead letters first: they explain what the records after them lack.
    """

    def __init__(self, since: datetime | None = None) -> None:
        self._since = since
        self._topic_begins = datetime.max.replace(tzinfo=UTC)
        self._images: dict[str, _Image] = {}
        self._refusals: dict[Place, _Refusal] = {}
        # The same by the place of each dead letter: a record that two stages refuse has two.
        self._dead_letters: dict[Place, _Refusal] = {}
        self._refusals_by_key: dict[bytes, list[_Refusal]] = {}
        self._invalid: dict[Place, datetime] = {}
        self._lost: dict[str, dict[Partition, int]] = {}
        self._duplicated = 0
        self._latencies: list[float] = []

    def saw_dead_letter(self, record: Any) -> None:
        """A record of the dead-letter topic."""
        handling = Handling.from_headers(record.headers)
        if handling is None:
            letter = DeadLetter.from_headers(record.headers)
            source = (letter.topic, letter.partition, letter.offset)
            refusal = self._refusals.setdefault(source, _Refusal(letter.reason))
            refusal.counts |= not self._is_before(record_time(record))
            refusal.open.add(_place(record))
            self._dead_letters[_place(record)] = refusal
            if record.key:
                self._refusals_by_key.setdefault(record.key, []).append(refusal)
            return
        handled = (record.topic, handling.partition, handling.offset)
        if handled in self._dead_letters:
            refusal = self._dead_letters[handled]
            refusal.open.discard(handled)
            if handling.action == REPLAYED:
                refusal.replayed_at = max(refusal.replayed_at, record_time(record))

    def saw_image(self, record: Any) -> None:
        """A record of the image topic."""
        try:
            message = decode_record(ImageMessage, record, ANY_SIZE, ANY_TIME)
        except InvalidMessage:
            self._saw_invalid(record)
            return
        moment = arrival_time(record) or uuid7_time(message.id)
        if not _is_replayed(record):
            self._topic_begins = min(self._topic_begins, moment)
        image = self._image(message.id, moment)
        if image:
            picture = hash((message.ground_truth, message.data))
            if image.picture is None:
                image.picture = picture
            image.conflicting |= image.picture != picture
            image.image_records += 1
            image.truth = message.ground_truth
            self._explain(image, record)

    def saw_prediction(self, record: Any) -> None:
        """A record of the prediction topic."""
        try:
            message = decode_record(PredictionMessage, record, ANY_SIZE, ANY_TIME)
        except InvalidMessage:
            self._saw_invalid(record)
            return
        # Not by its own time: its image, and what there is to say of it, may have come before.
        image = self._image(message.id, uuid7_time(message.id))
        if image:
            image.prediction_records += 1
            image.inferred = message.inferred_value
            self._explain(image, record)

    def saw_document(self, document: Document) -> None:
        """A document of the database; those that stand for no image are passed over."""
        identifier = document["_id"]
        claimed = document.get("ID", identifier)
        if isinstance(claimed, str) and claimed != identifier and is_uuid7(claimed):
            self._duplicated += 1
            return
        if not is_uuid7(identifier):
            return
        image = self._image(identifier, uuid7_time(identifier))
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

    def saw_group(
        self, group: str, begins: Mapping[Partition, int], stands: Mapping[Partition, int]
    ) -> None:
        """Where the partitions that a stage reads begin, and where its group stands.

        Args:
            group: its name.
            begins: the offset of each partition's first record. They have to be asked for first.
            stands: the offset that the group has committed for each.
        """
        lost = {each: begin - stands.get(each, 0) for each, begin in begins.items()}
        self._lost[group] = {each: count for each, count in lost.items() if count > 0}

    def ids_before(self, first: str) -> list[str]:
        """The ids of images whose records came and that sort before `first`."""
        return sorted(identifier for identifier in self._images if identifier < first)

    def _explain(self, image: _Image, record: Any) -> None:
        """Note when a record came, and what dead letters, or a replay, say of its image."""
        moment = arrival_time(record)
        if moment:
            image.came_at = min(image.came_at or moment, moment)
        refusal = self._refusals.get(_place(record))
        if refusal:
            image.dead |= refusal.explains()
            image.replayed_at = max(image.replayed_at, refusal.replayed_at)
        if _is_replayed(record):
            image.replayed_at = max(image.replayed_at, record_time(record))

    def _image(self, identifier: str, moment: datetime) -> _Image | None:
        """An image that is known already, or that came, or was made, late enough at `moment`."""
        if identifier not in self._images and self._is_before(moment):
            return None
        return self._images.setdefault(identifier, _Image())

    def _saw_invalid(self, record: Record) -> None:
        moment = record_time(record)
        if not self._is_before(moment) and _place(record) not in self._refusals:
            self._invalid[_place(record)] = moment

    def _is_before(self, moment: datetime) -> bool:
        return self._since is not None and moment < self._since

    def _is_explained_by_key(self, identifier: str, image: _Image) -> bool:
        """Whether a dead letter of a record that came too long ago to be read says why."""
        if image.image_records or image.prediction_records:
            return False
        refusals = self._refusals_by_key.get(identifier.encode(), ())
        return any(refusal.explains() for refusal in refusals)

    def _is_expired(self, identifier: str, image: _Image, latest: datetime) -> bool:
        if self._since is not None or image.image_records or image.prediction_records:
            return False
        return not self._topic_begins <= uuid7_time(identifier) <= latest

    def _concerns_us(self, identifier: str, image: _Image, latest: datetime) -> bool:
        """Whether it came since then, as far as anyone can say."""
        if self._since is None or image.image_records:
            return True
        return uuid7_time(identifier) <= latest

    def report(self, grace: float, at: datetime, ended: datetime | None = None) -> Report:
        """Sum up.

        Args:
            grace: age in seconds below which what lacks something is pending, not missing.
            at: when one began to look.
            ended: when one was done; the same without it.
        """
        young = at - timedelta(seconds=grace)
        latest = (ended or at) + CLOCK_SKEW  # what is later was no clock's time
        pending = expired = 0
        missing: dict[str, str] = {}
        concerning = {
            identifier: image
            for identifier, image in sorted(self._images.items())
            if self._concerns_us(identifier, image, latest)
        }
        for identifier, image in concerning.items():
            lacks = image.lacks()
            if not lacks or image.dead or self._is_explained_by_key(identifier, image):
                continue
            moments = (image.came_at or uuid7_time(identifier), image.replayed_at)
            if any(young < moment <= latest for moment in moments):
                pending += 1
            elif self._is_expired(identifier, image, latest):
                expired += 1
            else:
                missing[identifier] = ", ".join(lacks)
        for (topic, partition, offset), moment in self._invalid.items():
            if young < moment <= latest:
                pending += 1
            else:
                missing[f"{topic}-{partition}@{offset}"] = "invalid, and in no dead letter"
        images = concerning.values()
        refusals = [refusal for refusal in self._refusals.values() if refusal.counts]
        # What two stages have not read is lost once.
        lost: dict[Partition, int] = {}
        for by_partition in self._lost.values():
            for each, count in by_partition.items():
                lost[each] = max(lost.get(each, 0), count)
        judged = [image for image in images if image.truth and image.inferred]
        right = sum(image.truth == image.inferred for image in judged)
        latencies = sorted(self._latencies)
        return Report(
            produced=len(concerning),
            stored=sum(image.image_stored for image in images),
            predicted=sum(
                image.prediction_stored or image.prediction_records > 0 for image in images
            ),
            pending=pending,
            missing=len(missing),
            lost=sum(lost.values()),
            expired=expired,
            duplicated=self._duplicated,
            redelivered=sum(
                max(0, image.image_records - 1) + max(0, image.prediction_records - 1)
                for image in images
            ),
            conflicting=sum(image.conflicting for image in images),
            dead_lettered=len(refusals),
            open_dead_letters=sum(bool(refusal.open) for refusal in refusals),
            accuracy=round(right / len(judged), 4) if judged else None,
            latency_p50=_percentile(latencies, 50),
            latency_p95=_percentile(latencies, 95),
            dead_letter_reasons=dict(Counter(refusal.reason for refusal in refusals).most_common()),
            missing_examples=dict(list(missing.items())[:SHOWN_MISSING]),
            lost_by_group={
                group: sum(by_partition.values())
                for group, by_partition in self._lost.items()
                if by_partition
            },
        )


def _place(record: Record) -> Place:
    return (record.topic, record.partition, record.offset)


def _is_replayed(record: Any) -> bool:
    return any(name == REPLAYED_FROM for name, _ in record.headers)


def _percentile(ordered: list[float], percent: int) -> float | None:
    """The nearest rank: a value that was measured."""
    if not ordered:
        return None
    return round(ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 3)


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
    # The ends are taken in the order in which records arise, so that each that is seen has what
    # follows from it in what is read after.
    topics = (settings.image_topic, settings.prediction_topic, settings.dead_letter_topic)
    earlier = max(since, NEVER + MAX_AHEAD) - MAX_AHEAD if since else None
    with reading(settings) as consumer:
        try:
            ends = ends_of(consumer, topics, settings)
            for topic, saw in readers:
                # A record is never older than the image it tells of, but an image may be older than
                # its id says.
                start = earlier if topic == settings.dead_letter_topic else since
                begins = begins_of(consumer, ends[topic], start)
                read(consumer, begins, ends[topic], saw, progress)
        finally:
            progress.clear()


def _read_database(
    settings: AuditSettings, ledger: Ledger, since: datetime | None, progress: Progress
) -> None:
    first = first_uuid7(since) if since else ""
    with open_store(settings) as store:
        for count, document in enumerate(store.scan(first)):
            ledger.saw_document(document)
            progress.show(f"reading {store.name}: {count + 1} documents")
        # Images of devices whose clocks are behind.
        behind = ledger.ids_before(first)
        for start in range(0, len(behind), READ_DOCUMENTS):
            for document in store.read(behind[start : start + READ_DOCUMENTS]).values():
                ledger.saw_document(document)
    progress.clear()


def _read_groups(settings: AuditSettings, ledger: Ledger) -> None:
    """Feed the ledger where the stages stand.

    Raises:
        SinkUnavailable: the broker does not answer.
        ConfigError: a group may not be looked at.
    """
    for group, topics in (
        (settings.inference_group, (settings.image_topic,)),
        (settings.storage_group, (settings.image_topic, settings.prediction_topic)),
    ):
        with reading(settings, group) as consumer:
            partitions = [
                TopicPartition(topic, number)
                for topic in topics
                for number in consumer.partitions_for_topic(topic)
            ]
            begins = consumer.beginning_offsets(partitions)
            try:
                stands = {each: consumer.committed(each) or 0 for each in partitions}
            except GroupAuthorizationFailedError as error:
                raise ConfigError(
                    f"Kafka does not let {settings.principal} look at consumer group {group}: "
                    "grant it DESCRIBE on the group, or name the stage's group in "
                    "IOT_INFERENCE_GROUP or IOT_STORAGE_GROUP"
                ) from error
            ledger.saw_group(group, begins, stands)


def _table(report: Report, settings: AuditSettings, at: datetime) -> str:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    def counts(of: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {count}" for name, count in of.items())

    unread = counts(report.lost_by_group)
    rows = [
        ("produced", str(report.produced), ""),
        ("stored", str(report.stored), ""),
        ("predicted", str(report.predicted), ""),
        ("pending", str(report.pending), f"younger than {settings.grace:g} s"),
        ("missing", str(report.missing), ""),
        ("lost", str(report.lost), f"deleted before they were read: {unread}" if unread else ""),
        ("expired", str(report.expired), "incomplete, and older than the image topic"),
        ("duplicated", str(report.duplicated), "documents beyond one an image"),
        ("redelivered", str(report.redelivered), "records that came again, stored once"),
        ("conflicting", str(report.conflicting), "ids under which two images differ"),
        ("dead-lettered", str(report.dead_lettered), counts(report.dead_letter_reasons)),
        ("  still open", str(report.open_dead_letters), "neither replayed nor dropped"),
        ("accuracy", "-" if report.accuracy is None else f"{report.accuracy:.1%}", ""),
        ("latency p50", seconds(report.latency_p50), "produced to stored with its prediction"),
        ("latency p95", seconds(report.latency_p95), ""),
    ]
    place = f"{settings.bootstrap_servers} and {settings.store_url}"
    lines = [f"Audit of {place}", f"at {format_time(at)}", ""]
    lines += [f"  {name:<14}{value:>10}   {note}".rstrip() for name, value, note in rows]
    lines.append("")
    if report.missing:
        lines.append(f"{report.missing} missing:")
        lines += [f"  {place}  {lacks}" for place, lacks in report.missing_examples.items()]
        if report.missing > len(report.missing_examples):
            lines.append(f"  … and {report.missing - len(report.missing_examples)} more")
    elif not report.lost:
        lines.append("Nothing is missing.")
    if report.lost:
        lines.append(f"{report.lost} lost before they were read.")
    return "\n".join(lines)


def _leave(report: Report, file: Path, at: datetime) -> None:
    """Leave the result for those who look later. A file that is there is whole.

    Raises:
        FileError: it cannot be written.
    """
    new = file.with_name(f"{file.name}.new")
    try:
        new.write_text(json.dumps({"at": format_time(at), **report.__dict__}) + "\n")
        new.replace(file)
    except OSError as error:
        raise FileError(f"--record {file}: {error.strerror}") from error


def run(settings: AuditSettings) -> int:
    """Read everything, print the report, and return the exit status.

    Raises:
        SinkUnavailable: the broker or the database does not answer.
        ConfigError: a setting cannot be used.
        FileError: the file of --record cannot be written.
    """
    set_up_logging(settings.log_level if settings.log_level != "info" else "warning")
    at = now()
    since = parse_moment("since", settings.since, at)
    ledger = Ledger(since)
    progress = Progress()
    _read_topics(settings, ledger, since, progress)
    _read_groups(settings, ledger)
    _read_database(settings, ledger, since, progress)
    report = ledger.report(settings.grace, at, now())
    print(report.to_json() if settings.json else _table(report, settings, at))
    if settings.record:
        _leave(report, Path(settings.record), at)
    if report.produced < settings.expect:
        print(
            f"iot-pipeline audit: {report.produced} images were produced, fewer than the "
            f"{settings.expect} expected",
            file=sys.stderr,
        )
        return Exit.FAILED
    return Exit.OK if report.is_clean() else Exit.FAILED
