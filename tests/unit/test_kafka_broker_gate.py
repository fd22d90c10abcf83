"""What the gate of the role kafka_broker makes of what Kafka's tools print."""

import importlib.util
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROLE = Path(__file__).parents[2] / "roles/kafka_broker"


def load() -> ModuleType:
    file = ROLE / "filter_plugins/kafka_broker_gate.py"
    spec = importlib.util.spec_from_file_location("kafka_broker_gate", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gate = load()

# As Kafka 4.3 prints it, with broker 3 away.
UNDER_REPLICATED = (
    "\tTopic: three\tPartition: 0\tLeader: 1\tReplicas: 1,2,3\tIsr: 1,2\tElr: \tLastKnownElr: \n"
    "\tTopic: only-three\tPartition: 0\tLeader: none\tReplicas: 3\tIsr: \tElr: 3\tLastKnownElr: 3\n"
    "\tTopic: one-three\tPartition: 0\tLeader: 1\tReplicas: 1,3\tIsr: 1\tElr: \tLastKnownElr: \n"
)
QUORUM = (
    "NodeId\tDirectoryId           \tLogEndOffset\tLag \tLastFetchTimestamp\tStatus  \t\n"
    "2     \tMvDxzVmcRsaTz33bUuRU6A\t104         \t0   \t1795998426222     \tLeader  \t\n"
    "1     \tJEXY6aqzQY-32P5TStzaFg\t104         \t{}  \t1795998425879     \tFollower\t\n"
    "3     \tCt97kQeiNaMqwxkyCZdw6A\t72          \t9999\t1795998412353     \tObserver\t\n"
)


def partition(replicas: str, isr: str, leader: str = "1") -> str:
    return f"\tTopic: t\tPartition: 0\tLeader: {leader}\tReplicas: {replicas}\tIsr: {isr}\tElr: \n"


def test_what_lacks_the_spared_one_alone_does_not_shut_the_gate() -> None:
    assert gate.kafka_broker_lacking(UNDER_REPLICATED, 3) == []
    assert gate.kafka_broker_lacking(UNDER_REPLICATED, "3") == []
    for spared in (-1, 1, 2):
        assert gate.kafka_broker_lacking(UNDER_REPLICATED, spared) == [
            "three-0 lacks 3",
            "only-three-0 lacks 3",
            "one-three-0 lacks 3",
        ]
    assert gate.kafka_broker_missing(UNDER_REPLICATED) == [3]


@pytest.mark.parametrize("in_sync", list(product([True, False], repeat=3)))
@pytest.mark.parametrize("spared", [-1, 1, 2, 3, 4])
def test_each_state_of_a_partition(in_sync: tuple[bool, ...], spared: int) -> None:
    present = [n for n, there in enumerate(in_sync, 1) if there]
    missing = {1, 2, 3} - set(present)
    if not missing:
        return
    leader = str(present[0]) if present else "none"
    line = partition("1,2,3", ",".join(map(str, present)), leader)
    assert bool(gate.kafka_broker_lacking(line, spared)) == (missing != {spared})


@pytest.mark.parametrize(
    "line, spared, shut",
    [
        # Nobody leads it: who was in sync last is away too.
        (partition("1,2", "1", "none"), 1, "t-0 lacks 1, 2"),
        (partition("1,2", "1", "none"), 2, "t-0 lacks 1, 2"),
        (partition("1", "1", "none"), 1, None),
        (partition("1", "1", "none"), 2, "t-0 lacks 1"),
        # Its leader is known, and no longer there.
        (partition("1,2", "1,2", "1"), 1, "t-0 lacks its leader"),
        ("Error while executing topic command", 1, "Error while executing topic command"),
        ("", 1, None),
    ],
)
def test_what_is_not_understood_shuts_the_gate(line: str, spared: int, shut: str | None) -> None:
    assert gate.kafka_broker_lacking(line, spared) == ([shut] if shut else [])


@pytest.mark.parametrize(
    "text, spared, behind",
    [
        (QUORUM.format(0), -1, []),
        (QUORUM.format(999), -1, []),
        (QUORUM.format(1000), -1, ["controller 1 is 1000 records behind its leader"]),
        (QUORUM.format(1000), 2, ["controller 1 is 1000 records behind its leader"]),
        (QUORUM.format(1000), "1", []),
        (QUORUM.format(0).replace("Leader", "Follower"), 1, ["the controllers have no leader"]),
        ("", 1, ["the controllers have no leader"]),
    ],
)
def test_controllers_follow_their_leader(text: str, spared: int | str, behind: list[str]) -> None:
    assert gate.kafka_broker_behind(text, spared) == behind


def test_one_is_spared_before_its_restart_and_never_after() -> None:
    gates = {
        (file.stem, task["name"]): task.get("vars", {})
        for file in sorted(ROLE.glob("tasks/*.yml"))
        for task in yaml.safe_load(file.read_text())
        if task.get("ansible.builtin.include_tasks") == "health.yml"
    }
    before = ("restart", "Wait until the other brokers can do without this one")
    assert gates.pop(before) == {"_kafka_broker_spared": "{{ kafka_broker_node_id }}"}
    assert len(gates) == 3
    assert not any(gates.values())
