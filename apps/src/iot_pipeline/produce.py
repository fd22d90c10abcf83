"""`iot-pipeline produce`: one labelled image after another into the image topic.

At a slow pace each image is confirmed by the broker before the next is taken. At a fast one many
are on their way at once, and travel in batches. During an outage the producer keeps what is on its
way, and its schedule waits: a device that cannot send has nothing to catch up. A source that is
away is waited for in the same way.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iot_pipeline import metrics
from iot_pipeline.access import find_problem
from iot_pipeline.errors import Exit, RecordTooLarge, SinkUnavailable
from iot_pipeline.kafka import NO_DELIVERY_TIMEOUT_MS, Backoff, Sender, connect
from iot_pipeline.schema import ImageMessage, now, uuid7
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import ProduceSettings
from iot_pipeline.sources import Image, Source, SourceAway, open_source

log = Log("produce")

PATIENCE = 5.0  # seconds until a missing confirmation is worth a warning, and between warnings
LAST_CHANCE = 10.0  # seconds from SIGTERM on that images on their way have left
CLOSE_TIMEOUT = 5.0  # seconds
LINE_INTERVAL = 0.1  # seconds; below it images are logged in sums, every SUM_INTERVAL
SUM_INTERVAL = 5.0  # seconds

# What may be on its way at once. The bytes bound the memory: the client holds as many again.
WINDOW_IMAGES = 4096
WINDOW_BYTES = 16 * 2**20
SETTLE_INTERVAL = 0.2  # seconds from one look at what was confirmed to the next
# Small next to a pace that a person notices, long enough for a batch to fill at any other.
LINGER_MS = 5
BATCH_SIZE = (
    256 * 1024
)  # bytes for each partition; smaller ones cost a wake-up for every few images
GARBAGE_OBJECTS = 50_000  # new objects from one search for cycles to the next


class _StoppedError(Exception):
    """The service was asked to stop while it waited."""


def run(settings: ProduceSettings) -> Exit:
    """Send images until `count` is reached or a signal comes.

    Returns:
        FAILED if an image was refused as too large, UNREACHABLE if the broker did not confirm the
        last ones before the end, otherwise OK.

    Raises:
        PipelineError: the source, a setting or the topic cannot be used.
    """
    with Service(settings) as service:
        # Images on their way are many objects and no cycles. To look for some among them at each
        # 700th object, as is usual, takes a tenth of the time.
        gc.set_threshold(GARBAGE_OBJECTS)
        outage = _Outage(settings, service)
        try:
            with _open(settings, service, outage) as source:
                outage.over()
                return _produce(settings, service, source, outage)
        except _StoppedError:
            return Exit.OK


class _Outage:
    """Waits for a source that is away, and says so."""

    def __init__(self, settings: ProduceSettings, service: Service) -> None:
        self._source = settings.source
        self._service = service
        self._backoff = Backoff()
        self._since: float | None = None

    def __call__(self, error: SourceAway) -> None:
        """Wait before the next attempt.

        Raises:
            _StoppedError: the service was asked to stop meanwhile.
        """
        self._since = self._since or time.monotonic()
        wait = self._backoff.next()
        log.warning("source away", source=self._source, error=error, retry_seconds=wait)
        self._service.status(f"waiting for the source: {error}")
        if self._service.wait(wait):
            raise _StoppedError

    def over(self) -> None:
        """The source can be read."""
        if self._since is not None:
            log.info("source is back", seconds=time.monotonic() - self._since)
            self._since = None
            self._backoff.reset()


def _open(settings: ProduceSettings, service: Service, outage: _Outage) -> Source:
    def heartbeat() -> None:
        service.starting(f"reading the source {settings.source}")
        service.alive()
        if service.stopping:
            raise _StoppedError

    source = open_source(
        settings.source,
        shuffle=settings.shuffle,
        seed=settings.seed,
        cache_dir=Path(settings.cache_dir),
        url=settings.source_url or None,
        heartbeat=heartbeat,
        outage=outage,
    )
    log.info("source", source=settings.source, images=len(source), classes=len(source.classes))
    return source


def _produce(settings: ProduceSettings, service: Service, source: Source, outage: _Outage) -> Exit:
    sender = connect(
        lambda: Sender(
            settings,
            # The client itself retries for as long as it takes, because its own retries never
            # write a record twice.
            NO_DELIVERY_TIMEOUT_MS,
            linger_ms=LINGER_MS if settings.interval < LINE_INTERVAL else 0,
            batch_size=BATCH_SIZE,
            compression=settings.compression,
        ),
        service,
        settings,
    )
    if sender is None:
        return Exit.OK
    with _progress(settings.count) as bar:
        delivery = _Delivery(settings, service, sender, bar)
        try:
            images = _images(source, settings.count, outage)
            for image in _schedule(images, settings.interval, service):
                delivery.deliver(image)
            delivery.settle()
        except _StoppedError:
            return Exit.UNREACHABLE
        finally:
            service.leaving("closing the connection to the broker")
            sender.close(service.left(CLOSE_TIMEOUT))
            delivery.log_total()
    return Exit.FAILED if delivery.refused else Exit.OK


@contextmanager
def _progress(count: int) -> Iterator[Any]:
    """A progress bar over `count` images, or None where there is no count or nobody looks."""
    if not count or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm(), tqdm(total=count, unit=" images") as bar:
        yield bar


def _images(source: Source, count: int, outage: _Outage) -> Iterator[Image]:
    """`count` images, or endless ones for 0, passing through the source as often as it takes.

    Ends early when the service is asked to stop while the source is away.
    """
    endless = itertools.chain.from_iterable(itertools.repeat(source))
    try:
        for image in itertools.islice(endless, count) if count else endless:
            outage.over()
            yield image
    except _StoppedError:
        return


def _schedule(images: Iterator[Image], interval: float, service: Service) -> Iterator[Image]:
    """Hand out an image each `interval` seconds, without drift, until the service is to stop."""
    due = time.monotonic()
    for image in images:
        left = due - time.monotonic()
        # At full speed the deliveries feed the watchdog often enough.
        if service.stopping or (left > 0 and service.wait(left)):
            return
        yield image
        due = max(due + interval, time.monotonic())


@dataclass(slots=True)
class _Record:
    """An image on its way."""

    message: ImageMessage
    name: str
    key: bytes
    value: bytes
    sent_at: float  # time.monotonic()


class _Delivery:
    """Sends images, keeps those that are not confirmed yet, and counts."""

    def __init__(
        self, settings: ProduceSettings, service: Service, sender: Sender, bar: Any
    ) -> None:
        self._settings = settings
        self._service = service
        self._sender = sender
        self._bar = bar
        self._one_by_one = settings.interval >= LINE_INTERVAL
        self._backoff = Backoff()
        self._waiting: dict[bytes | None, _Record] = {}  # by key, in the order of the images
        self._waiting_bytes = 0
        self._started = self._summed_at = self._settled_at = time.monotonic()
        self._warn_at = self._started + PATIENCE
        self._last_taken: _Record | None = None
        self._confirmed = self._counted = self._summed = self._noticed = 0
        self.refused = 0

    def deliver(self, image: Image) -> None:
        """Send an image and return when not too much waits for the broker: at a slow pace nothing.

        Raises:
            _StoppedError: the service is to stop, and the broker did not confirm in time.
            ConfigError: the topic may not be written to.
        """
        message = ImageMessage(
            id=uuid7(),
            ground_truth=image.label,
            data=image.data,
            content_type=image.content_type,
            produced_at=now(),
            source=self._settings.source_name,
        )
        moment = time.monotonic()
        record = _Record(message, image.name, message.key, message.encode(), moment)
        self._waiting[record.key] = record
        self._waiting_bytes += len(record.value)
        self._send(record)
        if self._one_by_one:
            self.settle()
        elif (
            len(self._waiting) >= WINDOW_IMAGES
            or self._waiting_bytes >= WINDOW_BYTES
            or moment - self._settled_at >= SETTLE_INTERVAL
        ):
            # The broker works on the younger half while the next images are made.
            self.settle(leave=len(self._waiting) // 2)

    def settle(self, leave: int = 0) -> None:
        """Wait until all but the last `leave` images are confirmed, or refused for good.

        Raises:
            _StoppedError, ConfigError: as `deliver`.
        """
        self._warn_at = time.monotonic() + PATIENCE
        while True:
            try:
                self._sender.confirm(self._patience, self._taken, leave=leave)
            except SinkUnavailable as error:
                self._pause(error)
                for record in list(self._waiting.values()):
                    self._send(record)
            except RecordTooLarge as error:
                self._find_too_large(error)
            else:
                break
        self._backoff.reset()
        self._count()

    def _send(self, record: _Record) -> None:
        while True:
            try:
                self._sender.send(self._settings.image_topic, record.key, record.value)
            except SinkUnavailable as error:
                self._pause(error)
            except RecordTooLarge as error:
                self._refuse(record, error)
                return
            else:
                return

    def _find_too_large(self, error: RecordTooLarge) -> None:
        """Send what waits one by one: the refusal of one among many does not tell which it was."""
        waiting = list(self._waiting.values())
        if len(waiting) == 1:
            self._refuse(waiting[0], error)
            return
        for record in waiting:
            self._send(record)
            while record.key in self._waiting:
                try:
                    self._sender.confirm(self._patience, self._taken)
                except SinkUnavailable as problem:
                    self._pause(problem)
                    self._send(record)
                except RecordTooLarge as refusal:
                    self._refuse(record, refusal)

    def _forget(self, key: bytes | None) -> _Record:
        record = self._waiting.pop(key)
        self._waiting_bytes -= len(record.value)
        return record

    def _taken(self, key: bytes | None) -> None:
        record = self._last_taken = self._forget(key)
        self._confirmed += 1
        if self._one_by_one:
            message = record.message
            log.info("produced", id=message.id, truth=message.ground_truth, name=record.name)

    def _refuse(self, record: _Record, error: RecordTooLarge) -> None:
        self._forget(record.key)
        self.refused += 1
        metrics.DEAD_LETTERS.labels(error.reason).inc()
        log.error(
            "image refused",
            id=record.message.id,
            name=record.name,
            image_bytes=len(record.message.data),
            limit_bytes=self._settings.max_record_bytes,
            error=error,
        )

    def _count(self) -> None:
        """Show what was confirmed since the last time."""
        self._settled_at = time.monotonic()
        images, self._counted = self._confirmed - self._counted, self._confirmed
        self._service.alive()
        if self._last_taken and images:
            metrics.SINK_UP.set(1)
            metrics.SINK_SECONDS.observe(self._settled_at - self._last_taken.sent_at)
            metrics.RECORDS_OUT.labels(self._settings.image_topic).inc(images)
        self._service.ready(f"sending images to {self._settings.image_topic}")
        if self._bar is not None:
            self._bar.update(images)
        elif not self._one_by_one and self._settled_at - self._summed_at >= SUM_INTERVAL:
            images, seconds = self._confirmed - self._summed, self._settled_at - self._summed_at
            self._summed, self._summed_at = self._confirmed, self._settled_at
            rate = images / seconds
            log.info("produced", images=images, total=self._confirmed, per_second=rate)

    def log_total(self) -> None:
        """Log what became of all images, in one line."""
        seconds = self._settled_at - self._started
        log.info(
            "sent",
            images=self._confirmed,
            seconds=seconds,
            per_second=self._confirmed / max(seconds, 1e-9),
            refused=self.refused,
            unconfirmed=len(self._waiting),
        )

    def _pause(self, error: SinkUnavailable) -> None:
        """Wait before the next attempt."""
        wait = self._backoff.next()
        self._missing(str(error), retry_seconds=wait)
        self._service.wait(wait)
        self._patience()

    def _patience(self) -> None:
        """Called while a confirmation is waited for: warns, feeds the watchdog, ends the wait."""
        self._service.alive()
        moment = time.monotonic()
        if self._confirmed > self._noticed:
            self._noticed = self._confirmed
            self._warn_at = moment + PATIENCE
        elif moment >= self._warn_at:
            self._missing(find_problem(self._settings) or "no confirmation yet")
        if self._service.stopping_for() >= LAST_CHANCE:
            log.error("images not confirmed at the end", **self._first_waiting())
            raise _StoppedError

    def _missing(self, problem: str, **values: float) -> None:
        """Say that the broker did not take the images yet."""
        self._warn_at = time.monotonic() + PATIENCE
        metrics.SINK_UP.set(0)
        metrics.SINK_FAILURES.labels("kafka").inc()
        waiting = self._first_waiting()
        log.warning("broker does not confirm", **waiting, error=problem, **values)
        self._service.status(f"waiting for the broker: {problem}")

    def _first_waiting(self) -> dict[str, Any]:
        first = next(iter(self._waiting.values()))
        return {"images": len(self._waiting), "id": first.message.id}
