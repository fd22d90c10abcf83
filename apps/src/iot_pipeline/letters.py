"""`iot-pipeline dead-letters list` and `show`: what could not be handled, and why.

Kafka takes no single record out of a topic. So that someone is done with a dead letter stands
behind it, in a record of its own (`schema.Handling`). A dead letter without one is open.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

from kafka.structs import TopicPartition

from iot_pipeline.errors import Exit
from iot_pipeline.progress import Progress
from iot_pipeline.reading import begins_of, ends_of, parse_moment, read, reading
from iot_pipeline.schema import LEFT_OUT, DeadLetter, Handling, format_time, now, record_time
from iot_pipeline.service import set_up_logging
from iot_pipeline.settings import (
    DeadLetterSettings,
    ListDeadLettersSettings,
    ShowDeadLettersSettings,
)

SHOWN_CHARACTERS = 1000
NO_VALUE = "none"

Place = tuple[int, int]
"""Where a record of the dead-letter topic stands: partition, offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A dead letter without its bytes: all of them together may be more than fits into memory."""

    place: Place
    key: bytes | None
    size: int
    """Bytes of the value."""
    digest: bytes
    """The value's SHA-256."""
    refused_at: datetime
    about: DeadLetter
    handling: Handling | None = None
    handled_at: datetime | None = None

    @classmethod
    def of(cls, record: Any) -> Self:
        """The dead letter that a record of the dead-letter topic is."""
        value = record.value or b""
        return cls(
            place=(record.partition, record.offset),
            key=record.key,
            size=len(value),
            digest=hashlib.sha256(value).digest(),
            refused_at=record_time(record),
            about=DeadLetter.from_headers(record.headers),
        )

    @property
    def position(self) -> str:
        """Where it stands, as people write it."""
        return f"{self.place[0]}:{self.place[1]}"

    @property
    def id(self) -> str:
        """The record's key as text: the image's id, unless that was what was wrong."""
        return (self.key or b"").decode("utf-8", "replace")

    @property
    def first_offset(self) -> int:
        """Where the refused record stood, or the first of several."""
        return self.about.offset if self.about.first_offset < 0 else self.about.first_offset

    @property
    def source(self) -> str:
        """Where the refused record stood, or the refused records did."""
        first, last = self.first_offset, self.about.offset
        offsets = str(last) if first == last else f"{first}-{last}"
        return f"{self.about.topic}-{self.about.partition}@{offsets}"

    @property
    def state(self) -> str:
        """`open`, `replayed` or `dropped`."""
        return self.handling.action if self.handling else "open"

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return {
            "position": self.position,
            "key": None if self.key is None else self.id,
            "refused_at": format_time(self.refused_at),
            "reason": self.about.reason,
            "message": self.about.message,
            "stage": self.about.stage,
            "source_topic": self.about.topic,
            "source_partition": self.about.partition,
            "source_offset": self.about.offset,
            "source_first_offset": self.first_offset,
            "bytes": self.size,
            "state": self.state,
            "handled_at": format_time(self.handled_at) if self.handled_at else None,
            "handled_by": self.handling.by if self.handling else None,
        }


class Letters:
    """Gathers dead letters from the records of their topic."""

    def __init__(self) -> None:
        self.by_place: dict[Place, Letter] = {}

    def saw(self, record: Any) -> None:
        """Take the next record of a partition."""
        handling = Handling.from_headers(record.headers)
        if handling is None:
            letter = Letter.of(record)
            self.by_place[letter.place] = letter
            return
        place = (handling.partition, handling.offset)
        if place in self.by_place:
            self.by_place[place] = replace(
                self.by_place[place], handling=handling, handled_at=record_time(record)
            )

    def in_order(self) -> list[Letter]:
        """All of them, the oldest first."""
        return sorted(self.by_place.values(), key=lambda it: (it.refused_at, it.place))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which dead letters are meant."""

    names: frozenset[str] = frozenset()
    """Positions and keys; none: whatever they are."""
    reasons: frozenset[str] = frozenset()
    """None: whatever the reason."""
    stage: str = ""
    since: datetime | None = None
    until: datetime | None = None
    handled: bool = False
    """Whether also those that someone is done with."""

    @classmethod
    def of(cls, settings: DeadLetterSettings, at: datetime) -> Self:
        """What the settings say.

        Args:
            settings: of any of the commands.
            at: the present time.

        Raises:
            ConfigError: a time is none.
        """
        return cls(
            names=frozenset(settings.which.split()),
            reasons=frozenset(settings.reason.replace(",", " ").split()),
            stage=settings.stage,
            since=parse_moment("since", settings.since, at),
            until=parse_moment("until", settings.until, at),
            handled=getattr(settings, "all", False),
        )

    def takes(self, letter: Letter) -> bool:
        """Whether this one is meant."""
        return (
            (not self.names or not self.names.isdisjoint((letter.position, letter.id)))
            and (not self.reasons or letter.about.reason in self.reasons)
            and (not self.stage or letter.about.stage == self.stage)
            and (self.since is None or letter.refused_at >= self.since)
            and (self.until is None or letter.refused_at < self.until)
            and (self.handled or letter.handling is None)
        )

    def choose(self, letters: Sequence[Letter]) -> tuple[list[Letter], bool]:
        """Those of the letters that are meant, and whether each name is one of theirs."""
        chosen = [letter for letter in letters if self.takes(letter)]
        absent = self.names - {name for it in chosen for name in (it.position, it.id)}
        for name in sorted(absent):
            complain(f"{name}: no such dead letter{'' if self.handled else ' is open'}")
        return chosen, not absent


def read_letters(consumer: Any, settings: DeadLetterSettings, progress: Progress) -> list[Letter]:
    """Read the whole dead-letter topic.

    Raises:
        SinkUnavailable: the broker does not answer, or there is no such topic.
    """
    topic = settings.dead_letter_topic
    ends = ends_of(consumer, [topic], settings)[topic]
    letters = Letters()
    try:
        read(consumer, begins_of(consumer, ends), ends, letters.saw, progress)
    finally:
        progress.clear()
    return letters.in_order()


def read_again(
    consumer: Any,
    settings: DeadLetterSettings,
    places: Collection[Place],
    saw: Callable[[Any], None],
    progress: Progress,
) -> None:
    """Call `saw` with the records at these places: with their bytes, which no `Letter` has.

    Raises:
        SinkUnavailable: the broker does not answer.
    """
    begins: dict[TopicPartition, int] = {}
    ends: dict[TopicPartition, int] = {}
    for number, offset in places:
        partition = TopicPartition(settings.dead_letter_topic, number)
        begins[partition] = min(begins.get(partition, offset), offset)
        ends[partition] = max(ends.get(partition, 0), offset + 1)

    def saw_one(record: Any) -> None:
        if (record.partition, record.offset) in places:
            saw(record)

    try:
        read(consumer, begins, ends, saw_one, progress)
    finally:
        progress.clear()


def complain(text: str) -> None:
    """Say what is not as one would expect."""
    sys.stderr.write(f"iot-pipeline dead-letters: {plain(text)}\n")


def plain(text: str) -> str:
    """Text that others wrote, fit for a terminal."""
    return "".join(character if character.isprintable() else "\N{MIDDLE DOT}" for character in text)


def summary(letters: Collection[Letter]) -> str:
    """How many there are, and of which reasons."""
    reasons = Counter(letter.about.reason for letter in letters).most_common()
    counts = ", ".join(f"{plain(reason)} {count}" for reason, count in reasons)
    return f"{len(letters)} dead letter{'' if len(letters) == 1 else 's'}: {counts}"


def table(letters: Sequence[Letter]) -> str:
    """A line for each."""
    rows = [("POSITION", "REFUSED AT", "REASON", "STAGE", "SOURCE", "KEY", "STATE")]
    rows += [
        (
            letter.position,
            _second(letter.refused_at),
            letter.about.reason,
            letter.about.stage,
            letter.source,
            letter.id or "-",
            letter.state,
        )
        for letter in letters
    ]
    columns = [[plain(cell) for cell in column] for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    )


def _second(moment: datetime) -> str:
    return f"{format_time(moment)[:19]}Z"


def _description(letter: Letter, value: bytes | None) -> str:
    state = letter.state
    if letter.handling and letter.handled_at:
        state += f" at {_second(letter.handled_at)} by {letter.handling.by}"
    about = letter.about
    lines = {
        "position": letter.position,
        "state": state,
        "refused at": _second(letter.refused_at),
        "stage": about.stage,
        "reason": about.reason,
        "message": about.message,
        "source": letter.source,
        "key": letter.id or "-",
        "bytes": str(letter.size),
        "value": NO_VALUE if value is None else value[:SHOWN_CHARACTERS].decode("utf-8", "replace"),
    }
    if about.without_value:
        lines["value"] = LEFT_OUT
    text = "".join(f"{name:<12}{plain(content)}\n" for name, content in lines.items())
    return text + ("            …\n" if value and value[SHOWN_CHARACTERS:] else "")


def none_chosen(letters: Collection[Letter]) -> str:
    """What to say where none is meant."""
    still_open = [letter for letter in letters if letter.handling is None]
    return f"none is meant; open: {summary(still_open)}" if still_open else "none is open"


def _list(letters: Sequence[Letter], *, as_json: bool) -> None:
    if as_json:
        for letter in letters:
            print(json.dumps(letter.to_json()))
    elif letters:
        print(f"{table(letters)}\n\n{summary(letters)}")


def run(settings: ListDeadLettersSettings) -> int:
    """List or show dead letters, and return the exit status.

    Raises:
        SinkUnavailable: the broker does not answer.
        ConfigError: a setting cannot be used, or the topic may not be read.
    """
    set_up_logging("warning")
    selection = Selection.of(settings, now())
    with reading(settings) as consumer:
        letters = read_letters(consumer, settings, Progress())
        chosen, found = selection.choose(letters)
        if not isinstance(settings, ShowDeadLettersSettings):
            _list(chosen, as_json=settings.json)
        else:
            by_place = {letter.place: letter for letter in chosen}

            def show(record: Any) -> None:
                letter, value = by_place[record.partition, record.offset], record.value
                if settings.json:
                    whole = None if value is None else base64.b64encode(value).decode("ascii")
                    print(json.dumps(letter.to_json() | {"value": whole}))
                else:
                    print(_description(letter, value))

            read_again(consumer, settings, by_place, show, Progress())
            found = found and bool(chosen)
    if not chosen:
        complain(none_chosen(letters))
    return Exit.OK if found else Exit.FAILED
