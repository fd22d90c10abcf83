"""The audit's reckoning: what counts as produced, missing, pending, duplicated …"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from iot_pipeline.audit import Ledger, Report, _percentile, _table
from iot_pipeline.errors import InvalidMessage, Reason
from iot_pipeline.schema import (
    DROPPED,
    LOG_APPEND_TIME,
    REPLAYED,
    REPLAYED_FROM,
    STORED_AT,
    DeadLetter,
    Document,
    Handling,
    ImageMessage,
    PredictionMessage,
    document,
    first_uuid7,
    format_time,
    merge,
)
from iot_pipeline.settings import AuditSettings

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
OLD = NOW - timedelta(hours=1)
YOUNG = NOW - timedelta(seconds=5)


@dataclass
class KafkaRecord:
    topic: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None = None
    timestamp: int = int(OLD.timestamp() * 1000)
    headers: Sequence[tuple[str, bytes]] = field(default_factory=tuple)
    timestamp_type: int = LOG_APPEND_TIME


class Pipeline:
    """Makes what the topics and the database hold."""

    def __init__(self, since: datetime | None = None) -> None:
        self.ledger = Ledger(since)
        self.offset = 0

    def image(self, moment: datetime = OLD, number: int = 0, truth: str = "cat") -> ImageMessage:
        identifier = f"{first_uuid7(moment)[:-12]}{number:012x}"
        return ImageMessage(
            id=identifier,
            ground_truth=truth,
            data=b"image",
            content_type="image/png",
            produced_at=moment,
            source="here",
        )

    def prediction(self, image: ImageMessage, value: str = "cat") -> PredictionMessage:
        return PredictionMessage(
            id=image.id,
            inferred_value=value,
            confidence=0.9,
            model="m",
            inferred_at=image.produced_at,
        )

    def sent(
        self,
        message: ImageMessage | PredictionMessage,
        came_at: datetime | None = None,
        **more: Any,
    ) -> KafkaRecord:
        """A record that came when the message says, or at another time."""
        image = isinstance(message, ImageMessage)
        made_at = message.produced_at if isinstance(message, ImageMessage) else message.inferred_at
        self.offset += 1
        record = KafkaRecord(
            "iot-topic" if image else "iot-predictions",
            0,
            self.offset,
            message.encode(),
            timestamp=int((came_at or made_at).timestamp() * 1000),
            **more,
        )
        (self.ledger.saw_image if image else self.ledger.saw_prediction)(record)
        return record

    def stored(self, *messages: ImageMessage | PredictionMessage, seconds: float = 0.5) -> Document:
        state = document(messages[0])
        for message in messages[1:]:
            state = merge(state, document(message))
        if len(messages) == 2:
            assert isinstance(messages[0], ImageMessage)
            state[STORED_AT] = format_time(messages[0].produced_at + timedelta(seconds=seconds))
        self.ledger.saw_document(state)
        return state

    def buried(self, record: KafkaRecord, stage: str = "iot-inference", **more: Any) -> int:
        """Returns the dead letter's offset."""
        letter = DeadLetter.of(record, InvalidMessage(Reason.TRUNCATED_IMAGE, "cut"), stage)
        self.offset += 1
        self.ledger.saw_dead_letter(
            KafkaRecord(
                "iot-dead-letter", 0, self.offset, record.value, headers=letter.headers(), **more
            )
        )
        return self.offset

    def handled(self, offset: int, action: str, moment: datetime = OLD) -> None:
        headers = Handling(action=action, partition=0, offset=offset, by="me").headers()
        self.offset += 1
        sent = int(moment.timestamp() * 1000)
        self.ledger.saw_dead_letter(
            KafkaRecord("iot-dead-letter", 0, self.offset, b"", None, sent, headers)
        )

    def refused(self, image: ImageMessage) -> tuple[KafkaRecord, int]:
        """A record of an image that is in a dead letter, and that one's offset."""
        self.offset += 1
        record = KafkaRecord("iot-topic", 0, self.offset, image.encode())
        return record, self.buried(record)

    def again(self, record: KafkaRecord, moment: datetime = OLD) -> KafkaRecord:
        """The same record, replayed."""
        self.offset += 1
        sent = int(moment.timestamp() * 1000)
        headers = [(REPLAYED_FROM, b"iot-dead-letter-0@1")]
        return replace(record, offset=self.offset, timestamp=sent, headers=headers)

    def report(self) -> Report:
        return self.ledger.report(60, NOW)


def test_nothing_at_all_is_clean() -> None:
    report = Pipeline().report()
    assert report.is_clean()
    assert (report.produced, report.accuracy, report.latency_p95) == (0, None, None)


def test_a_whole_image_counts_everywhere() -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    pipeline.sent(image)
    pipeline.sent(pipeline.prediction(image))
    pipeline.stored(image, pipeline.prediction(image), seconds=0.25)
    report = pipeline.report()
    assert (report.produced, report.stored, report.predicted) == (1, 1, 1)
    assert (report.missing, report.pending, report.redelivered) == (0, 0, 0)
    assert (report.accuracy, report.latency_p50) == (1.0, 0.25)


@pytest.mark.parametrize(
    "stored,predicted,lacks",
    [
        ("", False, "image not stored, not predicted"),
        ("", True, "image not stored, prediction not stored"),
        ("image", False, "not predicted"),
        ("image", True, "prediction not stored"),
        ("prediction", True, "image not stored"),
    ],
)
def test_what_is_lost_is_missing_with_what_it_lacks(
    stored: str, predicted: bool, lacks: str
) -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    pipeline.sent(image)
    if predicted:
        pipeline.sent(pipeline.prediction(image))
    if stored:
        pipeline.stored(image if stored == "image" else pipeline.prediction(image))
    report = pipeline.report()
    assert report.missing == 1
    assert report.missing_examples == {image.id: lacks}
    assert not report.is_clean()


def test_what_is_young_is_pending() -> None:
    pipeline = Pipeline()
    pipeline.sent(pipeline.image(YOUNG))
    report = pipeline.report()
    assert (report.pending, report.missing) == (1, 0)
    assert report.is_clean()


def test_a_prediction_whose_image_is_nowhere_is_missing_its_image() -> None:
    pipeline = Pipeline()
    pipeline.sent(pipeline.prediction(pipeline.image()))
    report = pipeline.report()
    assert (report.produced, report.predicted, report.missing) == (1, 1, 1)


def test_an_image_in_a_dead_letter_is_not_missing() -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    record = KafkaRecord("iot-topic", 0, 7, image.encode())
    pipeline.buried(record)
    pipeline.ledger.saw_image(record)
    pipeline.stored(image)
    report = pipeline.report()
    assert (report.produced, report.stored, report.predicted) == (1, 1, 0)
    assert (report.missing, report.dead_lettered) == (0, 1)
    assert report.dead_letter_reasons == {"truncated-image": 1}


def test_a_record_that_two_stages_refuse_is_one_dead_letter() -> None:
    pipeline = Pipeline()
    record = KafkaRecord("iot-topic", 0, 7, b"junk")
    pipeline.buried(record, "iot-inference")
    pipeline.buried(record, "iot-storage")
    pipeline.ledger.saw_image(record)
    report = pipeline.report()
    assert (report.produced, report.dead_lettered, report.missing) == (0, 1, 0)


def test_what_was_done_with_a_dead_letter_is_no_dead_letter() -> None:
    pipeline = Pipeline()
    record, letter = pipeline.refused(pipeline.image())
    other, dropped = pipeline.refused(pipeline.image(number=1))
    pipeline.refused(pipeline.image(number=2))
    pipeline.handled(letter, REPLAYED)
    pipeline.handled(dropped, DROPPED)
    report = pipeline.report()
    assert (report.dead_lettered, report.open_dead_letters) == (3, 1)
    assert report.dead_letter_reasons == {"truncated-image": 3}
    assert record.offset != other.offset


def test_a_replayed_image_that_is_stored_is_one_image() -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    record, letter = pipeline.refused(image)
    pipeline.handled(letter, REPLAYED)
    for each in (record, pipeline.again(record)):
        pipeline.ledger.saw_image(each)
    pipeline.sent(pipeline.prediction(image))
    pipeline.stored(image, pipeline.prediction(image))
    report = pipeline.report()
    assert (report.produced, report.stored, report.predicted) == (1, 1, 1)
    assert (report.missing, report.duplicated, report.redelivered) == (0, 0, 1)
    assert (report.dead_lettered, report.open_dead_letters) == (1, 0)
    assert report.is_clean()


def test_a_dead_letter_that_was_replayed_explains_nothing() -> None:
    pipeline = Pipeline()
    record, letter = pipeline.refused(pipeline.image())
    pipeline.handled(letter, REPLAYED)
    pipeline.ledger.saw_image(record)
    assert pipeline.report().missing == 1


def test_one_that_was_dropped_or_came_back_does() -> None:
    pipeline = Pipeline()
    dropped, letter = pipeline.refused(pipeline.image())
    pipeline.handled(letter, DROPPED)
    replayed, letter = pipeline.refused(pipeline.image(number=1))
    pipeline.handled(letter, REPLAYED)
    again = pipeline.again(replayed)
    pipeline.buried(again)
    for record in (dropped, replayed, again):
        pipeline.ledger.saw_image(record)
    report = pipeline.report()
    assert (report.missing, report.dead_lettered, report.open_dead_letters) == (0, 3, 1)


@pytest.mark.parametrize("seen", ["the mark", "the record"])
def test_what_was_replayed_a_moment_ago_is_pending(seen: str) -> None:
    pipeline = Pipeline()
    record, letter = pipeline.refused(pipeline.image())
    if seen == "the mark":
        # The topic of the images was looked at before, and the record is not seen.
        pipeline.handled(letter, REPLAYED, YOUNG)
        pipeline.ledger.saw_image(record)
    else:
        # Kafka keeps the first record no more.
        pipeline.handled(letter, REPLAYED)
        pipeline.ledger.saw_image(pipeline.again(record, YOUNG))
    report = pipeline.report()
    assert (report.pending, report.missing) == (1, 0)


def test_a_replay_does_not_make_older_images_missing() -> None:
    pipeline = Pipeline()
    pipeline.stored(pipeline.image(OLD, 5))  # so old that Kafka knows nothing of it
    record, letter = pipeline.refused(pipeline.image(OLD, 1))
    pipeline.handled(letter, DROPPED)
    pipeline.ledger.saw_image(pipeline.again(record))
    pipeline.sent(pipeline.image(YOUNG, 9))
    assert pipeline.report().expired == 1


def test_an_invalid_record_in_no_dead_letter_is_missing() -> None:
    pipeline = Pipeline()
    pipeline.ledger.saw_image(KafkaRecord("iot-topic", 3, 7, b"junk"))
    report = pipeline.report()
    assert report.missing_examples == {"iot-topic-3@7": "invalid, and in no dead letter"}


def test_an_invalid_record_that_is_young_is_pending() -> None:
    pipeline = Pipeline()
    moment = int(YOUNG.timestamp() * 1000)
    pipeline.ledger.saw_image(KafkaRecord("iot-topic", 3, 7, b"junk", timestamp=moment))
    assert (pipeline.report().pending, pipeline.report().missing) == (1, 0)


def test_records_that_came_twice_are_redelivered_not_duplicated() -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    for _ in range(2):
        pipeline.sent(image)
    for _ in range(3):
        pipeline.sent(pipeline.prediction(image))
    pipeline.stored(image, pipeline.prediction(image))
    report = pipeline.report()
    assert (report.produced, report.redelivered, report.duplicated) == (1, 3, 0)
    assert report.is_clean()


def test_a_second_document_of_an_image_is_a_duplicate() -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    state = pipeline.stored(image, pipeline.prediction(image))
    pipeline.ledger.saw_document(state | {"_id": "copy"})
    report = pipeline.report()
    assert (report.produced, report.stored, report.duplicated) == (1, 1, 1)
    assert not report.is_clean()


def test_what_kafka_no_longer_holds_counts_from_the_database() -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    pipeline.stored(image, pipeline.prediction(image))
    report = pipeline.report()
    assert (report.produced, report.stored, report.predicted) == (1, 1, 1)
    assert report.is_clean()


def test_a_half_document_of_before_all_that_kafka_holds_is_expired() -> None:
    pipeline = Pipeline()
    pipeline.stored(pipeline.image(OLD, 1))
    later = pipeline.image(OLD + timedelta(minutes=1))
    pipeline.sent(later)
    pipeline.stored(later, pipeline.prediction(later))
    report = pipeline.report()
    assert (report.produced, report.stored, report.predicted) == (2, 2, 1)
    assert (report.expired, report.missing) == (1, 0)
    assert report.is_clean()


def test_a_half_document_beside_empty_topics_is_expired() -> None:
    pipeline = Pipeline()
    pipeline.stored(pipeline.image())
    assert (pipeline.report().expired, pipeline.report().missing) == (1, 0)


def test_a_half_document_that_kafka_should_hold_is_missing() -> None:
    pipeline = Pipeline()
    earlier = pipeline.image(OLD - timedelta(minutes=1))
    pipeline.sent(earlier)
    pipeline.stored(earlier, pipeline.prediction(earlier))
    pipeline.stored(pipeline.image(OLD, 1))
    assert (pipeline.report().expired, pipeline.report().missing) == (0, 1)


def test_a_half_document_of_an_image_that_kafka_holds_is_missing() -> None:
    pipeline = Pipeline()
    image = pipeline.image()
    pipeline.sent(image)
    pipeline.stored(image)
    assert (pipeline.report().expired, pipeline.report().missing) == (0, 1)


def test_since_asks_of_a_time_that_kafka_should_hold() -> None:
    pipeline = Pipeline(since=OLD - timedelta(hours=1))
    pipeline.stored(pipeline.image())
    assert (pipeline.report().expired, pipeline.report().missing) == (0, 1)


def test_foreign_documents_are_passed_over() -> None:
    pipeline = Pipeline()
    pipeline.ledger.saw_document({"_id": "note", "text": "hello"})
    pipeline.ledger.saw_document({"_id": "note", "ID": 7})
    assert pipeline.report().produced == 0


def test_accuracy_is_the_share_that_is_right() -> None:
    pipeline = Pipeline()
    for number, value in enumerate(["cat", "cat", "dog", "cat"]):
        image = pipeline.image(number=number)
        pipeline.stored(image, pipeline.prediction(image, value))
    pipeline.stored(pipeline.image(number=9))
    assert pipeline.report().accuracy == 0.75


def test_since_leaves_out_what_is_older() -> None:
    pipeline = Pipeline(since=NOW - timedelta(minutes=1))
    pipeline.sent(pipeline.image(OLD))
    pipeline.ledger.saw_image(KafkaRecord("iot-topic", 0, 99, b"junk"))
    pipeline.stored(pipeline.image(OLD, 1))
    pipeline.sent(pipeline.image(YOUNG, 2))
    assert pipeline.report().produced == 1
    assert pipeline.report().missing == 0


AHEAD, BEHIND = NOW + timedelta(days=365), datetime(1970, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("clock", [AHEAD, BEHIND, datetime(9999, 12, 31, tzinfo=UTC)])
@pytest.mark.parametrize("since", [None, NOW - timedelta(hours=2)])
def test_a_wrong_clock_hides_nothing_that_is_lost(clock: datetime, since: datetime | None) -> None:
    pipeline = Pipeline(since)
    lost, young, whole = (pipeline.image(clock, number) for number in range(3))
    pipeline.sent(lost, OLD)
    pipeline.sent(young, YOUNG)
    pipeline.sent(whole, OLD)
    pipeline.sent(pipeline.prediction(whole), OLD)
    pipeline.stored(whole, pipeline.prediction(whole))
    report = pipeline.report()
    assert (report.produced, report.stored, report.pending, report.missing) == (3, 1, 1, 1)
    assert list(report.missing_examples) == [lost.id]


def test_a_document_that_the_audit_s_range_leaves_out_is_asked_for() -> None:
    pipeline = Pipeline(since=NOW - timedelta(hours=2))
    behind, right = pipeline.image(BEHIND), pipeline.image(OLD, 1)
    pipeline.sent(behind, OLD)
    pipeline.sent(right)
    assert pipeline.ledger.ids_before(first_uuid7(NOW - timedelta(hours=2))) == [behind.id]


def test_what_came_before_since_is_left_out_whatever_its_clock_said() -> None:
    pipeline = Pipeline(since=NOW - timedelta(minutes=1))
    pipeline.sent(pipeline.image(AHEAD), OLD)
    pipeline.stored(pipeline.image(AHEAD, 1))
    pipeline.sent(pipeline.prediction(pipeline.image(AHEAD, 2)), YOUNG)
    assert pipeline.report().produced == 0


@pytest.mark.parametrize("action", ["", DROPPED, REPLAYED])
def test_a_dead_letter_from_before_since_explains_a_document_that_its_id_puts_after(
    action: str,
) -> None:
    pipeline = Pipeline(since=NOW - timedelta(hours=2))
    image = pipeline.image(OLD)
    pipeline.stored(image)  # of a device whose clock is two hours ahead: it came before
    refused = KafkaRecord("iot-topic", 0, 7, image.encode(), image.key)
    before = int((NOW - timedelta(hours=3)).timestamp() * 1000)
    letter = pipeline.buried(refused, key=image.key, timestamp=before)
    if action:
        pipeline.handled(letter, action)
    report = pipeline.report()
    assert (report.produced, report.dead_lettered) == (1, 0)
    assert report.missing == (action == REPLAYED)


def test_a_clock_that_is_behind_makes_no_older_document_missing() -> None:
    pipeline = Pipeline()
    pipeline.stored(pipeline.image(OLD - timedelta(hours=1)))
    behind = pipeline.image(BEHIND, 1)
    pipeline.sent(behind, OLD)
    pipeline.stored(behind, pipeline.prediction(behind))
    assert (pipeline.report().expired, pipeline.report().missing) == (1, 0)


@pytest.mark.parametrize("clock", [NOW + timedelta(hours=2), AHEAD])
def test_a_half_document_from_the_future_that_kafka_does_not_know_is_expired(
    clock: datetime,
) -> None:
    pipeline = Pipeline()
    pipeline.sent(pipeline.image(YOUNG, 1))
    pipeline.stored(pipeline.image(clock))
    report = pipeline.report()
    assert (report.expired, report.pending, report.missing) == (1, 1, 0)


def test_a_device_s_time_counts_where_there_is_no_broker_s() -> None:
    pipeline = Pipeline()
    for number, clock in enumerate([OLD, YOUNG, AHEAD]):
        pipeline.sent(pipeline.image(clock, number), NOW, timestamp_type=0)
    report = pipeline.report()
    assert (report.pending, report.missing) == (1, 2)


def test_what_is_new_when_the_audit_ends_is_pending() -> None:
    pipeline = Pipeline()
    ended = NOW + timedelta(minutes=20)
    pipeline.stored(pipeline.image(ended))
    assert pipeline.ledger.report(60, NOW, ended).pending == 1


offsets = st.integers(-(10**6), 10**6).map(lambda seconds: NOW + timedelta(seconds=seconds))


@given(made_at=offsets, came_at=offsets, kind=st.sampled_from([0, LOG_APPEND_TIME]))
@example(made_at=NOW, came_at=NOW + timedelta(seconds=62), kind=0)
def test_nothing_is_pending_for_longer_than_the_grace(
    made_at: datetime, came_at: datetime, kind: int
) -> None:
    valid, invalid = Pipeline(), Pipeline()
    valid.sent(valid.image(made_at), came_at, timestamp_type=kind)
    invalid.ledger.saw_image(
        KafkaRecord("iot-topic", 3, 7, b"junk", timestamp=int(came_at.timestamp() * 1000))
    )
    for pipeline in (valid, invalid):
        first = pipeline.ledger.report(60, NOW)
        assert first.pending + first.missing == 1
        if first.pending:
            # No clock is trusted to be more than a minute ahead.
            later = pipeline.ledger.report(60, NOW + timedelta(seconds=121))
            assert later.missing == 1


def test_two_images_under_one_id_are_told() -> None:
    pipeline = Pipeline()
    image, other = pipeline.image(), pipeline.image(number=1)
    for message in (image, replace(image, data=b"another"), image, other, other):
        pipeline.sent(message)
    pipeline.stored(image, pipeline.prediction(image))
    report = pipeline.report()
    assert (report.conflicting, report.redelivered) == (1, 3)
    assert "conflicting            1   ids under which two images differ" in _table(
        report, AuditSettings(), NOW
    )


def test_what_kafka_deleted_unread_is_lost_once() -> None:
    pipeline = Pipeline()
    begins = {("iot-topic", 0): 12, ("iot-topic", 1): 7, ("iot-topic", 2): 0}
    pipeline.ledger.saw_group("iot-inference", begins, {("iot-topic", 0): 10, ("iot-topic", 1): 9})
    pipeline.ledger.saw_group("iot-storage", begins, {("iot-topic", 1): 7})
    report = pipeline.report()
    assert report.lost == 12
    assert report.lost_by_group == {"iot-inference": 2, "iot-storage": 12}
    assert not report.is_clean()
    text = _table(report, AuditSettings(), NOW)
    assert "deleted before they were read: iot-inference 2, iot-storage 12" in text
    assert text.endswith("12 lost before they were read.")


def test_percentiles_are_values_that_were_measured() -> None:
    assert _percentile([float(n) for n in range(1, 101)], 95) == 95
    assert _percentile([1.0, 2.0, 3.0], 50) == 2
    assert _percentile([7.0], 95) == 7


def test_the_report_as_json_is_one_line_with_the_promised_keys() -> None:
    text = Pipeline().report().to_json()
    assert "\n" not in text
    promised = "produced stored predicted missing duplicated dead_lettered accuracy pending"
    assert set(promised.split()) <= json.loads(text).keys()


def test_the_table_names_what_is_missing_but_not_thousands() -> None:
    pipeline = Pipeline()
    for number in range(12):
        pipeline.sent(pipeline.image(number=number))
    text = _table(pipeline.report(), AuditSettings(), NOW)
    assert "12 missing:" in text
    assert "and 2 more" in text
    assert pipeline.image(number=0).id in text
