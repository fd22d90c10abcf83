"""Everything that crosses a process boundary: messages, dead letters and the stored document.

`iot-topic` carries `ImageMessage`, `iot-predictions` carries `PredictionMessage`; both are JSON
objects, keyed by the image's id. The database holds one document an image: the fields of both
messages, merged.

Decoding accepts any bytes and either returns a message or raises `InvalidMessage` with the reason.
Fields that nobody here knows are ignored, so that a newer producer does not break an older
consumer.
"""

from __future__ import annotations

import base64
import binascii
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, Self, TypeVar

import orjson

from iot_pipeline.errors import InvalidMessage, Reason

CLASSES: tuple[str, ...] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
"""CIFAR-10's classes in the order of its labels. A message may carry other labels: a data set and a
model name their own."""

MAX_LABEL_CHARACTERS = 100
MAX_NAME_CHARACTERS = 255
MAX_REASON_CHARACTERS = 500
MAX_AHEAD = timedelta(days=1)
"""How far the clock that made an id may be ahead of ours. Ids further on would stand behind all
others in the database for good."""

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_RFC3339 = re.compile(
    r"(?P<second>\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d+))?(?P<zone>[Zz]|[+-]\d\d:\d\d)",
    re.ASCII,
)
# Kafka's numbers have 63 bits at most.
_OFFSET = re.compile("[0-9]{1,19}")
_MEDIA_TYPE = re.compile(r"image/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,99}")


# A UUID's 48 bits of milliseconds, and a record's 64, reach further than `datetime`.
_LAST_MILLISECOND = 253_402_300_799_999  # of the year 9999


def _moment(milliseconds: int) -> datetime:
    """Milliseconds since 1970 as a time; the nearest there is for those that have none."""
    return datetime.fromtimestamp(min(max(0, milliseconds), _LAST_MILLISECOND) / 1000, tz=UTC)


class _Uuid7Clock:
    """Hands out 60-bit times (milliseconds and 12 bits below) that never repeat nor go back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        milliseconds, rest = divmod(time.time_ns(), 1_000_000)
        now = milliseconds << 12 | rest * 4096 // 1_000_000
        with self._lock:
            self._last = max(now, self._last + 1)
            return self._last


_uuid7_clock = _Uuid7Clock()
# Seeded by the operating system, once. To ask it for each id would cost as much as the rest of an
# image's message, and let other threads go first each time. Ids are no secrets.
_uuid7_random = random.Random()


def uuid7() -> str:
    """A new id: a UUID version 7 of RFC 9562 in lower case.

    Ids sort by the time they were made, also within a millisecond (method 3 of section 6.2: the 12
    bits after the milliseconds hold the fraction), which keeps the database's writes sequential.
    """
    ticks = _uuid7_clock.next()
    chance = _uuid7_random.getrandbits(62)
    return (
        f"{ticks >> 28:08x}-{ticks >> 12 & 0xFFFF:04x}-7{ticks & 0xFFF:03x}-"
        f"{0x8000 | chance >> 48:04x}-{chance & 0xFFFFFFFFFFFF:012x}"
    )


def uuid7_time(identifier: str) -> datetime:
    """When an id was made, to the millisecond, by the clock of who made it."""
    return _moment(_uuid7_milliseconds(identifier))


def _uuid7_milliseconds(identifier: str) -> int:
    return int(identifier[:8] + identifier[9:13], 16)


def first_uuid7(moment: datetime) -> str:
    """The smallest id that could have been made at `moment` or later, to start a range with."""
    digits = f"{max(0, int(moment.timestamp() * 1000)):012x}"
    return f"{digits[:8]}-{digits[8:]}-7000-8000-000000000000"


def is_uuid7(text: str) -> bool:
    """Whether a text is an id as `uuid7` makes them."""
    return bool(_UUID7.fullmatch(text))


def record_time(record: Record) -> datetime:
    """The time that a record bears: see `arrival_time` for whose."""
    return _moment(record.timestamp)


def arrival_time(record: Record) -> datetime | None:
    """When a broker took a record; None where its time is that of the sender's clock.

    The topics' `message.timestamp.type` says which of the two it is.
    """
    return record_time(record) if record.timestamp_type == LOG_APPEND_TIME else None


def now() -> datetime:
    """The present time in UTC."""
    return datetime.now(tz=UTC)


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds: such strings sort like the times they stand for."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """Read an RFC 3339 time of any zone. Digits below the microsecond are dropped.

    Raises:
        ValueError: the text is something else.
    """
    match = _RFC3339.fullmatch(text)
    if not match:
        raise ValueError("not an RFC 3339 time such as 2026-01-31T12:00:00.000000Z")
    zone = match["zone"].upper().replace("Z", "+00:00")
    fraction = (match["fraction"] or "")[:6].ljust(6, "0")
    try:
        moment = datetime.fromisoformat(f"{match['second'].upper()}.{fraction}{zone}")
        return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("a time outside the years 1 to 9999") from error


class _Fields:
    """Reads fields of one decoded JSON object and says which one is wrong and why."""

    def __init__(self, value: bytes) -> None:
        try:
            decoded = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise InvalidMessage(Reason.INVALID_JSON, f"not JSON: {error}") from error
        if not isinstance(decoded, dict):
            raise InvalidMessage(
                Reason.NOT_AN_OBJECT, f"a JSON object is needed, not {_json_type(decoded)}"
            )
        self._object: dict[str, Any] = decoded

    def text(self, name: str, limit: int) -> str:
        if name not in self._object:
            raise InvalidMessage(Reason.MISSING_FIELD, f"{name} is missing")
        value = self._object[name]
        if not isinstance(value, str):
            raise _invalid(name, f"must be a string, not {_json_type(value)}")
        if not value:
            raise _invalid(name, "is empty")
        if len(value) > limit:
            raise _invalid(name, f"has {len(value)} characters, more than {limit}")
        return value

    def label(self, name: str, limit: int) -> str:
        value = self.text(name, limit)
        if not value.isprintable():
            raise _invalid(name, "holds characters that cannot be printed")
        return value

    def identifier(self, name: str, ahead: timedelta) -> str:
        value = self.text(name, MAX_NAME_CHARACTERS)
        if not is_uuid7(value):
            raise _invalid(name, "must be a UUID version 7 in lower case")
        limit = ahead.total_seconds()
        if _uuid7_milliseconds(value) / 1000 - time.time() > limit:
            raise _invalid(
                name,
                f"was made at {format_time(uuid7_time(value))}, more than {limit / 3600:g} hours "
                f"after now, {format_time(now())}: one of the clocks is wrong",
            )
        return value

    def moment(self, name: str) -> datetime:
        try:
            return parse_time(self.text(name, MAX_LABEL_CHARACTERS))
        except ValueError as error:
            raise _invalid(name, f"is {error}") from error

    def media_type(self, name: str) -> str:
        value = self.text(name, MAX_LABEL_CHARACTERS)
        if not _MEDIA_TYPE.fullmatch(value):
            raise _invalid(name, "must be the media type of an image, such as image/png")
        return value

    def share(self, name: str) -> float:
        if name not in self._object:
            raise InvalidMessage(Reason.MISSING_FIELD, f"{name} is missing")
        value = self._object[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _invalid(name, f"must be a number, not {_json_type(value)}")
        if not 0 <= value <= 1:
            raise _invalid(name, "must lie between 0 and 1")
        return float(value)

    def base64(self, name: str, limit: int) -> bytes:
        value = self.text(name, limit)
        try:
            return base64.b64decode(value.encode("ascii"), validate=True)
        except (ValueError, binascii.Error) as error:
            raise InvalidMessage(Reason.INVALID_BASE64, f"{name} is not base64: {error}") from error


def _invalid(name: str, problem: str) -> InvalidMessage:
    return InvalidMessage(Reason.INVALID_FIELD, f"{name} {problem}")


def _json_type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "an array", dict: "an object", type(None): "null"}
    return names[type(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMessage:
    """One image on its way, as it stands in `iot-topic`.

    `data` is the image file's bytes (in JSON: base64, in the field `Data`). `content_type` is its
    media type. `source` names the device or host that took it. `ground_truth` is its true class.
    """

    id: str
    ground_truth: str
    data: bytes
    content_type: str
    produced_at: datetime
    source: str

    @property
    def key(self) -> bytes:
        """The record's key: it sends an image and its prediction to partitions of one number."""
        return self.id.encode("ascii")

    def fields(self) -> dict[str, Any]:
        """The message as JSON's types."""
        return {
            "ID": self.id,
            "GroundTruth": self.ground_truth,
            "Data": base64.b64encode(self.data).decode("ascii"),
            "ContentType": self.content_type,
            "ProducedAt": format_time(self.produced_at),
            "Source": self.source,
        }

    def encode(self) -> bytes:
        """The record's value. Check its size where it is sent: see `kafka.Sender.send`."""
        return orjson.dumps(self.fields())

    @classmethod
    def decode(cls, value: bytes, ahead: timedelta = MAX_AHEAD) -> Self:
        """Read a record's value. Its id's time may be so far `ahead` of now.

        Raises:
            InvalidMessage: with the reason.
        """
        fields = _Fields(value)
        return cls(
            id=fields.identifier("ID", ahead),
            ground_truth=fields.label("GroundTruth", MAX_LABEL_CHARACTERS),
            data=fields.base64("Data", len(value)),
            content_type=fields.media_type("ContentType"),
            produced_at=fields.moment("ProducedAt"),
            source=fields.label("Source", MAX_NAME_CHARACTERS),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionMessage:
    """What a model saw in one image, as it stands in `iot-predictions`.

    `confidence` is the softmax probability of `inferred_value`, from 0 to 1. `model` is the model's
    name, `@`, and the first 12 digits of its weights' sha256.
    """

    id: str
    inferred_value: str
    confidence: float
    model: str
    inferred_at: datetime

    @property
    def key(self) -> bytes:
        """The record's key, the same as the image's."""
        return self.id.encode("ascii")

    def fields(self) -> dict[str, Any]:
        """The message as JSON's types."""
        return {
            "ID": self.id,
            "InferredValue": self.inferred_value,
            "Confidence": self.confidence,
            "Model": self.model,
            "InferredAt": format_time(self.inferred_at),
        }

    def encode(self) -> bytes:
        """The record's value."""
        return orjson.dumps(self.fields())

    @classmethod
    def decode(cls, value: bytes, ahead: timedelta = MAX_AHEAD) -> Self:
        """Read a record's value. Its id's time may be so far `ahead` of now.

        Raises:
            InvalidMessage: with the reason.
        """
        fields = _Fields(value)
        return cls(
            id=fields.identifier("ID", ahead),
            inferred_value=fields.label("InferredValue", MAX_LABEL_CHARACTERS),
            confidence=fields.share("Confidence"),
            model=fields.label("Model", MAX_NAME_CHARACTERS),
            inferred_at=fields.moment("InferredAt"),
        )


Message = ImageMessage | PredictionMessage


LOG_APPEND_TIME = 1
"""A record's time is the broker's clock (`message.timestamp.type=LogAppendTime`)."""


class Record(Protocol):
    """The parts of a consumed Kafka record that this module reads."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int
    """Milliseconds since 1970, or -1."""
    timestamp_type: int
    """LOG_APPEND_TIME, or 0: CreateTime."""


@dataclass(slots=True, kw_only=True)
class Unreadable:
    """Stands for records that could not be decoded: all from `first_offset` to `offset`."""

    topic: str
    partition: int
    first_offset: int
    offset: int
    error: InvalidMessage
    """Why."""
    key: bytes | None = None
    value: bytes | None = None
    timestamp: int = -1
    timestamp_type: int = 0
    """1 where the time is the broker's, 0 where it is the sender's."""
    headers: tuple[tuple[str, bytes], ...] = ()


MessageT = TypeVar("MessageT", ImageMessage, PredictionMessage)


def decode_record(
    kind: type[MessageT], record: Record, max_bytes: int, ahead: timedelta = MAX_AHEAD
) -> MessageT:
    """Read a consumed record: `kind.decode`, and the checks that need the record around the value.

    A record without a key is taken, so that any Kafka tool can send one; a key must be the id.

    Raises:
        InvalidMessage: with the reason.
    """
    if isinstance(record, Unreadable):
        raise record.error
    value = record.value
    if value is None:
        raise InvalidMessage(Reason.INVALID_JSON, "the record has no value")
    size = len(value) + len(record.key or b"")
    if size > max_bytes:
        raise InvalidMessage(
            Reason.TOO_LARGE, f"the record has {size} bytes, more than {max_bytes}"
        )
    message = kind.decode(value, ahead)
    if record.key is not None and record.key != message.key:
        raise InvalidMessage(Reason.KEY_MISMATCH, f"the record's key is not its ID {message.id}")
    return message


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """Why, where and out of which record a dead letter was made: its headers.

    The dead letter's key and value are the refused record's, untouched. Its headers are not kept.
    """

    reason: str
    message: str
    stage: str
    topic: str
    partition: int
    offset: int
    first_offset: int = -1
    """Not negative where it stands for several records that could not be decoded: the first one's
    offset; `offset` is the last one's."""
    without_value: bool = False
    """Whether the value was left out: it could not be decoded, or was too large to go along."""

    @classmethod
    def of(cls, record: Record, error: InvalidMessage, stage: str) -> Self:
        """Describe `record`, refused by `stage` (a service's name) because of `error`."""
        return cls(
            reason=error.reason.value,
            message=str(error)[:MAX_REASON_CHARACTERS],
            stage=stage,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            first_offset=getattr(record, "first_offset", -1),
            without_value=isinstance(record, Unreadable),
        )

    def headers(self) -> list[tuple[str, bytes]]:
        """The record headers, UTF-8."""
        texts = {
            "error.class": self.reason,
            "error.message": self.message,
            "stage": self.stage,
            "source.topic": self.topic,
            "source.partition": str(self.partition),
            "source.offset": str(self.offset),
        }
        if 0 <= self.first_offset < self.offset:
            texts["source.first_offset"] = str(self.first_offset)
        if self.without_value:
            texts["source.value"] = LEFT_OUT
        return [(name, text.encode("utf-8", "replace")) for name, text in texts.items()]

    @classmethod
    def from_headers(cls, headers: Iterable[tuple[str, bytes]]) -> Self:
        """Read headers back. What is missing becomes `unknown` and -1: anyone can write there."""
        texts = _texts(headers)
        return cls(
            reason=texts.get("error.class", "unknown"),
            message=texts.get("error.message", "unknown"),
            stage=texts.get("stage", "unknown"),
            topic=texts.get("source.topic", "unknown"),
            partition=_number_or(texts.get("source.partition"), -1),
            offset=_number_or(texts.get("source.offset"), -1),
            first_offset=_number_or(texts.get("source.first_offset"), -1),
            without_value=texts.get("source.value") == LEFT_OUT,
        )


LEFT_OUT = "left out"
REPLAYED = "replayed"
DROPPED = "dropped"
REPLAYED_FROM = "replayed.from"
"""Header of a record that was sent again: the dead letter, as `topic-partition@offset`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """That someone is done with a dead letter: the headers of a record that has nothing else.

    Kafka takes no single record out of a topic, so it stands behind the letter, in the letter's own
    partition: there Kafka keeps it at least as long.
    """

    action: str
    """REPLAYED or DROPPED."""
    partition: int
    offset: int
    by: str

    def headers(self) -> list[tuple[str, bytes]]:
        """The record headers, UTF-8."""
        texts = {
            "handled.action": self.action,
            "handled.partition": str(self.partition),
            "handled.offset": str(self.offset),
            "handled.by": self.by,
        }
        return [(name, text.encode("utf-8", "replace")) for name, text in texts.items()]

    @classmethod
    def from_headers(cls, headers: Iterable[tuple[str, bytes]]) -> Self | None:
        """Read headers back; None for those of a dead letter."""
        texts = _texts(headers)
        if "handled.action" not in texts:
            return None
        return cls(
            action=texts["handled.action"],
            partition=_number_or(texts.get("handled.partition"), -1),
            offset=_number_or(texts.get("handled.offset"), -1),
            by=texts.get("handled.by", "unknown"),
        )


def _texts(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    return {name: (value or b"").decode("utf-8", "replace") for name, value in headers}


def _number_or(text: str | None, otherwise: int) -> int:
    return int(text) if text and _OFFSET.fullmatch(text) else otherwise


Document = dict[str, Any]
"""A stored document as the database's JSON: `_id`, `_rev`, and the fields below."""

REVISION = "_rev"
"""Stands for the state of the document that was read, whichever database it is of."""

# What belongs to the database's state and not to the document: which of its states this is, and
# what CouchDB tells of files attached to it. The pipeline attaches none.
_STATE = (REVISION, "_attachments")

IMAGE_FIELDS: tuple[str, ...] = ("GroundTruth", "Data", "ContentType", "ProducedAt", "Source")
PREDICTION_FIELDS: tuple[str, ...] = ("InferredValue", "Confidence", "Model", "InferredAt")
_IMAGE = {"_id", "ID", *IMAGE_FIELDS}
_PREDICTION = {"_id", "ID", *PREDICTION_FIELDS}
_COMPLETE = {*IMAGE_FIELDS, *PREDICTION_FIELDS}

STORED_AT = "StoredAt"
"""When the document first held both image and prediction: set by the store, never moved later."""


def document(message: Message) -> Document:
    """The document that holds this message alone."""
    return {"_id": message.id, **message.fields()}


def content(stored: Document) -> Document:
    """What is the same in every database: the document without what belongs to one's state."""
    return {name: value for name, value in stored.items() if name not in _STATE}


def is_complete(stored: Document) -> bool:
    """Whether both the image and its prediction have arrived."""
    return stored.keys() >= _COMPLETE


def merge(one: Document, other: Document) -> Document:
    """Join two states of one image's document.

    The order, the grouping and the repetition of merges make no difference, so messages may come
    late, twice or in any order. Where two images or two predictions of one id differ, one is taken
    whole, so that a confidence never stands beside another model's answer: the image produced
    first, since an image is produced once; and the prediction made last, since a better model may
    look again. Equal times are decided by content. Other fields of the database's users are kept.

    `_rev` is left out: it belongs to the database's state, not to the image's.
    """
    if one["_id"] != other["_id"]:
        raise ValueError(f"documents of two images: {one['_id']} and {other['_id']}")
    if one.keys() == _IMAGE and other.keys() == _PREDICTION and one["ID"] == other["ID"]:
        return {**one, **other}  # as below would find: nearly all merges are of these two
    merged: Document = {"_id": one["_id"]}
    merged |= _choose(one, other, IMAGE_FIELDS, "ProducedAt", min)
    merged |= _choose(one, other, PREDICTION_FIELDS, "InferredAt", max)
    for name in one.keys() | other.keys():
        if name in merged or name == REVISION or name in IMAGE_FIELDS or name in PREDICTION_FIELDS:
            continue
        values = [state[name] for state in (one, other) if name in state]
        merged[name] = (min if name == STORED_AT else max)(values, key=_canonical)
    return merged


def _choose(
    one: Document,
    other: Document,
    names: tuple[str, ...],
    time_field: str,
    prefer: Callable[..., Document],
) -> Document:
    parts = [{name: state[name] for name in names if name in state} for state in (one, other)]
    candidates = [part for part in parts if part]
    if not candidates:
        return {}
    # A part that an outsider left without some of its fields gives way to a whole one.
    most = max(len(part) for part in candidates)
    candidates = [part for part in candidates if len(part) == most]
    if len(candidates) == 1:
        return candidates[0]
    return prefer(candidates, key=lambda part: (str(part.get(time_field, "")), _canonical(part)))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)
