import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from iot_pipeline import produce
from iot_pipeline.errors import ConfigError, Exit, RecordTooLarge, SinkUnavailable
from iot_pipeline.schema import ImageMessage
from iot_pipeline.settings import ProduceSettings
from iot_pipeline.sources import Image, SourceAway

SOURCE = (Image(b"one", "cat", "image/png", "1"), Image(b"two", "dog", "image/png", "2"))


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
        self._stopped_at = math.inf
        self.told: list[str] = []

    def wait(self, seconds: float) -> bool:
        self._clock.now += max(0.0, seconds)
        return self.stopping

    def stopping_for(self) -> float:
        if self.stopping:
            self._stopped_at = min(self._stopped_at, self._clock.now)
        return max(0.0, self._clock.now - self._stopped_at)

    def left(self, at_most: float) -> float:
        return at_most

    def alive(self) -> None:
        self.told.append("alive")

    def ready(self, status: str) -> None:
        self.told.append(f"ready: {status}")

    def status(self, text: str) -> None:
        self.told.append(text)

    def leaving(self, status: str) -> None:
        self.told.append(status)


class FakeSender:
    """Answers confirmations with what is in its list, then with success.

    Of a window that fails it takes the first half, and refuses those that are too large for it.
    """

    def __init__(self, answers: list[Callable[[], None] | Exception], limit: int) -> None:
        self._answers = answers
        self._limit = limit
        self._pending: list[ImageMessage] = []
        self.sent: list[ImageMessage] = []
        self.taken: list[ImageMessage] = []
        self.most_pending = 0
        self.closed = False

    def send(self, _topic: str, key: bytes, value: bytes) -> None:
        message = ImageMessage.decode(value)
        assert key == message.key
        self.sent.append(message)
        self._pending.append(message)
        self.most_pending = max(self.most_pending, len(self._pending))

    def confirm(
        self,
        alive: Callable[[], None],
        taken: Callable[[bytes | None], None],
        *,
        leave: int = 0,
    ) -> None:
        alive()
        answer = self._answers.pop(0) if self._answers else None
        if any(len(message.data) > self._limit for message in self._pending):
            answer = RecordTooLarge("the topic's limit")
        fit = len(self._pending) - leave if answer is None else len(self._pending) // 2
        for message in self._pending[:fit]:
            if len(message.data) <= self._limit:
                self.taken.append(message)
                taken(message.key)
        self._pending = self._pending[fit:] if answer is None else []
        if isinstance(answer, Exception):
            raise answer
        if answer:
            answer()
            while True:
                alive()

    def close(self, timeout: float) -> None:
        assert timeout > 0
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
    def run(
        *answers: Callable[[], None] | Exception,
        source: Sequence[Image] = SOURCE,
        limit: int = 1000,
        **settings: Any,
    ) -> tuple[Exit, FakeSender]:
        sender = FakeSender(list(answers), limit)
        monkeypatch.setattr(produce, "connect", lambda _make, _service, _servers: sender)
        chosen = ProduceSettings(**{"count": 3, **settings})
        outage = produce._Outage(chosen, service)  # type: ignore[arg-type]
        return produce._produce(chosen, service, source, outage), sender  # type: ignore[arg-type]

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
    assert f"images not confirmed at the end images=1 id={sender.sent[0].id}" in caplog.text
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


def test_slow_images_have_a_line_each_and_all_of_them_one_at_the_end(
    run: Callable[..., tuple[Exit, FakeSender]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(interval=10)
    lines = [text for text in caplog.messages if text.startswith("produced")]
    assert len(lines) == 3
    assert all(" truth=" in line and " id=" in line for line in lines)
    assert "sent images=3 seconds=20 per_second=0.15 refused=0 unconfirmed=0" in caplog.messages


def test_fast_images_are_logged_in_sums(
    run: Callable[..., tuple[Exit, FakeSender]], caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    def a_second() -> Iterator[Image]:
        for image in SOURCE * 6:
            clock.now += 1
            yield image

    caplog.set_level("INFO")
    run(interval=0, count=12, source=list(SOURCE) * 6)
    assert not [text for text in caplog.messages if text.startswith("produced")]
    caplog.clear()
    run(interval=0, count=12, source=a_second())
    lines = [text for text in caplog.messages if text.startswith("produced")]
    assert lines[0] == "produced images=5 total=5 per_second=1"
    assert len(lines) == 2
    assert any(text.startswith("sent images=12 ") for text in caplog.messages)


def test_a_paced_image_is_confirmed_before_the_next_is_sent(
    run: Callable[..., tuple[Exit, FakeSender]],
) -> None:
    _status, sender = run(interval=produce.LINE_INTERVAL, count=20)
    assert sender.most_pending == 1


def test_a_window_of_images_is_on_its_way_and_no_more(
    run: Callable[..., tuple[Exit, FakeSender]],
) -> None:
    count = 3 * produce.WINDOW_IMAGES
    status, sender = run(interval=0, count=count)
    assert status is Exit.OK
    assert sender.most_pending == produce.WINDOW_IMAGES
    ids = [message.id for message in sender.taken]
    assert len(ids) == count
    assert ids == sorted(ids)


def test_large_images_fill_the_window_sooner(
    run: Callable[..., tuple[Exit, FakeSender]],
) -> None:
    large = [Image(bytes(2**20), "cat", "image/png", "large")]
    _status, sender = run(interval=0, count=100, source=large, limit=2**21)
    assert len(sender.taken) == 100
    in_base64 = 2**20 * 4 / 3
    assert produce.WINDOW_BYTES <= sender.most_pending * in_base64 < produce.WINDOW_BYTES + 2**21


def test_fast_images_that_were_not_taken_are_sent_again_and_no_others(
    run: Callable[..., tuple[Exit, FakeSender]],
) -> None:
    down = SinkUnavailable("down")
    status, sender = run(down, down, interval=0, count=40)
    assert status is Exit.OK
    assert len({message.id for message in sender.taken}) == len(sender.taken) == 40
    assert len(sender.sent) == 40 + 20 + 10


def test_those_too_large_are_found_among_many(
    run: Callable[..., tuple[Exit, FakeSender]], caplog: pytest.LogCaptureFixture
) -> None:
    source = [
        Image(b"x" * (100 if number in (7, 30, 31) else 3), "cat", "image/png", str(number))
        for number in range(50)
    ]
    status, sender = run(source=source, limit=99, interval=0, count=50)
    assert status is Exit.FAILED
    assert len({message.id for message in sender.taken}) == len(sender.taken) == 47
    refused = [text for text in caplog.messages if text.startswith("image refused")]
    assert [text.split(" name=")[1].split()[0] for text in refused] == ["7", "30", "31"]


def test_stop_at_speed_confirms_what_is_on_its_way(
    run: Callable[..., tuple[Exit, FakeSender]], service: FakeService, clock: Clock
) -> None:
    def stop_after_ten() -> Iterator[Image]:
        for number in range(20):
            service.stopping = number == 10
            yield SOURCE[0]

    clock.now += 1
    status, sender = run(interval=0, count=0, source=stop_after_ten())
    assert status is Exit.OK
    assert len(sender.taken) == len(sender.sent) == 10


@pytest.mark.parametrize(
    "terminal, count, shown", [(True, 2, True), (True, 0, False), (False, 2, False)]
)
def test_a_progress_bar_needs_a_terminal_and_a_count(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    terminal: bool,
    count: int,
    shown: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with produce._progress(count) as bar:
        assert (bar is not None) is shown
        if bar is not None:
            bar.update(2)
    assert ("2/2" in capfd.readouterr().err) is shown


def test_a_source_that_is_away_shows_in_the_status_and_comes_back(
    run: Callable[..., tuple[Exit, FakeSender]],
    service: FakeService,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "set"
    wait = service.wait

    def wait_until_it_is_back(seconds: float) -> bool:
        if clock.now > 1030 and not folder.exists():
            (folder / "cat").mkdir(parents=True)
            (folder / "cat/1.png").write_bytes(b"one")
        return wait(seconds)

    monkeypatch.setattr(service, "wait", wait_until_it_is_back)
    service.starting = service.told.append  # type: ignore[attr-defined]
    settings = ProduceSettings(source=str(folder), cache_dir=str(tmp_path), interval=1)
    outage = produce._Outage(settings, service)  # type: ignore[arg-type]
    with produce._open(settings, service, outage) as source:  # type: ignore[arg-type]
        status, sender = run(source=source, count=2)
    assert status is Exit.OK
    assert [message.data for message in sender.sent] == [b"one", b"one"]
    assert any("waiting for the source: there is no source" in text for text in service.told)
    warnings = [text for text in caplog.messages if text.startswith("source away")]
    assert 3 < len(warnings) < 15
    assert "retry_seconds=" in warnings[0]


def test_stop_while_the_source_is_away_confirms_what_is_on_its_way(
    run: Callable[..., tuple[Exit, FakeSender]], service: FakeService
) -> None:
    def images() -> Iterator[Image]:
        yield from SOURCE
        service.stopping = True
        produce._Outage(ProduceSettings(), service)(SourceAway("away"))  # type: ignore[arg-type]

    status, sender = run(interval=0, count=0, source=images())
    assert status is Exit.OK
    assert len(sender.taken) == len(sender.sent) == 2
