"""What every long-running command shares: logs, signals, metrics and talking to systemd.

::

    with Service(settings) as service:
        ...                                # connect, warm up
        service.ready("sending images")
        while not service.wait(interval):  # True as soon as SIGTERM or SIGINT arrived
            service.alive()
            ...
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import Any, Self

from iot_pipeline import metrics
from iot_pipeline.errors import PipelineError
from iot_pipeline.settings import Settings, describe

REPEAT_SECONDS = 60.0

_JOURNAL_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


STARTING_EVERY = 5.0  # seconds between two words to systemd that a long start goes on

# From a word that systemd did not take to the next attempt, while nothing else is done.
NOTIFY_AGAIN_SECONDS = 1.0

# From SIGTERM to the end, all told. The unit's TimeoutStopSec is 45: then systemd kills.
STOP_SECONDS = 30.0
# Whatever comes at the end gets so long even when it comes too late.
LAST_SECONDS = 0.1


class Log:
    """Writes one line an event: its name, then what belongs to it as name=value.

    ::

        log.info("produced", id=message.id, truth=message.ground_truth)
        # produced id=01a1fbf0-… truth=cat
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"iot_pipeline.{name}")

    def debug(self, event: str, **values: Any) -> None:
        """Something only a developer wants to know."""
        self._write(logging.DEBUG, event, values)

    def info(self, event: str, **values: Any) -> None:
        """Something that is as it should be."""
        self._write(logging.INFO, event, values)

    def warning(self, event: str, **values: Any) -> None:
        """Something that the service copes with, but should not last."""
        self._write(logging.WARNING, event, values)

    def error(self, event: str, **values: Any) -> None:
        """Something that someone has to do something about."""
        self._write(logging.ERROR, event, values)

    def _write(self, level: int, event: str, values: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            pairs = (f"{name}={_quote(value)}" for name, value in values.items())
            self._logger.log(level, "%s", " ".join((event, *pairs)))


def _quote(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and text.isprintable() and not any(character in text for character in ' "='):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in escaped) + '"'


class _Formatter(logging.Formatter):
    """One line a record: systemd's priority prefix for the journal, a time stamp elsewhere."""

    def __init__(self, *, for_journal: bool) -> None:
        super().__init__()
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        ours = record.name.startswith("iot_pipeline")
        if record.exc_info and (ours or logging.getLogger().isEnabledFor(logging.DEBUG)):
            text = f"{text} traceback={_quote(self.formatException(record.exc_info))}"
        if not ours:
            text = f"{record.name}: {text}"
        text = text.replace("\n", " ")
        if self._for_journal:
            return f"<{_JOURNAL_PRIORITIES.get(record.levelno, 5)}>{text}"
        moment = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        return f"{moment.replace('+00:00', 'Z')} {record.levelname.lower()} {text}"


class _RepeatFilter(logging.Filter):
    """Lets a library say the same thing once a minute: kafka-python complains at each attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, object], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("iot_pipeline"):
            return True
        what = (record.name, record.msg)
        if record.created - self._said.get(what, 0.0) < REPEAT_SECONDS:
            return False
        self._said[what] = record.created
        return True


def set_up_logging(level: str) -> None:
    """Send this package's events and other libraries' warnings to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(for_journal=_stderr_is_the_journal()))
    if level != "debug":
        handler.addFilter(_RepeatFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("iot_pipeline").setLevel(level.upper())
    if level != "debug":
        # It warns of each step that took 0.1 s, which any busy host makes it do.
        logging.getLogger("kafka.net.selector").setLevel(logging.ERROR)


def _stderr_is_the_journal() -> bool:
    # See JOURNAL_STREAM in systemd.exec(5): the device and inode of the stream we were given.
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Notifier:
    """Tells systemd how the service fares (see sd_notify(3)); silent where nobody listens."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the null byte that begins an abstract socket's name.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # With a time limit Python would spin: such a socket always passes for one that takes more.
        self._socket.setblocking(False)
        # What could not be said yet, by name.
        self._unsaid: dict[str, str] = {}

    def send(self, *lines: str) -> None:
        """Send assignments such as `READY=1`, or keep them for the next time where that fails.

        systemd reads late on a busy host, and its socket holds few messages. What is kept goes with
        whatever is sent next.
        """
        for line in lines:
            name, _, value = line.replace("\n", " ").partition("=")
            self._unsaid[name] = value
        self.send_kept()

    def send_kept(self, *lines: str) -> bool:
        """Send what is kept, if anything is, together with assignments that are not kept.

        Returns:
            Whether nothing is left to say.
        """
        kept = (f"{name}={value}" for name, value in self._unsaid.items())
        message = "\n".join((*kept, *lines)).encode()
        if message and self._address:
            try:
                self._socket.sendto(message, self._address)
            except OSError as error:
                logging.getLogger("iot_pipeline.service").debug("notify failed: %s", error)
                return False
        self._unsaid.clear()
        return True

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


class Service:
    """The process as systemd and Prometheus see it. Use it as a context manager, once a process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log = Log("service")
        self._notifier = Notifier()
        self._stop = threading.Event()
        self._stopped_at = math.inf
        self._ready = False
        # Twice in each period, as sd_watchdog_enabled(3) advises.
        self._alive_every = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        self._alive_at = 0.0
        self._starting_at = -STARTING_EVERY
        self._status = ""

    def __enter__(self) -> Self:
        set_up_logging(self._settings.log_level)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._log.info("starting", service=self._settings.SERVICE, **describe(self._settings))
        metrics.serve(self._settings.metrics_host, self._settings.metrics_port)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._notifier.send("STOPPING=1", "STATUS=stopped" if error is None else f"STATUS={error}")
        self._notifier.close()
        if error is None:
            self._log.info("stopped", service=self._settings.SERVICE)
        else:
            self._log.error("failed", service=self._settings.SERVICE, error=error)
            if isinstance(error, PipelineError):
                error.logged = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.stop()
        # For a person at the keyboard: a second Ctrl-C ends at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def stopping(self) -> bool:
        """Whether SIGTERM or SIGINT has arrived."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Do as SIGTERM does."""
        self._stopped_at = min(self._stopped_at, time.monotonic())
        self._stop.set()

    def stopping_for(self) -> float:
        """Seconds since SIGTERM or SIGINT has arrived; 0 before."""
        return max(0.0, time.monotonic() - self._stopped_at)

    def left(self, at_most: float) -> float:
        """The seconds that something may take which the end waits for.

        All that comes after SIGTERM shares one deadline, however much of it there is.

        Args:
            at_most: seconds that it may take in any case; not a second more when there is time.
        """
        until = self._stopped_at + STOP_SECONDS
        return max(LAST_SECONDS, min(at_most, until - time.monotonic()))

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake at once when asked to stop, and tell systemd all the while we live.

        Returns:
            Whether the service is to stop.
        """
        until = time.monotonic() + seconds
        while not self.stopping:
            self.alive()
            left = until - time.monotonic()
            if left <= 0:
                break
            self._stop.wait(min(left, self._alive_every or left, NOTIFY_AGAIN_SECONDS))
        return self.stopping

    def starting(self, status: str) -> None:
        """Tell systemd that the start takes longer than usual, such as for a download."""
        moment = time.monotonic()
        if not self._ready and moment - self._starting_at >= STARTING_EVERY:
            self._starting_at = moment
            self._notifier.send(
                f"EXTEND_TIMEOUT_USEC={int(STARTING_EVERY * 6e6)}", f"STATUS={status}"
            )

    def ready(self, status: str) -> None:
        """Tell systemd, the first time, that the service does its work now."""
        if self._ready:
            self.status(status)
            return
        self._ready = True
        self._status = status
        self._notifier.send("READY=1", f"STATUS={status}")
        self._log.info("ready", service=self._settings.SERVICE, status=status)

    def status(self, text: str) -> None:
        """Show `text` in `systemctl status`."""
        if text != self._status:
            self._status = text
            self._notifier.send(f"STATUS={text}")

    def leaving(self, status: str) -> None:
        """Tell systemd that the service is on its way out."""
        self._notifier.send("STOPPING=1", f"STATUS={status}")
        self._log.info("stopping", status=status)

    def alive(self) -> None:
        """Feed the watchdog. Call it from the loop itself, or it proves nothing."""
        moment = time.monotonic()
        if not self._alive_every or moment - self._alive_at < self._alive_every:
            self._notifier.send_kept()
        elif self._notifier.send_kept("WATCHDOG=1"):
            self._alive_at = moment
