"""`iot-pipeline dead-letters replay` and `drop`: send a refused record again, or be done with it.

A replay sends a record's key and bytes, untouched, back to the topic that it came from, so its id
stays. Once Kafka has confirmed that, and not before, its dead letter is marked. So a replay that
was cut off leaves none out when it is done again. It may send a record twice, which makes no
difference: all that comes of a record is keyed by its id.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kafka.errors import KafkaError

from iot_pipeline.errors import Exit, RecordTooLarge, SinkUnavailable, UsageError
from iot_pipeline.kafka import Sender, describe_error
from iot_pipeline.letters import (
    Letter,
    Place,
    Selection,
    complain,
    none_chosen,
    read_again,
    read_letters,
    summary,
    table,
)
from iot_pipeline.progress import Progress
from iot_pipeline.reading import reading
from iot_pipeline.schema import DROPPED, REPLAYED, REPLAYED_FROM, DeadLetter, Handling, now
from iot_pipeline.service import set_up_logging
from iot_pipeline.settings import (
    DeadLetterSettings,
    DropDeadLettersSettings,
    ReplayDeadLettersSettings,
)

# What travels together, and is marked then: as much is sent twice after a replay that was cut off.
BATCH_RECORDS = 100
BATCH_BYTES = 8 * 1024 * 1024
SHOWN = 10
# The services' IOT_MAX_CONSECUTIVE_DEAD_LETTERS, where nobody has set it.
STOPPING = 100


def of_one_record(chosen: Collection[Letter], letters: Sequence[Letter]) -> list[list[Letter]]:
    """Put together the dead letters of each record that is to be replayed.

    Two services may refuse the same record, and both get it again. The record's place alone does
    not tell it: a topic that was made anew counts from 0 again.

    Args:
        chosen: what is to be replayed.
        letters: all there are.

    Returns:
        For each record the one to send, and the others that are done with then.
    """
    places = {letter.place for letter in chosen}
    records: dict[tuple[Any, ...], list[Letter]] = {}
    for letter in letters:
        if letter.place in places or letter.handling is None:
            records.setdefault((letter.source, letter.key, letter.digest), []).append(letter)
    return [same for same in records.values() if any(letter.place in places for letter in same)]


def obstacle(letter: Letter, topics: Sequence[str], exists: Callable[[str], bool]) -> str:
    """What keeps a dead letter from being replayed, or the empty string.

    Args:
        letter: the dead letter.
        topics: those of the pipeline that stages read.
        exists: whether a topic does.
    """
    topic = letter.about.topic
    if topic not in topics:
        return f"{topic} is no topic of this pipeline ({', '.join(topics)})"
    if not exists(topic):
        return f"topic {topic} does not exist any more, or we may not write to it"
    if letter.about.without_value:
        return (
            "its value was left out, since it could not be decoded or is too large; the original "
            f"stands at {letter.source} for as long as Kafka keeps it"
        )
    return ""


class Work:
    """Sends and marks, batch by batch."""

    def __init__(self, sender: Sender, settings: DeadLetterSettings, progress: Progress) -> None:
        self._sender = sender
        self._settings = settings
        self._progress = progress
        self._by = f"{os.environ.get('SUDO_USER') or getpass.getuser()}@{socket.gethostname()}"
        self.done = 0
        """Dead letters that are marked."""
        self.too_large = 0
        """Records that their topic does not take any more."""

    def replay(self, records: Sequence[Any], same: Mapping[Place, Sequence[Letter]]) -> None:
        """Send records again, and mark their dead letters.

        Args:
            records: of the dead-letter topic.
            same: the dead letters to mark, by the place of the one that is sent.

        Raises:
            SinkUnavailable: Kafka did not confirm all. What is not marked is open.
            ConfigError: a topic may not be written to.
        """
        sent = self._send(records)
        self.mark([letter for place in sent for letter in same[place]], REPLAYED)

    def _send(self, records: Sequence[Any]) -> list[Place]:
        try:
            for record in records:
                source = DeadLetter.from_headers(record.headers).topic
                place = f"{record.topic}-{record.partition}@{record.offset}"
                headers = [(REPLAYED_FROM, place.encode())]
                # It came through Kafka before: the topic's limit counts, not ours.
                self._sender.send(source, record.key, record.value, headers, limited=False)
            self._sender.confirm(lambda: None)
        except RecordTooLarge as error:
            if len(records) > 1:
                # The refusal does not tell which of them it was.
                return [place for record in records for place in self._send([record])]
            self.too_large += 1
            complain(f"{records[0].partition}:{records[0].offset} stays open: {error}")
            return []
        return [(record.partition, record.offset) for record in records]

    def mark(self, letters: Sequence[Letter], action: str) -> None:
        """Note that dead letters are done with.

        Raises:
            SinkUnavailable, ConfigError: as `replay`.
        """
        topic = self._settings.dead_letter_topic
        for letter in letters:
            partition, offset = letter.place
            handling = Handling(action=action, partition=partition, offset=offset, by=self._by)
            self._sender.send(topic, None, b"", handling.headers(), partition=partition)
        self._sender.confirm(lambda: None)
        self.done += len(letters)
        self._progress.show(f"{action}: {self.done} dead letters")


def _replay(
    consumer: Any,
    settings: DeadLetterSettings,
    records: Sequence[list[Letter]],
    work: Work,
    progress: Progress,
) -> None:
    same = {letters[0].place: letters for letters in records}
    batch: list[Any] = []

    def saw(record: Any) -> None:
        batch.append(record)
        held = sum(len(each.value or b"") for each in batch)
        if len(batch) >= BATCH_RECORDS or held >= BATCH_BYTES:
            work.replay(batch, same)
            batch.clear()

    read_again(consumer, settings, same, saw, progress)
    if batch:
        work.replay(batch, same)


def _replayable(
    consumer: Any, settings: DeadLetterSettings, records: Sequence[list[Letter]]
) -> list[list[Letter]]:
    topics = (settings.image_topic, settings.prediction_topic)
    exists = {topic: bool(consumer.partitions_for_topic(topic)) for topic in topics}
    replayable = []
    for same in records:
        problem = obstacle(same[0], topics, exists.__getitem__)
        if problem:
            complain(f"{same[0].position} stays open: {problem}")
        else:
            replayable.append(same)
    return replayable


def _agreed(letters: Sequence[Letter], settings: DropDeadLettersSettings) -> bool:
    """Show what is meant, and ask."""
    print(table(letters[:SHOWN]))
    if len(letters) > SHOWN:
        print(f"… and {len(letters) - SHOWN} more")
    action = "replay" if isinstance(settings, ReplayDeadLettersSettings) else "drop"
    print(f"\nTo {action}: {summary(letters)}")
    if action == "replay" and len(letters) >= STOPPING:
        print(
            "Services refuse again what they cannot handle still, and stop after so many in a row: "
            "try one first."
        )
    if settings.dry_run:
        print("A dry run: nothing was done.")
        return False
    if settings.yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked without a terminal: --yes does it without asking")
    try:
        agreed = input(f"{action.capitalize()} them? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        print()
        agreed = False
    if not agreed:
        print("Nothing was done.")
    return agreed


def _do(consumer: Any, settings: DropDeadLettersSettings, records: Sequence[list[Letter]]) -> Exit:
    """Do it, and tell how far it came."""
    progress = Progress()
    letters = [letter for same in records for letter in same]
    try:
        sender = Sender(settings)
    except KafkaError as error:
        problem = describe_error(error, settings)
        raise SinkUnavailable(f"Kafka is not reachable: {problem}") from error
    work = Work(sender, settings, progress)
    try:
        if isinstance(settings, ReplayDeadLettersSettings):
            _replay(consumer, settings, records, work, progress)
        else:
            for start in range(0, len(letters), BATCH_RECORDS):
                work.mark(letters[start : start + BATCH_RECORDS], DROPPED)
    except (SinkUnavailable, KeyboardInterrupt) as error:
        progress.clear()
        complain(f"cut off: {work.done} of {len(letters)} are done, the others open: do it again")
        if isinstance(error, KeyboardInterrupt):
            return Exit.FAILED
        raise
    finally:
        progress.clear()
        sender.close()
    print(f"Done: {work.done} of {len(letters)}.")
    return Exit.FAILED if work.too_large else Exit.OK


def run(settings: DropDeadLettersSettings) -> int:
    """Show what is meant, ask, replay or drop it, and return the exit status.

    Raises:
        SinkUnavailable: the broker does not answer.
        ConfigError: a setting cannot be used, or a topic may not be read or written to.
        UsageError: nobody can be asked.
    """
    set_up_logging("warning")
    selection = Selection.of(settings, now())
    with reading(settings) as consumer:
        letters = read_letters(consumer, settings, Progress())
        chosen, found = selection.choose(letters)
        if not chosen:
            complain(none_chosen(letters))
        records = [[letter] for letter in chosen]
        if isinstance(settings, ReplayDeadLettersSettings):
            meant = of_one_record(chosen, letters)
            records = _replayable(consumer, settings, meant)
            found = found and len(records) == len(meant)
        status = Exit.OK
        if records:
            agreed = _agreed([letter for same in records for letter in same], settings)
            if agreed:
                status = _do(consumer, settings, records)
            elif not settings.dry_run:
                status = Exit.FAILED
    return status if found else Exit.FAILED
