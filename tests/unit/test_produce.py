from collections.abc import Callable, Iterator
from typing import Any

import pytest

from iot_pipeline import produce
from iot_pipeline.errors import ConfigError, Exit, RecordTooLarge, SinkUnavailable
from iot_pipeline.schema import ImageMessage
from iot_pipeline.settings import ProduceSettings
from iot_pipeline.sources import Image


class Clock:
    """Time that passes only when someone waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeService:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.stopping = False
        self.told: list[str] = []

    def wait(self, seconds: float) -> bool:
        self._clock.now += max(0.0, seconds)
        return self.stopping

    def alive(self) -> None:
        self.told.append("alive")

    def ready(self, status: str) -> None:
        self.told.append(f"ready: {status}")

    def status(self, text: str) -> None:
        self.told.append(text)

    def leaving(self, status: str) -> None:
        self.told.append(status)


class FakeSender:
    """Answers confirmations with what is in its list, then with success."""

    def __init__(self, answers: list[Callable[[], None] | Exception]) -> None:
        self._answers = answers
        self.sent: list[ImageMessage] = []
        self.closed = False

    def send(self, _topic: str, key: bytes, value: bytes) -> None:
        message = ImageMessage.decode(value)
        assert key == message.key
        self.sent.append(message)

    def confirm(self, alive: Callable[[], None]) -> None:
        alive()
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, Exception):
            raise answer
        if answer:
            answer()
            while True:
                alive()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(produce, "time", clock)
    return clock


@pytest.fixture
def service(clock: Clock) -> FakeService:
    return FakeService(clock)


@pytest.fixture
def run(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Exit, FakeSender]]:
    def run(*answers: Callable[[], None] | Exception, **settings: Any) -> tuple[Exit, FakeSender]:
        sender = FakeSender(list(answers))
        monkeypatch.setattr(produce, "connect", lambda _make, _service, _servers: sender)
        source = [Image(b"one", "cat", "image/png", "1"), Image(b"two", "dog", "image/png", "2")]
        chosen = ProduceSettings(**{"count": 3, **settings})
        return produce._produce(chosen, service, source), sender  # type: ignore[arg-type]

    return run


def test_passes_through_the_source_until_the_count(
    run: Callable[..., tuple[Exit, FakeSender]], service: FakeService
) -> None:
    status, sender = run()
    assert status is Exit.OK
    assert [message.data for message in sender.sent] == [b"one", b"two", b"one"]
    assert len({message.id for message in sender.sent}) == 3
    assert sender.closed
    assert "ready: sending images to iot-topic" in service.told


def test_an_outage_is_waited_out_with_the_same_image(
    run: Callable[..., tuple[Exit, FakeSender]],
) -> None:
    down = SinkUnavailable("down")
    status, sender = run(down, down, count=2)
    assert status is Exit.OK
    assert [message.data for message in sender.sent] == [b"one"] * 3 + [b"two"]
    assert len({message.id for message in sender.sent}) == 2


def test_a_refused_image_is_said_and_the_next_is_sent(
    run: Callable[..., tuple[Exit, FakeSender]], caplog: pytest.LogCaptureFixture
) -> None:
    status, sender = run(RecordTooLarge("a record of 4 bytes exceeds the limit"))
    assert status is Exit.FAILED
    assert [message.data for message in sender.sent] == [b"one", b"two", b"one"]
    refusal = next(text for text in caplog.messages if "refused" in text)
    for part in (sender.sent[0].id, "image_bytes=3", "limit_bytes=1000000", "exceeds the limit"):
        assert part in refusal


def test_a_topic_that_may_not_be_written_ends_it(
    run: Callable[..., tuple[Exit, FakeSender]],
) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        run(ConfigError("not allowed"))


def test_stop_during_an_outage_names_the_image_that_is_not_confirmed(
    run: Callable[..., tuple[Exit, FakeSender]],
    service: FakeService,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stop() -> None:
        service.stopping = True
        service.alive = lambda: setattr(clock, "now", clock.now + 1.0)  # type: ignore[method-assign]

    started = clock.now
    status, sender = run(stop, count=0)
    assert status is Exit.UNREACHABLE
    assert clock.now - started == pytest.approx(produce.LAST_CHANCE, abs=2)
    assert f"image not confirmed at the end id={sender.sent[0].id}" in caplog.text
    assert sender.closed


def due_times(service: FakeService, clock: Clock, takes: list[float]) -> Iterator[float]:
    images = iter([Image(b"", "cat", "image/png", str(n)) for n in range(len(takes))])
    for _image, seconds in zip(
        produce._schedule(images, 1.0, service),  # type: ignore[arg-type]
        takes,
        strict=False,
    ):
        yield clock.now
        clock.now += seconds


def test_the_schedule_does_not_drift(service: FakeService, clock: Clock) -> None:
    start = clock.now
    times = [time - start for time in due_times(service, clock, [0.3, 0.9, 0.0, 0.5])]
    assert times == pytest.approx([0, 1, 2, 3])


def test_the_schedule_waits_during_an_outage_and_does_not_catch_up(
    service: FakeService, clock: Clock
) -> None:
    start = clock.now
    times = [time - start for time in due_times(service, clock, [0.1, 7.5, 0.1, 0.1])]
    assert times == pytest.approx([0, 1, 8.5, 9.5])


def test_the_schedule_ends_when_the_service_stops(service: FakeService, clock: Clock) -> None:
    service.stopping = True
    assert list(due_times(service, clock, [0.0, 0.0])) == []


def test_fast_images_are_logged_in_sums(
    run: Callable[..., tuple[Exit, FakeSender]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(interval=0)
    lines = [text for text in caplog.messages if text.startswith("produced")]
    assert len(lines) == 1
    assert "images=3 total=3" in lines[0]
    caplog.clear()
    run(interval=10)
    lines = [text for text in caplog.messages if text.startswith("produced")]
    assert len(lines) == 3
    assert all(" truth=" in line and " id=" in line for line in lines)
