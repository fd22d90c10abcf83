"""What `lab status` and `lab report` make of the hosts' answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from iot_lab.console import duration, table
from iot_lab.hosts import Machine
from iot_lab.images import mirrors
from iot_lab.report import (
    Host,
    Pipeline,
    Service,
    auditor,
    is_healthy,
    parse_host,
    render_hosts,
    render_pipeline,
)

BROKER = Machine("broker", "192.168.56.12", 1024, 2, "debian13", ("kafka_brokers",))
STORAGE = Machine("storage", "192.168.56.14", 768, 1, "debian12", ("storage_nodes",))

ANSWER = """\
system Debian GNU/Linux 12
up     725
memory 104857600
now 1700000300
units
Id=kafka.service
LoadState=not-found
ActiveState=inactive
SubState=dead
ActiveEnterTimestamp=
NRestarts=0

NRestarts=2
Id=iot-storage.service
LoadState=loaded
ActiveState=active
SubState=running
ActiveEnterTimestamp=@1700000000

Id=couchdb.service
LoadState=loaded
ActiveState=activating
SubState=auto-restart
ActiveEnterTimestamp=
NRestarts=7
"""

AUDIT = {
    "produced": 1200,
    "stored": 1199,
    "predicted": 1198,
    "pending": 2,
    "missing": 0,
    "duplicated": 0,
    "dead_lettered": 3,
    "accuracy": 0.91234,
    "latency_p50": 0.12,
    "latency_p95": 0.456,
}


@pytest.mark.parametrize(
    "answering, asked",
    [({"s1", "s2"}, "s1"), ({"s2", "s3"}, "s2"), ({"s3", "broker"}, "s3"), (set(), "s1")],
)
def test_the_first_storage_host_that_answers_is_asked(
    monkeypatch: pytest.MonkeyPatch, answering: set[str], asked: str
) -> None:
    def command(machine: Machine, *words: str) -> list[str]:
        # What ssh does with a host that is there, and with one that is not.
        return [*words] if machine.name in answering else ["sh", "-c", "exit 255"]

    monkeypatch.setattr("iot_lab.remote.command", command)
    storage = [replace(STORAGE, name=name) for name in ("s1", "s2", "s3")]
    assert auditor([BROKER, *storage]) == storage[int(asked[1]) - 1]


def test_where_nobody_stores_nobody_is_asked() -> None:
    assert auditor([BROKER]) is None
    assert auditor([BROKER, STORAGE]) is STORAGE


def test_a_hosts_answer_is_read() -> None:
    host = parse_host(STORAGE, ANSWER)

    assert (host.system, host.up, host.memory_mb) == ("Debian 12", 725.0, 100)
    assert list(host.services) == [
        Service("iot-storage", "active", 300.0, 2),
        Service("couchdb", "activating (auto-restart)", None, 7),
    ]


@pytest.mark.parametrize("answer", ["", "sudo: a password is required\n"])
def test_another_answer_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="unexpected answer"):
        parse_host(STORAGE, answer)


def test_hosts_are_shown_aligned() -> None:
    running = Service("kafka", "active", 65.0, 0)
    hosts = [
        Host(BROKER, system="Debian 13", up=7300, memory_mb=536, services=[running]),
        Host(STORAGE, system="Debian 12", up=9, memory_mb=70),
    ]

    assert is_healthy(hosts)
    assert (
        render_hosts("couchdb", hosts, coloured=False)
        == """\
Lab couchdb: 2 hosts and 1 services, all running

  HOST     ADDRESS        SYSTEM     CPUS          MEMORY  UP
  broker   192.168.56.12  Debian 13     2  536 of 1024 MB  2 h 1 min
  storage  192.168.56.14  Debian 12     1    70 of 768 MB  9 s

  SERVICE  HOST    STATE    FOR        RESTARTS
  kafka    broker  running  1 min 5 s         0"""
    )


def test_what_does_not_run_is_told() -> None:
    failed = Service("kafka", "failed (failed)", None, 5)
    hosts = [Host(BROKER, services=[failed]), Host(STORAGE, error="No route to host")]

    shown = render_hosts("couchdb", hosts, coloured=False)

    assert not is_healthy(hosts)
    assert "1 of 2 hosts down, 1 of 1 services not running" in shown
    assert "storage: No route to host" in shown
    assert "failed (failed)" in shown


def test_colours_are_for_terminals_alone() -> None:
    hosts = [Host(STORAGE, error="No route to host")]

    assert "\033[" not in render_hosts("couchdb", hosts, coloured=False)
    assert "\033[31m" in render_hosts("couchdb", hosts, coloured=True)


def test_images_are_shown_with_the_verdict() -> None:
    topics = {"iot-topic": {"partitions": 4, "records": 1200}}

    shown = render_pipeline(Pipeline(topics, AUDIT), coloured=False)

    assert "iot-topic           4    1,200" in shown
    assert "none missing, none twice" in shown
    assert "Accuracy so far: 91.2%" in shown
    assert "95 % within 0.46 s" in shown


def test_lost_images_are_told() -> None:
    shown = render_pipeline(Pipeline({}, {**AUDIT, "missing": 2}), coloured=False)

    assert "none missing" not in shown
    assert "see make audit" in shown


def test_before_the_first_image_there_are_no_shares() -> None:
    nothing = dict.fromkeys(AUDIT, 0) | {"accuracy": None, "latency_p50": None, "latency_p95": None}

    shown = render_pipeline(Pipeline({}, nothing), coloured=False)

    assert "Accuracy" not in shown
    assert "half within" not in shown


def test_what_could_not_be_asked_is_told() -> None:
    assert "topics: refused" in render_pipeline(
        Pipeline(errors=["topics: refused"]), coloured=False
    )


@pytest.mark.parametrize(
    "seconds,expected",
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90061, "1 d 1 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_a_table_without_rows_is_its_header() -> None:
    assert table(["A", "B"], []) == "  A  B"


def test_images_come_from_where_the_machines_packages_come_from() -> None:
    repositories = [
        ("http://mirror.example/debian/", "bookworm"),
        ("http://mirror.example/debian/", "bookworm-updates"),
        ("http://mirror.example/security/", "bookworm-security"),
        ("http://mirror.example/debian/", "bookworm-backports"),
        ("http://mirror.example/debian/", "bookworm"),
    ]

    assert mirrors("trixie", repositories) == [
        "deb http://mirror.example/debian/ trixie main",
        "deb http://mirror.example/debian/ trixie-updates main",
        "deb http://mirror.example/security/ trixie-security main",
    ]


def test_without_a_mirror_of_the_suite_itself_debians_own_is_taken() -> None:
    assert mirrors("trixie", []) == []
    assert mirrors("trixie", [("http://mirror.example/s/", "bookworm-security")]) == []
