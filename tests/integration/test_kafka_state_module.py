"""The module kafka_state against a real broker, called by Ansible as a play calls it."""

import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from iot_lab.processes import wait_for
from iot_lab.secure_broker import SecureBroker

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(secure_broker: SecureBroker, ansible_module: Callable[..., dict[str, Any]]) -> Ask:
    def ask(*servers: str, **changes: Any) -> dict[str, Any]:
        parameters = {
            "bootstrap_servers": ",".join([*servers, secure_broker.bootstrap_servers]),
            "client": secure_broker.settings(),
            "timeout": 5,
        }
        return ansible_module("kafka_state", parameters | changes)

    return ask


@pytest.fixture
def topic(secure_broker: SecureBroker) -> str:
    name = f"looked-at-{uuid.uuid4()}"
    # Senders tell how old a record is.
    secure_broker.create_topics({name: (2, 100_000)}, config={})
    return name


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Connections are made, and nobody answers: what a stopped process leaves."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def send(broker: SecureBroker, topic: str, count: int, *, age: float = 0) -> None:
    """Send records to partition 0, as if they were some seconds old."""
    producer = KafkaProducer(**broker.client(), linger_ms=50)
    for _ in range(count):
        moment = int((time.time() - age) * 1000)
        producer.send(topic, b"value", partition=0, timestamp_ms=moment)
    producer.flush()
    producer.close()


def commit(broker: SecureBroker, group: str, topic: str, offset: int) -> None:
    consumer = KafkaConsumer(**broker.client(), group_id=group, enable_auto_commit=False)
    consumer.assign([TopicPartition(topic, 0)])
    consumer.commit({TopicPartition(topic, 0): OffsetAndMetadata(offset, "", -1)})
    consumer.close()


def test_the_cluster(ask: Ask, topic: str, secure_broker: SecureBroker) -> None:
    send(secure_broker, topic, 3)
    found = ask()
    assert found["answers"] == {secure_broker.bootstrap_servers: ""}, found
    assert [broker["id"] for broker in found["brokers"]] == [1]
    assert found["quorum"]["leader"] == 1
    assert [(v["id"], v["lag"], v["silent"]) for v in found["quorum"]["voters"]] == [(1, 0, 0)]
    first, second = (p for p in found["partitions"] if p["topic"] == topic)
    assert (first["leader"], first["replicas"], first["isr"], first["min_isr"]) == (1, [1], [1], 1)
    assert [(p["begin"], p["end"]) for p in (first, second)] == [(0, 3), (0, 0)]
    assert secure_broker.passwords["kafka"] not in found["output"]


def test_a_group_that_has_stopped(ask: Ask, topic: str, secure_broker: SecureBroker) -> None:
    group = f"group-{topic}"
    send(secure_broker, topic, 5, age=120)
    commit(secure_broker, group, topic, 2)
    found = ask(groups=[{"name": group, "topics": [topic]}])["groups"][0]
    assert (found["state"], found["members"]) == ("Empty", 0)
    first, second = found["partitions"]
    assert (first["offset"], first["lag"], first["moved"]) == (2, 3, False)
    assert 120 <= first["seconds"] < 240
    assert (second["lag"], second["seconds"], second["moved"]) == (0, 0, None)


def test_a_group_at_work(ask: Ask, topic: str, secure_broker: SecureBroker) -> None:
    group = f"group-{topic}"
    consumer = KafkaConsumer(topic, **secure_broker.client(), group_id=group)
    try:
        wait_for(lambda: bool(consumer.poll(timeout_ms=100) or consumer.assignment()), "it")
        found = ask(groups=[{"name": group, "topics": [topic]}])["groups"][0]
    finally:
        consumer.close()
    assert (found["state"], found["members"]) == ("Stable", 1)
    assert [p["lag"] for p in found["partitions"]] == [0, 0]


def test_a_group_that_never_was(ask: Ask, topic: str, secure_broker: SecureBroker) -> None:
    send(secure_broker, topic, 4)
    commit(secure_broker, "another", topic, 1)  # The first commit makes Kafka's own topic.
    found = ask(groups=[{"name": f"group-{topic}", "topics": [topic]}])["groups"][0]
    assert found["members"] == 0
    # It would begin with what there is.
    assert [p["lag"] for p in found["partitions"]] == [4, 0]


def test_what_does_not_answer_keeps_nobody_waiting(
    ask: Ask, topic: str, silent_server: str
) -> None:
    found = ask(silent_server, "127.0.0.1:1")
    assert found["answers"][silent_server] == "timed out"
    assert found["answers"]["127.0.0.1:1"] == "Connection refused"
    assert topic in {p["topic"] for p in found["partitions"]}


def test_a_stopped_broker(ask: Ask, secure_broker: SecureBroker) -> None:
    assert secure_broker.pid
    os.kill(secure_broker.pid, signal.SIGSTOP)
    try:
        found = ask(timeout=1)
    finally:
        os.kill(secure_broker.pid, signal.SIGCONT)
    assert found["answers"] == {secure_broker.bootstrap_servers: "timed out"}, found
    assert (found["failed"], found["brokers"], found["partitions"]) == (False, [], [])
    assert "no broker answers" in found["quorum"]["error"]


def test_a_wrong_password(ask: Ask, secure_broker: SecureBroker) -> None:
    client = secure_broker.settings() | {"password": "not the one"}
    found = ask(client=client)
    assert "does not let in kafka" in found["answers"][secure_broker.bootstrap_servers]


def test_wrong_settings(ask: Ask) -> None:
    found = ask(client={"security_protocol": "SASL_SSL"})
    assert found["failed"]
    assert "set username and password" in found["msg"]
