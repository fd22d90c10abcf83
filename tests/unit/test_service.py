"""Log lines, and what systemd hears."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from iot_pipeline.service import (
    LAST_SECONDS,
    STOP_SECONDS,
    Log,
    Notifier,
    Service,
    _RepeatFilter,
    set_up_logging,
)
from iot_pipeline.settings import StoreSettings


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root, ours = logging.getLogger(), logging.getLogger("iot_pipeline")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def lines_of(code: str, **environment: str) -> list[str]:
    """Standard error of a process of its own, since the log goes to the real one."""
    program = f"from iot_pipeline.service import *; set_up_logging('info'); log = Log('x'); {code}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )
    return done.stderr.splitlines()


def test_a_line_is_an_event_and_its_values() -> None:
    [line] = lines_of("log.info('stored', id='a-1', complete='true', share=0.25)")
    moment, rest = line.split(" ", 1)
    assert moment.endswith("Z")
    assert rest == "info stored id=a-1 complete=true share=0.25"


def test_values_that_would_break_a_line_are_quoted() -> None:
    [line] = lines_of(r"""log.warning('x', a='two words', b='li\nne', c='say "no"', d='', e='=')""")
    assert line.endswith(r'x a="two words" b="li\nne" c="say \"no\"" d="" e="="')


def test_the_journal_gets_priorities_and_no_second_time_stamp(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    program = (
        "from iot_pipeline.service import *; set_up_logging('debug'); log = Log('x');"
        "log.debug('a'); log.info('b'); log.warning('c'); log.error('d', error='e f')"
    )
    with file.open("w") as stream:
        status = os.fstat(stream.fileno())
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            stderr=stream,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path)}
            | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        )
    assert file.read_text().splitlines() == ["<7>a", "<6>b", "<4>c", '<3>d error="e f"']


def test_nothing_below_the_level_is_written() -> None:
    assert lines_of("log.debug('x')") == []


def test_a_library_repeats_itself_once_a_minute_but_we_may() -> None:
    calm = _RepeatFilter()

    def passes(name: str, created: float) -> bool:
        record = logging.LogRecord(name, logging.ERROR, "", 0, "lost %s", ("it",), None)
        record.created = created
        return calm.filter(record)

    start = time.time()
    assert passes("kafka.net", start)
    assert not passes("kafka.net", start + 59)
    assert passes("kafka.net", start + 61)
    assert passes("iot_pipeline.store", start)
    assert passes("iot_pipeline.store", start)


def test_an_abstract_socket_hears_us_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"iot-pipeline-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(5)
        notifier = Notifier()
        notifier.send("READY=1", "STATUS=working")
        notifier.close()
        assert systemd.recv(100) == b"READY=1\nSTATUS=working"


def test_without_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.send("READY=1")
    notifier.close()


@pytest.fixture
def deaf_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Service, socket.socket]]:
    """A service, and a socket of systemd's that takes nothing more until it is read."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as noise,
    ):
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        noise.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                noise.sendto(b"noise", str(tmp_path / "notify"))
        service = Service(StoreSettings())
        yield service, systemd
        service._notifier.close()


def heard(systemd: socket.socket) -> list[str]:
    lines: list[str] = []
    with suppress(BlockingIOError):
        while True:
            lines += systemd.recv(4096).decode().split("\n")
    return [line for line in lines if line != "noise"]


def test_what_systemd_did_not_take_is_said_again(
    deaf_systemd: tuple[Service, socket.socket],
) -> None:
    service, systemd = deaf_systemd
    service.ready("working")
    service.status("working well")
    service.alive()
    assert heard(systemd) == []
    service.alive()
    assert heard(systemd) == ["READY=1", "STATUS=working well", "WATCHDOG=1"]
    service.alive()
    service.status("working")
    assert heard(systemd) == ["STATUS=working"]


def test_only_a_sign_of_life_feeds_the_watchdog(
    deaf_systemd: tuple[Service, socket.socket],
) -> None:
    service, systemd = deaf_systemd
    service.alive()
    heard(systemd)
    service.status("hanging")
    assert heard(systemd) == ["STATUS=hanging"]


def test_a_status_is_one_line(deaf_systemd: tuple[Service, socket.socket]) -> None:
    service, systemd = deaf_systemd
    heard(systemd)
    service.status("it says\nREADY=1")
    assert heard(systemd) == ["STATUS=it says READY=1"]


def test_all_that_comes_at_the_end_shares_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(StoreSettings())
    assert service.stopping_for() == 0
    assert service.left(600) == 600
    service.stop()
    assert service.left(5) == 5
    assert service.left(600) <= STOP_SECONDS
    time.sleep(0.01)
    before = service.stopping_for()
    service.stop()
    assert service.stopping_for() >= before > 0, "a second signal gives no more time"
    monkeypatch.setattr("iot_pipeline.service.STOP_SECONDS", 0.0)
    assert service.left(5) == LAST_SECONDS
    service._notifier.close()


def test_waiting_ends_at_once_when_asked_to_stop() -> None:
    service = Service(StoreSettings())
    assert service.wait(0.01) is False
    service.stop()
    assert service.wait(3600) is True
    service._notifier.close()


def test_the_log_holds_no_password(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "password"
    secret.write_text("hush")
    with Service(StoreSettings(store_user="iot", store_password_file=str(secret))):
        pass
    set_up_logging("info")
    Log("test").info("end")
    text = capfd.readouterr().err
    assert "store_user=iot" in text
    assert "hush" not in text
