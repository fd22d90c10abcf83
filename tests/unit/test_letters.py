"""Which dead letters are meant, what is known of them, and what belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from iot_pipeline.errors import ConfigError, InvalidMessage, Reason
from iot_pipeline.letters import Letter, Letters, Selection, summary, table
from iot_pipeline.replay import obstacle, of_one_record
from iot_pipeline.schema import DROPPED, REPLAYED, DeadLetter, Handling, Unreadable
from iot_pipeline.settings import ListDeadLettersSettings, load

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
TOPICS = ("iot-topic", "iot-predictions")


@dataclass
class KafkaRecord:
    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    value: bytes | None = b"value"
    timestamp: int = int(NOW.timestamp() * 1000)
    headers: Sequence[tuple[str, bytes | None]] = field(default_factory=tuple)
    timestamp_type: int = 0


class Topic:
    """The dead-letter topic."""

    def __init__(self) -> None:
        self.gathered = Letters()
        self.end = 0

    def buries(
        self,
        offset: int,
        reason: Reason = Reason.INVALID_JSON,
        stage: str = "iot-inference",
        age: timedelta = timedelta(0),
        **parts: Any,
    ) -> Letter:
        refused = KafkaRecord("iot-topic", 2, offset, **({"key": f"key-{offset}".encode()} | parts))
        letter = DeadLetter.of(refused, InvalidMessage(reason, "it says why"), stage)
        sent = int((NOW - age).timestamp() * 1000)
        record = KafkaRecord(
            "iot-dead-letter", 0, self.end, refused.key, refused.value, sent, letter.headers()
        )
        self.end += 1
        self.gathered.saw(record)
        return self.gathered.by_place[0, record.offset]

    def marks(self, letter: Letter, action: str) -> Letter:
        handling = Handling(action=action, partition=0, offset=letter.place[1], by="me@here")
        headers = handling.headers()
        self.gathered.saw(KafkaRecord("iot-dead-letter", 0, self.end, value=b"", headers=headers))
        self.end += 1
        return self.gathered.by_place[letter.place]

    @property
    def letters(self) -> list[Letter]:
        return self.gathered.in_order()


@pytest.fixture
def topic() -> Topic:
    return Topic()


def chosen(topic: Topic, *words: str, **settings: str) -> set[str]:
    flags = {"which": list(words), **settings}
    selection = Selection.of(load(ListDeadLettersSettings, flags, {}), NOW)
    return {letter.position for letter in selection.choose(topic.letters)[0]}


def test_dead_letters_are_told_from_what_was_done_with_them(topic: Topic) -> None:
    first, second, third = (topic.buries(offset) for offset in range(3))
    topic.marks(first, REPLAYED)
    topic.marks(third, DROPPED)
    assert [letter.state for letter in topic.letters] == ["replayed", "open", "dropped"]
    assert topic.gathered.by_place[first.place].to_json()["handled_by"] == "me@here"
    assert second.to_json() == {
        "position": "0:1",
        "key": "key-1",
        "refused_at": "2026-06-01T12:00:00.000000Z",
        "reason": "invalid-json",
        "message": "it says why",
        "stage": "iot-inference",
        "source_topic": "iot-topic",
        "source_partition": 2,
        "source_offset": 1,
        "source_first_offset": 1,
        "bytes": 5,
        "state": "open",
        "handled_at": None,
        "handled_by": None,
    }


def test_a_mark_of_what_is_not_there_changes_nothing(topic: Topic) -> None:
    letter = topic.buries(0)
    for headers in (
        Handling(action=DROPPED, partition=0, offset=99, by="me").headers(),
        Handling(action=DROPPED, partition=7, offset=0, by="me").headers(),
        [("handled.action", b"dropped"), ("handled.offset", b"zero")],
    ):
        topic.gathered.saw(KafkaRecord("iot-dead-letter", 0, 5, headers=headers))
    assert topic.letters == [letter]


def test_open_ones_are_meant_unless_all_are(topic: Topic) -> None:
    topic.buries(0)
    topic.marks(topic.buries(1), REPLAYED)
    assert chosen(topic) == {"0:0"}
    assert chosen(topic, all="true") == {"0:0", "0:1"}


def test_they_are_chosen_by_reason_stage_and_time(topic: Topic) -> None:
    topic.buries(0, Reason.INVALID_JSON, age=timedelta(hours=3))
    topic.buries(1, Reason.NOT_AN_IMAGE, age=timedelta(hours=2))
    topic.buries(2, Reason.TOO_LARGE, "iot-storage", age=timedelta(hours=1))
    assert chosen(topic, reason="not-an-image") == {"0:1"}
    assert chosen(topic, reason="not-an-image, too-large") == {"0:1", "0:2"}
    assert chosen(topic, reason="made-up") == set()
    assert chosen(topic, stage="iot-storage") == {"0:2"}
    assert chosen(topic, since="2h") == {"0:1", "0:2"}
    assert chosen(topic, until="2h") == {"0:0"}
    assert chosen(topic, since="2026-06-01T09:30:00Z", until="90m") == {"0:1"}
    assert chosen(topic, since="2h", stage="iot-inference") == {"0:1"}
    with pytest.raises(ConfigError, match="--until"):
        chosen(topic, until="noon")


def test_they_are_named_by_position_and_by_key(
    topic: Topic, capsys: pytest.CaptureFixture[str]
) -> None:
    for offset in range(3):
        topic.buries(offset)
    assert chosen(topic, "0:0", "key-2") == {"0:0", "0:2"}
    assert capsys.readouterr().err == ""
    assert chosen(topic, "0:1", "0:9") == {"0:1"}
    assert "0:9: no such dead letter is open" in capsys.readouterr().err


def test_the_dead_letters_of_one_record_belong_together(topic: Topic) -> None:
    one = topic.buries(0, stage="iot-inference")
    topic.buries(1)
    other = topic.buries(0, stage="iot-storage")
    assert of_one_record([other], topic.letters) == [[one, other]]


def test_a_mark_keeps_a_dead_letter_out_unless_it_is_meant(topic: Topic) -> None:
    one = topic.marks(topic.buries(0), REPLAYED)
    other = topic.buries(0)
    assert of_one_record([other], topic.letters) == [[other]]
    assert of_one_record([one, other], topic.letters) == [[one, other]]


@pytest.mark.parametrize("key,value", [(b"other", b"value"), (b"key-0", b"other")])
def test_a_topic_that_was_made_anew_has_other_records_at_the_same_place(
    topic: Topic, key: bytes, value: bytes
) -> None:
    old, new = topic.buries(0), topic.buries(0, key=key, value=value)
    assert of_one_record([old, new], topic.letters) == [[old], [new]]


def test_what_cannot_be_replayed_is_told(topic: Topic) -> None:
    letter = topic.buries(0)
    assert obstacle(letter, TOPICS, lambda _: True) == ""
    assert "does not exist any more" in obstacle(letter, TOPICS, lambda _: False)
    assert "no topic of this pipeline" in obstacle(letter, ("another",), lambda _: True)
    for value in (None, b""):
        assert obstacle(topic.buries(6, value=value), TOPICS, lambda _: True) == ""
    left_out = obstacle(unreadable(5, 7), TOPICS, lambda _: True)
    assert "its value was left out" in left_out
    assert "iot-topic-2@5-7" in left_out


def unreadable(first: int, last: int) -> Letter:
    error = InvalidMessage(Reason.UNREADABLE, "the batch cannot be decoded")
    record = Unreadable(
        topic="iot-topic", partition=2, first_offset=first, offset=last, error=error
    )
    headers = DeadLetter.of(record, error, "iot-storage").headers()
    return Letter.of(KafkaRecord("iot-dead-letter", 0, 0, None, None, headers=headers))


def test_records_that_could_not_be_decoded_have_one_letter_that_says_which() -> None:
    letter = unreadable(5, 7)
    assert letter.about.without_value
    assert (letter.source, letter.id, letter.key) == ("iot-topic-2@5-7", "", None)
    content = letter.to_json()
    assert (content["source_first_offset"], content["source_offset"]) == (5, 7)
    assert (content["reason"], content["bytes"]) == ("unreadable", 0)
    assert unreadable(7, 7).source == "iot-topic-2@7"


NUMBERS = (b"", b"-1", b"9" * 5000, "\u0663".encode(), b"\xff", None, b"1 ", b"0x1")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["source.offset", "source.first_offset", "handled.offset"])
def test_headers_that_others_wrote_are_survived(
    topic: Topic, name: str, number: bytes | None
) -> None:
    headers = [(name, number), ("error.class", None), ("\ufffd", b"\xff"), ("a", b"1"), ("a", b"2")]
    if name.startswith("handled"):
        headers.append(("handled.action", b"dropped"))
    topic.gathered.saw(KafkaRecord("iot-dead-letter", 0, 5, None, None, headers=headers))
    for letter in topic.letters:
        assert (letter.about.offset, letter.about.first_offset) == (-1, -1)
        assert letter.to_json()["reason"] == ""
        assert table([letter])


def test_what_others_wrote_does_not_reach_the_terminal_as_it_is(topic: Topic) -> None:
    letter = topic.buries(0, key=b"\x1b[2J\xff")
    shown = table([letter]) + summary([letter])
    assert "\x1b" not in shown
    assert "[2J" in shown
