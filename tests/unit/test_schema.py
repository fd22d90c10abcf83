"""Messages: any bytes in, a message or a clear error out."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iot_pipeline.errors import InvalidMessage, Reason
from iot_pipeline.schema import (
    LOG_APPEND_TIME,
    MAX_AHEAD,
    MAX_LABEL_CHARACTERS,
    MAX_NAME_CHARACTERS,
    DeadLetter,
    ImageMessage,
    PredictionMessage,
    arrival_time,
    decode_record,
    first_uuid7,
    format_time,
    is_uuid7,
    now,
    parse_time,
    record_time,
    uuid7,
    uuid7_time,
)

LIMIT = 1_000_000


@dataclass
class KafkaRecord:
    value: bytes | None
    key: bytes | None = None
    topic: str = "iot-topic"
    partition: int = 3
    offset: int = 41
    timestamp: int = 0
    timestamp_type: int = 0


def labels(limit: int) -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=limit).filter(str.isprintable)


moments = st.datetimes(
    min_value=datetime(1970, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone
    max_value=datetime(9000, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone
    timezones=st.just(UTC),
)
identifiers = st.builds(uuid7)

images = st.builds(
    ImageMessage,
    id=identifiers,
    ground_truth=labels(MAX_LABEL_CHARACTERS),
    data=st.binary(min_size=1, max_size=200),
    content_type=st.sampled_from(["image/png", "image/jpeg", "image/svg+xml"]),
    produced_at=moments,
    source=labels(MAX_NAME_CHARACTERS),
)
predictions = st.builds(
    PredictionMessage,
    id=identifiers,
    inferred_value=labels(MAX_LABEL_CHARACTERS),
    confidence=st.floats(min_value=0, max_value=1),
    model=labels(MAX_NAME_CHARACTERS),
    inferred_at=moments,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def image_fields() -> dict[str, Any]:
    return {
        "ID": "01a1fbf0-4cba-7c80-bfd1-405e91c541a0",
        "GroundTruth": "cat",
        "Data": base64.b64encode(b"image").decode(),
        "ContentType": "image/png",
        "ProducedAt": "2026-11-21T02:23:51.123456Z",
        "Source": "camera-1",
    }


def prediction_fields() -> dict[str, Any]:
    return {
        "ID": "01a1fbf0-4cba-7c80-bfd1-405e91c541a0",
        "InferredValue": "cat",
        "Confidence": 0.5,
        "Model": "resnet18@0123456789ab",
        "InferredAt": "2026-11-21T02:23:51.123456Z",
    }


@given(images)
def test_an_image_comes_back_as_it_went(message: ImageMessage) -> None:
    record = KafkaRecord(message.encode(), message.key)
    assert decode_record(ImageMessage, record, LIMIT) == message


@given(predictions)
def test_a_prediction_comes_back_as_it_went(message: PredictionMessage) -> None:
    record = KafkaRecord(message.encode(), message.key)
    assert decode_record(PredictionMessage, record, LIMIT) == message


def decodes_or_says_why(kind: type[ImageMessage | PredictionMessage], value: bytes) -> None:
    record = KafkaRecord(value)
    try:
        kind.decode(value)
    except InvalidMessage as error:
        headers = dict(DeadLetter.of(record, error, "iot-storage").headers())
    else:
        return
    assert headers["error.class"].decode() in set(Reason)
    assert headers["error.message"]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_reason(value: bytes) -> None:
    decodes_or_says_why(ImageMessage, value)
    decodes_or_says_why(PredictionMessage, value)


@given(st.sampled_from(sorted(image_fields())), json_values)
def test_any_value_in_any_field_of_an_image(name: str, value: object) -> None:
    decodes_or_says_why(ImageMessage, json.dumps(image_fields() | {name: value}).encode())


@given(st.sampled_from(sorted(prediction_fields())), json_values)
def test_any_value_in_any_field_of_a_prediction(name: str, value: object) -> None:
    decodes_or_says_why(PredictionMessage, json.dumps(prediction_fields() | {name: value}).encode())


@given(json_values)
def test_any_json_is_a_message_or_a_reason(value: object) -> None:
    decodes_or_says_why(ImageMessage, json.dumps(value).encode())


@pytest.mark.parametrize(
    "value,reason,words",
    [
        (b"", Reason.INVALID_JSON, "not JSON"),
        (b"\xff\xfe\x00", Reason.INVALID_JSON, "not JSON"),
        (b"{", Reason.INVALID_JSON, "not JSON"),
        (b'{"ID": NaN}', Reason.INVALID_JSON, "line 1 column 8"),
        (rb'{"ID": "\ud800"}', Reason.INVALID_JSON, "surrogate"),
        (b'{"Confidence": 1e400}', Reason.INVALID_JSON, "infinity"),
        ('{"ID": "a"}'.encode("utf-16"), Reason.INVALID_JSON, "UTF-8"),
        (b"[" * 100_000, Reason.INVALID_JSON, "not JSON"),
        (b"9" * 10_000, Reason.INVALID_JSON, "not JSON"),
        (b"[]", Reason.NOT_AN_OBJECT, "array"),
        (b"null", Reason.NOT_AN_OBJECT, "null"),
        (b"{}", Reason.MISSING_FIELD, "ID"),
    ],
)
def test_what_is_no_message_is_refused(value: bytes, reason: Reason, words: str) -> None:
    with pytest.raises(InvalidMessage, match=words) as caught:
        ImageMessage.decode(value)
    assert caught.value.reason is reason


@pytest.mark.parametrize("name", sorted(image_fields()))
def test_each_field_of_an_image_is_needed(name: str) -> None:
    fields = image_fields()
    del fields[name]
    with pytest.raises(InvalidMessage, match=name) as caught:
        ImageMessage.decode(json.dumps(fields).encode())
    assert caught.value.reason is Reason.MISSING_FIELD


@pytest.mark.parametrize("name", sorted(prediction_fields()))
def test_each_field_of_a_prediction_is_needed(name: str) -> None:
    fields = prediction_fields()
    del fields[name]
    with pytest.raises(InvalidMessage, match=name) as caught:
        PredictionMessage.decode(json.dumps(fields).encode())
    assert caught.value.reason is Reason.MISSING_FIELD


@pytest.mark.parametrize(
    "name,value,reason",
    [
        ("ID", "42", Reason.INVALID_FIELD),
        ("ID", "01A1FBF0-4CBA-7C80-BFD1-405E91C541A0", Reason.INVALID_FIELD),
        ("ID", "01a1fbf0-4cba-4c80-bfd1-405e91c541a0", Reason.INVALID_FIELD),
        ("ID", "01a1fbf0-4cba-7c80-bfd1-405e91c541a0\n", Reason.INVALID_FIELD),
        ("ID", 7, Reason.INVALID_FIELD),
        ("GroundTruth", "", Reason.INVALID_FIELD),
        ("GroundTruth", "two\nlines", Reason.INVALID_FIELD),
        ("GroundTruth", "x" * 101, Reason.INVALID_FIELD),
        ("Data", "", Reason.INVALID_FIELD),
        ("Data", "not base64!", Reason.INVALID_BASE64),
        ("Data", "QUJ", Reason.INVALID_BASE64),
        ("Data", "QU JD", Reason.INVALID_BASE64),
        ("Data", "äöü=", Reason.INVALID_BASE64),
        ("ContentType", "text/html", Reason.INVALID_FIELD),
        ("ContentType", "image/png\r\nX: y", Reason.INVALID_FIELD),
        ("ProducedAt", "yesterday", Reason.INVALID_FIELD),
        ("ProducedAt", "2026-13-01T00:00:00Z", Reason.INVALID_FIELD),
        ("ProducedAt", "2026-01-01T00:00:00", Reason.INVALID_FIELD),
        ("ProducedAt", "0001-01-01T00:00:00+23:00", Reason.INVALID_FIELD),
        ("ProducedAt", 1700000000, Reason.INVALID_FIELD),
    ],
)
def test_a_wrong_field_of_an_image_is_named(name: str, value: object, reason: Reason) -> None:
    with pytest.raises(InvalidMessage, match=name) as caught:
        ImageMessage.decode(json.dumps(image_fields() | {name: value}).encode())
    assert caught.value.reason is reason


@pytest.mark.parametrize("confidence", [-0.01, 1.01, "0.5", True, None, [], 10**300])
def test_a_confidence_is_a_number_from_0_to_1(confidence: object) -> None:
    fields = prediction_fields() | {"Confidence": confidence}
    with pytest.raises(InvalidMessage, match="Confidence"):
        PredictionMessage.decode(json.dumps(fields).encode())


def test_a_field_nobody_knows_is_no_error() -> None:
    fields = image_fields() | {"Camera": {"lens": 35}}
    assert ImageMessage.decode(json.dumps(fields).encode()).ground_truth == "cat"


def test_a_time_of_another_zone_is_read() -> None:
    fields = image_fields() | {"ProducedAt": "2026-11-21T04:23:51.1234569+02:00"}
    produced_at = ImageMessage.decode(json.dumps(fields).encode()).produced_at
    assert format_time(produced_at) == "2026-11-21T02:23:51.123456Z"


def test_a_key_must_be_the_id() -> None:
    value = json.dumps(image_fields()).encode()
    assert decode_record(ImageMessage, KafkaRecord(value, key=None), LIMIT).source == "camera-1"
    with pytest.raises(InvalidMessage) as caught:
        decode_record(ImageMessage, KafkaRecord(value, key=b"another"), LIMIT)
    assert caught.value.reason is Reason.KEY_MISMATCH


def test_a_record_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(InvalidMessage, match="more than 10") as caught:
        decode_record(ImageMessage, KafkaRecord(b"{" * 11), 10)
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_record_without_a_value_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="no value"):
        decode_record(ImageMessage, KafkaRecord(None), LIMIT)


@given(moments)
def test_times_sort_as_text(moment: datetime) -> None:
    later = moment + timedelta(microseconds=1)
    assert format_time(moment) < format_time(later)
    assert parse_time(format_time(moment)) == moment


def test_times_are_written_in_utc() -> None:
    moment = datetime(2026, 1, 31, 13, 0, tzinfo=timezone(timedelta(hours=1)))
    assert format_time(moment) == "2026-01-31T12:00:00.000000Z"


def test_ids_sort_by_the_time_they_were_made() -> None:
    made = [uuid7() for _ in range(10_000)]
    assert made == sorted(set(made))
    assert all(map(is_uuid7, made))


def test_an_id_tells_its_time() -> None:
    before = now()
    identifier = uuid7()
    assert abs(uuid7_time(identifier) - before) < timedelta(seconds=5)
    assert first_uuid7(before) <= identifier
    assert is_uuid7(first_uuid7(before))


def id_of(milliseconds: int) -> str:
    digits = f"{milliseconds:012x}"
    return f"{digits[:8]}-{digits[8:]}-7abc-8def-0123456789ab"


@pytest.mark.parametrize(
    "identifier",
    [
        "ffffffff-ffff-7fff-bfff-ffffffffffff",
        "f1234567-89ab-7cde-8f01-23456789abcd",
        first_uuid7(now() + MAX_AHEAD + timedelta(days=1)),
    ],
)
def test_an_id_from_far_ahead_is_refused_and_read_all_the_same(identifier: str) -> None:
    words = r"made at .* more than 24 hours after"
    image = KafkaRecord(json.dumps(image_fields() | {"ID": identifier}).encode())
    with pytest.raises(InvalidMessage, match=words) as caught:
        decode_record(ImageMessage, image, LIMIT)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert decode_record(ImageMessage, image, LIMIT, timedelta.max).id == identifier
    prediction = KafkaRecord(json.dumps(prediction_fields() | {"ID": identifier}).encode())
    with pytest.raises(InvalidMessage, match=words):
        decode_record(PredictionMessage, prediction, LIMIT)


@pytest.mark.parametrize("moment", [datetime(1970, 1, 1, tzinfo=UTC), now() + MAX_AHEAD * 0.9])
def test_an_id_from_long_ago_or_little_ahead_is_taken(moment: datetime) -> None:
    fields = image_fields() | {"ID": first_uuid7(moment)}
    assert ImageMessage.decode(json.dumps(fields).encode()).id == first_uuid7(moment)


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1))
def test_every_id_has_a_time_and_they_sort_alike(one: int, other: int) -> None:
    first, second = sorted((one, other))
    assert uuid7_time(id_of(first)) <= uuid7_time(id_of(second))
    assert first_uuid7(uuid7_time(id_of(first))) <= id_of(first)


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, LOG_APPEND_TIME]))
def test_every_record_has_a_time(timestamp: int, kind: int) -> None:
    record = KafkaRecord(b"", timestamp=timestamp, timestamp_type=kind)
    assert record_time(record).year >= 1970
    # The sender's clock says nothing of when the record came.
    assert arrival_time(record) == (record_time(record) if kind == LOG_APPEND_TIME else None)


def test_a_range_may_begin_before_all_ids() -> None:
    assert first_uuid7(datetime(1, 1, 1, tzinfo=UTC)) == first_uuid7(
        datetime(1970, 1, 1, tzinfo=UTC)
    )


def test_a_dead_letter_says_where_it_came_from() -> None:
    error = InvalidMessage(Reason.INVALID_BASE64, "Data is not base64 äöü" + "." * 1000)
    letter = DeadLetter.of(KafkaRecord(b"x"), error, "iot-inference")
    headers = letter.headers()
    assert DeadLetter.from_headers(headers) == letter
    assert dict(headers)["error.class"] == b"invalid-base64"
    assert dict(headers)["source.offset"] == b"41"
    assert len(dict(headers)["error.message"]) < 1000


@given(st.lists(st.tuples(st.text(), st.none() | st.binary())))
def test_foreign_headers_are_read_without_harm(headers: list[tuple[str, bytes]]) -> None:
    letter = DeadLetter.from_headers(headers)
    assert letter.offset >= -1
