"""What the role health makes of what hosts and brokers have told."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "roles/health/filter_plugins/health_report.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("health_report", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["health_report"] = module
    spec.loader.exec_module(module)
    return module


health_report = load()

AT = "2026-11-22T12:00:00Z"
BROKERS = ["broker-1", "broker-2", "broker-3"]
LIMITS: dict[str, Any] = {
    "brokers": [f"{name}:9092" for name in BROKERS],
    "controllers": [f"{name}:9093" for name in BROKERS],
    "sinks": {"iot-storage.service": "database", "iot-inference.service": "brokers"},
    "disk_warning_percent": 85,
    "disk_critical_percent": 95,
    "certificate_warning_days": 28,
    "certificate_critical_days": 7,
    "clock_offset_seconds": 1.0,
    "quorum_lag_records": 1000,
    "voter_silent_seconds": 5,
    "lag_records": 10000,
    "lag_seconds": 30,
    "stalled_seconds": 15,
    "dead_letters": 0,
    "audit_age_hours": 3,
}
UNREACHABLE = {"unreachable": True, "msg": "Failed to connect to the host via ssh"}
TIMED_OUT = "timed out"


def look(unit: str, **changes: Any) -> dict[str, Any]:
    """What a host tells on which all is well."""
    service = {
        "unit": unit,
        "state": "active",
        "seconds": 60,
        "restarts": 0,
        "problem": "",
        "metrics": {"iot_sink_up": 1.0},
    }
    return {
        "services": [service],
        "disks": [
            {
                "folder": "/",
                "size": 2**40,
                "free": 2**39,
                "used_percent": 50.0,
                "inodes_used_percent": 1.0,
            }
        ],
        "certificates": [
            {
                "file": "/host.pem",
                "subject": "CN = a",
                "not_after": "2027-11-22T12:00:00Z",
                "days": 365.0,
            }
        ],
        "unreached": {},
        "database": None,
        "audit": None,
        "clock": {"least": -0.5, "most": 0.6},
    } | changes


def partition(topic: str, leader: int, **changes: Any) -> dict[str, Any]:
    return {
        "topic": topic,
        "partition": 0,
        "leader": leader,
        "replicas": [1, 2, 3],
        "isr": [1, 2, 3],
        "min_isr": 2,
        "begin": 0,
        "end": 0,
    } | changes


def group(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": "Stable",
        "members": 2,
        "partitions": waiting(0, 0.0),
    } | changes


def waiting(lag: int, seconds: float | None, *, moved: bool | None = None) -> list[dict[str, Any]]:
    return [{"topic": "iot-topic", "partition": 0, "lag": lag, "seconds": seconds, "moved": moved}]


def state() -> dict[str, Any]:
    """What a broker's host sees of a cluster in which all is well."""
    return {
        "answers": dict.fromkeys(LIMITS["brokers"], ""),
        "brokers": [{"id": number, "host": name} for number, name in enumerate(BROKERS, 1)],
        "quorum": {
            "leader": 1,
            "voters": [
                {"id": number, "host": name, "lag": 0, "silent": 0.3}
                for number, name in enumerate(BROKERS, 1)
            ],
        },
        "partitions": [partition("iot-topic", 2), partition("iot-dead-letter", 3)],
        "groups": [group("iot-inference"), group("iot-storage")],
    }


class World:
    """Hosts and cluster, all well, for a test to break."""

    def __init__(self) -> None:
        self.looks = {
            **{name: look("kafka.service") for name in BROKERS},
            "inference": look("iot-inference.service"),
            "storage": look("iot-storage.service"),
            "database": look("couchdb.service", database={"url": "https://db", "problem": ""}),
        }
        self.states = {name: state() for name in BROKERS}

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = health_report.report(self.looks, self.states, LIMITS, AT)
        return found

    def findings(self) -> list[tuple[str, str, str]]:
        return [(f["name"], f["severity"], f["host"]) for f in self.report()["findings"]]

    def see(self, **changes: Any) -> None:
        """Let every broker's host see the same."""
        for each in self.states.values():
            each.update(copy.deepcopy(changes))

    def lose(self, name: str, problem: str = TIMED_OUT, *, noticed: bool = True) -> None:
        """A broker does not answer; its cluster has noticed, or not yet."""
        del self.states[name]
        number = BROKERS.index(name) + 1
        for each in self.states.values():
            each["answers"][f"{name}:9092"] = problem
            each["groups"] = []
            if noticed:
                each["brokers"] = [b for b in each["brokers"] if b["id"] != number]
                for part in each["partitions"]:
                    part["isr"] = [i for i in part["isr"] if i != number]
                    if part["leader"] == number:
                        part["leader"] = part["isr"][0] if part["isr"] else -1


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_is_wrong(world: World) -> None:
    found = world.report()
    assert (found["status"], found["findings"]) == ("ok", [])
    assert "nothing is wrong" in health_report.text(found)


def test_a_host_that_is_off(world: World) -> None:
    world.looks["inference"] = UNREACHABLE
    assert world.findings() == [("host-unreachable", "critical", "inference")]
    assert world.report()["findings"][0]["detail"] == UNREACHABLE["msg"]


@pytest.mark.parametrize(
    "changes, detail",
    [
        ({"state": "failed (failed)"}, "iot-inference.service is failed (failed)"),
        ({"state": "activating (auto-restart)"}, "is activating (auto-restart)"),
        # A process that a signal has stopped.
        ({"problem": "no answer at 127.0.0.1:9102 (timed out)"}, "runs, but gives no answer"),
    ],
)
def test_a_service(world: World, changes: dict[str, Any], detail: str) -> None:
    world.looks["inference"]["services"][0].update(changes)
    assert world.findings() == [("service-down", "critical", "inference")]
    assert detail in world.report()["findings"][0]["detail"]


@pytest.mark.parametrize(
    "changes, severity",
    [
        ({"used_percent": 84.9}, None),
        ({"used_percent": 85.0}, "warning"),
        ({"used_percent": 95.0}, "critical"),
        ({"inodes_used_percent": 96.0}, "critical"),
    ],
)
def test_a_disk(world: World, changes: dict[str, Any], severity: str | None) -> None:
    world.looks["database"]["disks"][0].update(changes)
    assert world.findings() == ([("disk-full", severity, "database")] if severity else [])


@pytest.mark.parametrize(
    "days, severity",
    [(28.0, None), (27.9, "warning"), (6.9, "critical"), (-1.0, "critical"), (None, "critical")],
)
def test_a_certificate(world: World, days: float | None, severity: str | None) -> None:
    world.looks["storage"]["certificates"][0]["days"] = days
    assert world.findings() == ([("certificate-expires", severity, "storage")] if severity else [])


@pytest.mark.parametrize(
    "least, most, wrong",
    [(-3.0, 3.0, False), (1.1, 4.0, True), (-9.0, -1.1, True), (0.9, 9.0, False)],
)
def test_a_clock_is_wrong_only_if_that_is_certain(
    world: World, least: float, most: float, wrong: bool
) -> None:
    world.looks["storage"]["clock"] = {"least": least, "most": most}
    assert world.findings() == ([("clock-offset", "warning", "storage")] if wrong else [])


def test_one_broker_of_three(world: World) -> None:
    world.looks["broker-3"] = UNREACHABLE
    world.lose("broker-3")
    assert world.findings() == [
        ("host-unreachable", "critical", "broker-3"),
        ("broker-lost", "critical", "broker-3"),
        ("under-replicated-partitions", "warning", ""),
    ]


def test_a_frozen_broker_before_its_cluster_notices(world: World) -> None:
    world.lose("broker-2", noticed=False)
    assert world.findings() == [
        ("broker-lost", "critical", "broker-2"),
        ("offline-partitions", "critical", ""),
        ("under-replicated-partitions", "warning", ""),
    ]


def test_two_brokers_of_three(world: World) -> None:
    world.lose("broker-1", noticed=False)
    world.lose("broker-2", noticed=False)
    world.see(quorum={"error": "no answer", "voters": []})
    assert world.findings() == [
        ("broker-lost", "critical", "broker-1"),
        ("broker-lost", "critical", "broker-2"),
        ("offline-partitions", "critical", ""),
        ("under-min-isr", "critical", ""),
        ("quorum-voter-lost", "critical", ""),
        ("under-replicated-partitions", "warning", ""),
    ]


def test_brokers_cut_off_from_each_other(world: World) -> None:
    for name, each in world.states.items():
        each["answers"] = {
            server: "" if server.startswith(name) else TIMED_OUT for server in LIMITS["brokers"]
        }
        each["groups"] = []
    world.see(quorum={"error": "no answer", "voters": []})
    found = world.report()["findings"]
    lost = [f for f in found if f["name"] == "broker-lost"]
    assert [f["host"] for f in lost] == ["broker-2", "broker-3"]
    assert "it answers its own host" in lost[0]["detail"]
    assert "quorum-voter-lost" in {f["name"] for f in found}


def test_the_view_of_most_counts(world: World) -> None:
    alone = world.states["broker-1"]
    alone["answers"] |= {"broker-2:9092": TIMED_OUT, "broker-3:9092": TIMED_OUT}
    alone["partitions"] = []
    for name in ("broker-2", "broker-3"):
        world.states[name]["answers"]["broker-1:9092"] = TIMED_OUT
    assert world.report()["kafka"]["asked_from"] == "broker-2"
    assert ("broker-lost", "critical", "broker-1") in world.findings()
    assert ("broker-lost", "critical", "broker-2") not in world.findings()


def test_a_broker_that_is_not_let_in(world: World) -> None:
    brokers = state()["brokers"][:2]
    world.see(brokers=brokers)
    assert world.findings() == [("broker-lost", "critical", "broker-3")]


def test_nobody_can_ask(world: World) -> None:
    world.states = {"broker-1": {"failed": True, "msg": "python: not found"}}
    assert [f for f in world.findings() if f[0] == "broker-lost"] == [
        ("broker-lost", "critical", name) for name in BROKERS
    ]
    assert "nor this host: python: not found" in world.report()["findings"][0]["detail"]


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"leader": -1}, {"offline-partitions"}),
        ({"isr": [1, 2]}, {"under-replicated-partitions"}),
        ({"isr": [1]}, {"under-replicated-partitions", "under-min-isr"}),
        ({"replicas": [1], "isr": [1], "min_isr": 1}, set()),
    ],
)
def test_partitions(world: World, changes: dict[str, Any], names: set[str]) -> None:
    world.see(partitions=[partition("iot-topic", 1) | changes])
    assert {name for name, _, _ in world.findings()} == names


@pytest.mark.parametrize(
    "voter, finding",
    [
        ({"silent": 6.0}, ("quorum-voter-lost", "critical", "broker-2")),
        ({"silent": None}, ("quorum-voter-lost", "critical", "broker-2")),
        ({"lag": 1001}, ("quorum-lag", "warning", "broker-2")),
    ],
)
def test_a_controller(world: World, voter: dict[str, Any], finding: tuple[str, str, str]) -> None:
    quorum = state()["quorum"]
    quorum["voters"][1].update(voter)
    world.see(quorum=quorum)
    assert world.findings() == [finding]


def test_a_controller_that_never_joined(world: World) -> None:
    quorum = state()["quorum"]
    quorum["voters"].pop()
    world.see(quorum=quorum)
    assert world.findings() == [("quorum-voter-lost", "warning", "")]


@pytest.mark.parametrize(
    "changes, finding",
    [
        ({"partitions": waiting(10000, 30.0)}, None),
        ({"partitions": waiting(10001, 1.0)}, ("consumer-lag", "warning", "")),
        ({"partitions": waiting(1, 31.0)}, ("consumer-lag", "warning", "")),
        ({"partitions": waiting(1, 16.0, moved=False)}, ("group-stalled", "critical", "")),
        ({"partitions": waiting(1, 14.0, moved=False)}, None),
        # It catches up, however late it is.
        ({"partitions": waiting(1, 900.0, moved=True)}, ("consumer-lag", "warning", "")),
        # Another partition comes first.
        ({"partitions": waiting(1, 20.0, moved=True) + waiting(1, 20.0, moved=False)}, None),
        (
            {"partitions": waiting(1, 20.0, moved=True) + waiting(1, 61.0, moved=False)},
            ("group-stalled", "critical", ""),
        ),
        # Of some the brokers tell no time, since the heads of others fill an answer.
        ({"partitions": waiting(1, None) + waiting(1, 1.0)}, None),
        ({"partitions": waiting(0, None)}, None),
        ({"partitions": waiting(1, None)}, ("not-known", "warning", "")),
        ({"members": 0, "state": "Empty"}, ("group-stalled", "critical", "")),
        ({"error": "no coordinator", "partitions": []}, ("group-stalled", "critical", "")),
    ],
)
def test_a_group(
    world: World, changes: dict[str, Any], finding: tuple[str, str, str] | None
) -> None:
    world.see(groups=[group("iot-storage", **changes)])
    assert world.findings() == ([finding] if finding else [])


@pytest.mark.parametrize("count, wrong", [(0, False), (1, True), (None, True)])
def test_dead_letters(world: World, count: int | None, wrong: bool) -> None:
    world.looks["storage"]["dead_letters"] = count
    assert world.findings() == ([("dead-letters", "warning", "storage")] if wrong else [])
    assert world.report()["status"] == ("warning" if wrong else "ok")


def test_one_host_that_can_count_dead_letters_is_enough(world: World) -> None:
    world.looks["inference"]["dead_letters"] = None
    world.looks["storage"]["dead_letters"] = 0
    assert world.findings() == []
    assert world.report()["dead_letters"] == 0


def test_a_figure_that_was_asked_for_and_is_not_told_is_not_well(world: World) -> None:
    for figure in ("end", "min_isr"):
        world.see(partitions=[partition("iot-topic", 1, **{figure: None})])
        assert world.findings() == [("not-known", "warning", "")]
        # Nobody asks for it, or who is lost cannot tell.
        world.see(partitions=[partition("__consumer_offsets", 1, end=None)])
        assert world.findings() == []
    world.looks["storage"]["services"][0]["metrics"] = {}
    assert world.findings() == [("not-known", "warning", "storage")]


def test_the_database(world: World) -> None:
    world.looks["database"]["database"]["problem"] = "Connection refused"
    world.looks["storage"]["unreached"] = {"database:6984": "Connection refused"}
    # That storage does not reach what is down is no second thing to mend.
    assert world.findings() == [("database-down", "critical", "database")]


@pytest.mark.parametrize(
    "server, name",
    [
        ("database:6984", "database-down"),
        ("broker-1:9092", "broker-lost"),
        ("broker-1:9093", "quorum-voter-lost"),
    ],
)
def test_a_host_that_is_cut_off(world: World, server: str, name: str) -> None:
    world.looks["storage"]["unreached"] = {server: TIMED_OUT}
    assert world.findings() == [(name, "critical", "storage")]


@pytest.mark.parametrize("host, name", [("storage", "database-down"), ("inference", "broker-lost")])
def test_a_service_that_waits_for_its_sink(world: World, host: str, name: str) -> None:
    world.looks[host]["services"][0]["metrics"] = {"iot_sink_up": 0.0}
    assert world.findings() == [(name, "critical", host)]


AUDIT = {"at": "2026-11-22T11:00:00Z", "produced": 9, "missing": 0, "duplicated": 0}


@pytest.mark.parametrize(
    "audit, finding",
    [
        (AUDIT, None),
        ({}, ("audit-stale", "warning", "storage")),
        (AUDIT | {"missing": None}, ("not-known", "warning", "storage")),
        ({"produced": 1}, ("not-known", "warning", "storage")),
        (AUDIT | {"at": "2026-11-22T08:59:00Z"}, ("audit-stale", "warning", "storage")),
        (AUDIT | {"missing": 1}, ("audit-missing", "critical", "storage")),
        (AUDIT | {"duplicated": 1}, ("audit-missing", "critical", "storage")),
        (AUDIT | {"lost": 1}, ("audit-missing", "critical", "storage")),
    ],
)
def test_the_last_audit(
    world: World, audit: dict[str, Any], finding: tuple[str, str, str] | None
) -> None:
    world.looks["storage"]["audit"] = audit
    assert world.findings() == ([finding] if finding else [])


def test_the_newest_audit_counts(world: World) -> None:
    world.looks["storage"]["audit"] = AUDIT
    world.looks["inference"]["audit"] = {}
    assert world.findings() == []


def test_a_host_is_told_once_that_its_own_database_is_down(world: World) -> None:
    storage = world.looks["storage"]
    storage["database"] = {"url": "https://127.0.0.1:6984/a", "problem": "Connection refused"}
    storage["unreached"] = {"127.0.0.1:6984": "Connection refused"}
    storage["services"][0]["metrics"] = {"iot_sink_up": 0.0}
    assert world.findings() == [("database-down", "critical", "storage")]


def test_what_is_critical_comes_first_and_is_told_with_what_to_do(world: World) -> None:
    world.looks["database"]["disks"][0]["used_percent"] = 90.0
    world.looks["inference"]["services"][0]["state"] = "failed (failed)"
    found = world.report()
    assert found["status"] == "critical"
    lines = health_report.text(found).splitlines()
    assert lines[2].startswith("CRITICAL service-down inference: iot-inference.service")
    assert "on inference: sudo journalctl -u iot-inference.service" in lines[3]
    assert lines[5].startswith("WARNING disk-full database: /: 90 % used")


def test_a_report_of_nothing_but_outages_can_be_read(world: World) -> None:
    world.looks = dict.fromkeys(world.looks, UNREACHABLE)
    world.states = {}
    text = health_report.text(world.report())
    assert text.count("host-unreachable") == len(world.looks)
    assert text.count("no answer") == len(world.looks)


def test_every_name_is_explained() -> None:
    page = (FILE.parents[3] / "docs/operations.md").read_text()
    assert [name for name in health_report.NAMES if f"| `{name}` |" not in page] == []
