"""`iot-pipeline produce`: one labelled image after another into the image topic.

Each image is confirmed by the broker before the next is taken. During an outage the producer keeps
trying the image in hand, and its schedule waits: a device that cannot send has nothing to catch up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from iot_pipeline import metrics
from iot_pipeline.errors import Exit, RecordTooLarge, SinkUnavailable
from iot_pipeline.kafka import Backoff, Sender, connect
from iot_pipeline.schema import ImageMessage, now, uuid7
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import ProduceSettings
from iot_pipeline.sources import Image, Source, open_source

log = Log("produce")

# The client itself retries for as long as it takes, because its own retries never write a record
# twice. 2**31 - 1 milliseconds, 24 days, is the longest that Kafka's clients know.
DELIVERY_TIMEOUT_MS = 2**31 - 1
PATIENCE = 5.0  # seconds until a missing confirmation is worth a warning, and between warnings
LAST_CHANCE = 10.0  # seconds an image in hand has left when the service is asked to stop
LINE_INTERVAL = 0.1  # seconds; below it images are logged in sums, every SUM_INTERVAL
SUM_INTERVAL = 5.0  # seconds


class _StoppedError(Exception):
    """The service was asked to stop while it waited."""


def run(settings: ProduceSettings) -> Exit:
    """Send images until `count` is reached or a signal comes.

    Returns:
        FAILED if an image was refused as too large, UNREACHABLE if the broker did not confirm the
        last one before the end, otherwise OK.

    Raises:
        PipelineError: the source, a setting or the topic cannot be used.
    """
    with Service(settings) as service:
        try:
            with _open(settings, service) as source:
                return _produce(settings, service, source)
        except _StoppedError:
            return Exit.OK


def _open(settings: ProduceSettings, service: Service) -> Source:
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
    )
    log.info("source", source=settings.source, images=len(source), classes=len(source.classes))
    return source


def _produce(settings: ProduceSettings, service: Service, source: Source) -> Exit:
    sender = connect(
        lambda: Sender(settings, DELIVERY_TIMEOUT_MS), service, settings.bootstrap_servers
    )
    if sender is None:
        return Exit.OK
    delivery = _Delivery(settings, service, sender)
    try:
        for image in _schedule(_images(source, settings.count), settings.interval, service):
            delivery.deliver(image)
            service.ready(f"sending images to {settings.image_topic}")
    except _StoppedError:
        return Exit.UNREACHABLE
    finally:
        service.leaving("closing the connection to the broker")
        sender.close()
        delivery.log_sum()
    return Exit.FAILED if delivery.refused else Exit.OK


def _images(source: Source, count: int) -> Iterator[Image]:
    """`count` images, or endless ones for 0, passing through the source as often as it takes."""
    endless = itertools.chain.from_iterable(itertools.repeat(source))
    return itertools.islice(endless, count) if count else endless


def _schedule(images: Iterator[Image], interval: float, service: Service) -> Iterator[Image]:
    """Hand out an image each `interval` seconds, without drift, until the service is to stop."""
    due = time.monotonic()
    for image in images:
        if service.wait(due - time.monotonic()):
            return
        yield image
        due = max(due + interval, time.monotonic())


class _Delivery:
    """Sends one image at a time and keeps count."""

    def __init__(self, settings: ProduceSettings, service: Service, sender: Sender) -> None:
        self._settings = settings
        self._service = service
        self._sender = sender
        self.refused = 0
        self._confirmed = 0
        self._summed = 0
        self._summed_at = time.monotonic()

    def deliver(self, image: Image) -> None:
        """Send an image and return when the broker has it, or when it is refused for good.

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
        started = time.monotonic()
        try:
            self._send(message)
        except RecordTooLarge as error:
            self._refuse(message, image, error)
            return
        metrics.SINK_SECONDS.observe(time.monotonic() - started)
        metrics.RECORDS_OUT.labels(self._settings.image_topic).inc()
        self._confirmed += 1
        if self._settings.interval >= LINE_INTERVAL:
            log.info("produced", id=message.id, truth=message.ground_truth, name=image.name)
        elif time.monotonic() - self._summed_at >= SUM_INTERVAL:
            self.log_sum()

    def _refuse(self, message: ImageMessage, image: Image, error: RecordTooLarge) -> None:
        self.refused += 1
        metrics.DEAD_LETTERS.labels(error.reason).inc()
        log.error(
            "image refused",
            id=message.id,
            name=image.name,
            image_bytes=len(image.data),
            limit_bytes=self._settings.max_record_bytes,
            error=error,
        )

    def log_sum(self) -> None:
        """Log what was confirmed since the last sum, where images have no lines of their own."""
        images = self._confirmed - self._summed
        if images and self._settings.interval < LINE_INTERVAL:
            rate = images / max(time.monotonic() - self._summed_at, 1e-9)
            log.info("produced", images=images, total=self._confirmed, per_second=round(rate, 1))
        self._summed, self._summed_at = self._confirmed, time.monotonic()

    def _send(self, message: ImageMessage) -> None:
        topic, key, value = self._settings.image_topic, message.key, message.encode()
        patience = _Patience(self._service, message.id)
        backoff = Backoff()
        while True:
            try:
                self._sender.send(topic, key, value)
                self._sender.confirm(patience)
            except SinkUnavailable as error:
                wait = backoff.next()
                patience.missing(str(error), retry_seconds=wait)
                self._service.wait(wait)
                patience()
            else:
                metrics.SINK_UP.set(1)
                return


class _Patience:
    """Called while a confirmation is waited for: warns, feeds the watchdog, and ends the wait."""

    def __init__(self, service: Service, identifier: str) -> None:
        self._service = service
        self._id = identifier
        self._warn_at = time.monotonic() + PATIENCE
        self._end: float | None = None

    def __call__(self) -> None:
        self._service.alive()
        moment = time.monotonic()
        if moment >= self._warn_at:
            self.missing("no confirmation yet")
        if self._service.stopping:
            self._end = self._end or moment + LAST_CHANCE
            if moment >= self._end:
                log.error("image not confirmed at the end", id=self._id)
                raise _StoppedError

    def missing(self, problem: str, **values: float) -> None:
        """Say that the broker did not take the image yet."""
        self._warn_at = time.monotonic() + PATIENCE
        metrics.SINK_UP.set(0)
        metrics.SINK_FAILURES.labels("kafka").inc()
        log.warning("broker does not confirm", id=self._id, error=problem, **values)
        self._service.status(f"waiting for the broker: {problem}")
