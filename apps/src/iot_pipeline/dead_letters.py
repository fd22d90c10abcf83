"""Records that can never be handled: where they go, and when there are too many of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from iot_pipeline.errors import InvalidMessage, RecordTooLarge, TooManyDeadLetters
from iot_pipeline.kafka import Sender
from iot_pipeline.schema import DeadLetter, Record
from iot_pipeline.service import Log
from iot_pipeline.settings import ConsumerSettings

log = Log("dead_letters")

WINDOW = 1000
WINDOW_MINIMUM = 200
# The longest key that a dead letter keeps which does not fit into its topic as it is.
MAX_KEY_BYTES = 1024


class DeadLetterLimit:
    """Stops the service when so much is refused that the fault is more likely ours.

    Without it, a wrong setting or a broken release would quietly move a whole topic aside.
    """

    def __init__(self, consecutive: int, share: float) -> None:
        self._consecutive_limit = consecutive
        self._share_limit = share
        self._consecutive = 0
        self._window: deque[bool] = deque(maxlen=WINDOW)
        self._refused_in_window = 0

    def count(self, *, refused: bool) -> None:
        """Count one record.

        Raises:
            TooManyDeadLetters: that was one too many.
        """
        if len(self._window) == self._window.maxlen:
            self._refused_in_window -= self._window[0]
        self._window.append(refused)
        self._refused_in_window += refused
        self._consecutive = self._consecutive + 1 if refused else 0
        if self._consecutive_limit and self._consecutive >= self._consecutive_limit:
            raise TooManyDeadLetters(
                f"{self._consecutive} records in a row cannot be handled "
                "(IOT_MAX_CONSECUTIVE_DEAD_LETTERS); `iot-pipeline dead-letters list` tells why"
            )
        seen = len(self._window)
        share = self._refused_in_window / seen
        if seen >= WINDOW_MINIMUM and share > self._share_limit:
            raise TooManyDeadLetters(
                f"{self._refused_in_window} of the last {seen} records cannot be handled "
                "(IOT_MAX_DEAD_LETTER_SHARE); `iot-pipeline dead-letters list` tells why"
            )


def bury(
    sender: Sender,
    settings: ConsumerSettings,
    record: Record,
    error: InvalidMessage,
    beat: Callable[[], None],
) -> None:
    """Return when a refused record is safe in the dead-letter topic.

    A record that does not fit there is named there without its value: the headers say where the
    original is. To stop over it would hold up every record behind it.

    Raises:
        SinkUnavailable: Kafka did not confirm it; try again.
    """
    letter = DeadLetter.of(record, error, settings.SERVICE)
    topic = settings.dead_letter_topic
    try:
        sender.send(topic, record.key, record.value, letter.headers(), limited=False)
        sender.confirm(beat)
    except RecordTooLarge as too_large:
        log.warning("dead letter without its value", error=too_large, offset=record.offset)
        # It may be the key that does not fit.
        key = record.key if len(record.key or b"") <= MAX_KEY_BYTES else None
        letter = replace(letter, without_value=True)
        sender.send(topic, key, b"", letter.headers(), limited=False)
        sender.confirm(beat)
