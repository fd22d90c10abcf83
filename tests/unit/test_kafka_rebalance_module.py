"""What the module kafka_rebalance makes of a cluster, and what it refuses."""

import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import ansible.module_utils
import pytest

ROLE = Path(__file__).parents[2] / "roles/kafka_resources"


def load() -> ModuleType:
    # Where Ansible puts what a role's modules share.
    ansible.module_utils.__path__.append(str(ROLE / "module_utils"))
    file = ROLE / "library/kafka_rebalance.py"
    spec = importlib.util.spec_from_file_location("kafka_rebalance", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["kafka_rebalance"] = module
    spec.loader.exec_module(module)
    return module


kafka_rebalance: Any = load()
A, B = (kafka_rebalance.Partition("t", number) for number in (0, 1))
NAMES = ["one", "two", "three"]


def cluster(down: Collection[str] = (), **changes: Any) -> Any:
    brokers = {
        number: kafka_rebalance.Broker(name, "", name not in down)
        for number, name in enumerate(NAMES, start=1)
    }
    replicas = {A: (1, 2), B: (2, 1)}
    given = {
        "brokers": brokers,
        "replicas": replicas,
        "in_sync": {at: frozenset(each) for at, each in replicas.items()},
        "leaders": {A: 1, B: 2},
        "sizes": {A: {1: 3_000_000, 2: 3_000_000}, B: {1: 1000, 2: 999}},
    }
    return kafka_rebalance.Cluster(**(given | changes))


def moving() -> Any:
    """The first partition goes from 1 to 3; half of it has arrived."""
    return cluster(
        replicas={A: (3, 2, 1), B: (2, 1)},
        moves={A: kafka_rebalance.Move(frozenset({3}), frozenset({1}))},
        sizes={A: {1: 3_000_000, 2: 3_000_000, 3: 1_500_000}},
    )


def test_brokers_retire_by_host_or_by_id() -> None:
    assert kafka_rebalance.retiring(cluster(), NAMES, ["three", "1"]) == {1, 3}
    assert kafka_rebalance.retiring(cluster(), [], []) == set()


def test_one_that_is_down_may_retire() -> None:
    assert kafka_rebalance.retiring(cluster(down=["three"]), NAMES, ["three"]) == {3}


@pytest.mark.parametrize(
    "changes, expected, retire, said",
    [
        ({}, NAMES, ["four"], r"four cannot retire: this cluster's brokers are one \(1\), two"),
        ({}, [*NAMES, "four"], [], "four is no broker of this cluster yet"),
        ({}, ["one", "two"], [], r"three \(3\) is a broker of this cluster and not of the inv"),
        ({"down": ["two"]}, NAMES, ["three"], r"two \(2\) is down: start it, or retire it"),
        ({"leaders": {A: 1}}, NAMES, [], "^t-1: no broker has the data"),
        ({"down": ["two"]}, NAMES, ["four"], "four cannot retire.*two .* is down"),
    ],
)
def test_what_stands_against_it_is_told(
    changes: Any, expected: list[str], retire: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        kafka_rebalance.retiring(cluster(**changes), expected, retire)


def test_a_plan_is_described_by_hosts_and_bytes() -> None:
    plan = kafka_rebalance.make_plan(cluster(), {1}, {})
    assert kafka_rebalance.described(cluster(), plan) == [
        "2 replicas to copy, 3.0 MB; 0 partitions change without a copy",
        "t-0: one, two → three, two (3.0 MB)",
        "t-1: two, one → two, three (1.0 kB)",
    ]
    assert kafka_rebalance.shares_of(cluster(), plan) == [
        "one: replicas 2 → 0, leads 1 → 0",
        "two: replicas 2 → 2, leads 1 → 1",
        "three: replicas 0 → 2, leads 0 → 1",
    ]
    assert kafka_rebalance.described(cluster(), {}) == [
        "Each broker has its share: nothing has to move"
    ]


def test_what_is_under_way_counts_as_arrived() -> None:
    assert moving().settled() == {A: (3, 2), B: (2, 1)}
    assert kafka_rebalance.make_plan(moving(), (), {}) == {}
    assert kafka_rebalance.progress(moving()) == "1 partitions are on their way, 1.5 MB are left"


def test_the_throttle_names_what_is_copied_from_and_to() -> None:
    throttle = kafka_rebalance.throttle_for(moving(), {A: {3}, B: set()}, 5)
    assert throttle.topics == {
        "t": dict(zip(kafka_rebalance.THROTTLED, ("0:2,0:1", "0:3"), strict=True))
    }
    assert throttle.brokers == {
        number: dict.fromkeys(kafka_rebalance.RATES, "5") for number in ("1", "2", "3")
    }


@pytest.mark.parametrize("adding, rate", [({A: {3}}, 0), ({A: set()}, 5)])
def test_without_a_rate_or_a_copy_nothing_is_throttled(adding: Any, rate: int) -> None:
    assert kafka_rebalance.throttle_for(cluster(), adding, rate).is_empty()
