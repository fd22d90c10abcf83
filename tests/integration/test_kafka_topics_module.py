"""The module kafka_topics against a real broker, called by Ansible as a play calls it."""

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from iot_lab.processes import Broker
from iot_lab.secure_broker import SecureBroker


class Module:
    """Calls the module."""

    def __init__(self, call: Callable[..., dict[str, Any]], servers: str) -> None:
        self.call = call
        self.servers = servers
        self.timeout = 10

    def __call__(
        self, topics: list[dict[str, Any]], *, check: bool = False, grow: bool = False
    ) -> dict[str, Any]:
        parameters = {
            "bootstrap_servers": self.servers,
            "topics": topics,
            "grow_partitions": grow,
            "timeout": self.timeout,
        }
        return self.call("kafka_topics", parameters, check=check)


@pytest.fixture
def module(broker: Broker, ansible_module: Callable[..., dict[str, Any]]) -> Module:
    return Module(ansible_module, broker.bootstrap_servers)


@pytest.fixture
def name() -> str:
    return f"declared-{uuid.uuid4()}"


def test_a_topic_through_its_life(module: Module, name: str) -> None:
    first = [{"name": name, "partitions": 2, "config": {"retention.ms": 1000000}}]
    assert module(first, check=True)["created"] == [name]
    assert module(first)["created"] == [name], "check mode has created the topic"
    assert module(first)["changed"] is False

    config = {"retention.ms": None, "segment.ms": 60000, "message.timestamp.type": "LogAppendTime"}
    more = [{"name": name, "partitions": 3, "config": config}]
    refused = module(more)
    assert refused["failed"]
    assert "kafka_resources_grow_partitions" in refused["msg"]
    grown = module(more, grow=True)
    assert (grown["grown"], grown["configured"]) == ([name], [name])
    assert "than earlier records of its key" in grown["output"]
    assert module(more)["changed"] is False

    fewer = module(first, grow=True)
    assert fewer["failed"]
    assert "cannot remove partitions" in fewer["msg"]
    assert module(more)["changed"] is False


def test_one_mistake_and_nothing_is_changed(module: Module, name: str) -> None:
    good = {"name": name, "partitions": 1}
    bad = {"name": f"{name}-too", "partitions": 1, "config": {"retention.ms": "soon"}}
    refused = module([good, bad])
    assert refused["failed"]
    assert f"{name}-too: Invalid value soon for configuration retention.ms" in refused["msg"]
    assert module([good], check=True)["created"] == [name]


def test_no_broker_is_told(module: Module, name: str) -> None:
    module.servers, module.timeout = "localhost:1", 1
    refused = module([{"name": name, "partitions": 1}])
    assert refused["failed"]
    assert "localhost:1: Connection refused" in refused["msg"]


@pytest.mark.parametrize("how", ["SCRAM-SHA-512", "PLAIN", "certificate"])
def test_topics_of_a_secure_cluster(
    how: str, secure_broker: SecureBroker, ansible_module: Callable[..., dict[str, Any]], name: str
) -> None:
    if how == "certificate":
        servers, client = secure_broker.mutual_servers, secure_broker.mutual_settings()
    else:
        servers, client = secure_broker.bootstrap_servers, secure_broker.settings(mechanism=how)
    topics = [{"name": name, "partitions": 1}]
    parameters = {"bootstrap_servers": servers, "client": client, "topics": topics}
    made = ansible_module("kafka_topics", parameters)
    assert made.get("created") == [name], made["msg"]
    assert secure_broker.passwords["kafka"] not in made["output"]
