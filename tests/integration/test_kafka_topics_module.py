"""The module kafka_topics against a real broker, called by Ansible as a play calls it."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from iot_lab.processes import Broker

ROOT = Path(__file__).parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible")


class Module:
    """Calls the module through `ansible` on this machine."""

    def __init__(self, servers: str) -> None:
        self.servers = servers

    def __call__(
        self, topics: list[dict[str, Any]], *, check: bool = False, grow: bool = False
    ) -> dict[str, Any]:
        parameters = {
            "bootstrap_servers": self.servers,
            "topics": topics,
            "grow_partitions": grow,
            "timeout": 10,
        }
        command = [str(ANSIBLE), "localhost", "--connection=local", "--module-name=kafka_topics"]
        command.append(f"--args={json.dumps(parameters)}")
        done = subprocess.run(
            [*command, "--check"] if check else command,
            env=os.environ
            | {
                "ANSIBLE_LIBRARY": str(ROOT / "roles/kafka_resources/library"),
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        result: dict[str, Any] = json.loads(done.stdout.partition("=> ")[2])
        return result | {"failed": done.returncode != 0}


@pytest.fixture
def module(broker: Broker) -> Module:
    return Module(broker.bootstrap_servers)


@pytest.fixture
def name() -> str:
    return f"declared-{uuid.uuid4()}"


def test_a_topic_through_its_life(module: Module, name: str) -> None:
    first = [{"name": name, "partitions": 2, "config": {"retention.ms": 1000000}}]
    assert module(first, check=True)["created"] == [name]
    assert module(first)["created"] == [name], "check mode has created the topic"
    assert module(first)["changed"] is False

    more = [{"name": name, "partitions": 3, "config": {"retention.ms": None, "segment.ms": 60000}}]
    refused = module(more)
    assert refused["failed"]
    assert "kafka_resources_grow_partitions" in refused["msg"]
    grown = module(more, grow=True)
    assert (grown["grown"], grown["configured"]) == ([name], [name])
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
    module.servers = "localhost:1"
    refused = module([{"name": name, "partitions": 1}])
    assert refused["failed"]
    assert "localhost:1" in refused["msg"]
