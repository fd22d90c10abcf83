"""The module kafka_acls against a real broker, and what the pipeline's own ACLs let each app do."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import (
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePatternFilter,
    ResourceType,
)
from kafka.errors import AuthorizationError, KafkaError

from iot_lab.processes import Broker
from iot_lab.secure_broker import USERS, SecureBroker, pipeline_acls


class Module:
    """Calls the module as the brokers' administrator."""

    def __init__(self, call: Callable[..., dict[str, Any]], broker: SecureBroker) -> None:
        self.call = call
        self.servers = broker.bootstrap_servers
        self.client = broker.settings()

    def __call__(
        self, acls: list[dict[str, Any]], *, check: bool = False, remove: bool = False
    ) -> dict[str, Any]:
        parameters = {
            "bootstrap_servers": self.servers,
            "client": self.client,
            "acls": acls,
            "remove_unknown": remove,
            "timeout": 10,
        }
        return self.call("kafka_acls", parameters, check=check)


@pytest.fixture
def module(secure_broker: SecureBroker, ansible_module: Callable[..., dict[str, Any]]) -> Module:
    return Module(ansible_module, secure_broker)


@pytest.fixture
def name() -> str:
    return f"name-{uuid.uuid4()}"


def present(broker: SecureBroker) -> list[dict[str, Any]]:
    """The broker's ACLs as one declares them."""
    everything = ACLFilter(
        None,
        None,
        ACLOperation.ANY,
        ACLPermissionType.ANY,
        ResourcePatternFilter(ResourceType.ANY, None, ACLResourcePatternType.ANY),
    )
    with broker.admin() as admin:
        found, _ = admin.describe_acls(everything)
    return [
        {
            "principals": [acl.principal],
            "resource_type": acl.resource_pattern.resource_type.name.lower(),
            "resource_name": acl.resource_pattern.resource_name,
            "pattern": acl.resource_pattern.pattern_type.name.lower(),
            "operations": [acl.operation.name.lower()],
            "permission": acl.permission_type.name.lower(),
            "hosts": [acl.host],
        }
        for acl in found
    ]


def test_acls_through_their_life(module: Module, secure_broker: SecureBroker, name: str) -> None:
    others = present(secure_broker)
    mine: list[dict[str, Any]] = [
        {
            "principals": ["User:somebody"],
            "resource_type": "topic",
            "resource_name": name,
            "operations": ["read", "describe_configs"],
        },
        {
            "principals": ["User:somebody"],
            "resource_type": "group",
            "resource_name": name,
            "pattern": "prefixed",
            "operations": ["read"],
            "hosts": ["10.0.0.1"],
        },
    ]
    lines = [
        f"User:somebody: allow describe_configs on topic {name}",
        f"User:somebody: allow read on groups like {name}* from 10.0.0.1",
        f"User:somebody: allow read on topic {name}",
    ]
    assert sorted(module(mine, check=True)["added"]) == lines
    added = module(mine)
    assert sorted(added["added"]) == lines, "check mode has added the ACLs"
    assert f"+{lines[0]}" in added["output"], "the diff does not show the ACL"
    assert module(mine)["changed"] is False

    fewer = [{**mine[0], "operations": ["read"]}, *others]
    assert module(fewer)["changed"] is False
    assert sorted(module(fewer, check=True, remove=True)["removed"]) == lines[:2]
    assert sorted(module(fewer, remove=True)["removed"]) == lines[:2], (
        "check mode has removed the ACLs"
    )
    assert module(fewer, remove=True)["changed"] is False
    assert len(present(secure_broker)) == len(others) + 1
    assert module(others, remove=True)["removed"] == lines[2:]


def test_one_mistake_and_nothing_is_changed(
    module: Module, secure_broker: SecureBroker, name: str
) -> None:
    before = present(secure_broker)
    good = {
        "principals": ["User:somebody"],
        "resource_type": "topic",
        "resource_name": name,
        "operations": ["read"],
    }
    refused = module([good, {**good, "operations": ["idempotent_write"]}])
    assert refused["failed"]
    assert "not idempotent_write" in refused["msg"]
    assert present(secure_broker) == before


def test_brokers_without_an_authorizer_are_told(broker: Broker, module: Module, name: str) -> None:
    module.servers, module.client = broker.bootstrap_servers, {}
    acls = pipeline_acls(name)
    refused = module(acls)
    assert refused["failed"]
    assert "set authorizer.class.name" in refused["msg"]


def test_only_an_administrator_may(module: Module, secure_broker: SecureBroker, name: str) -> None:
    module.client = secure_broker.settings("iot-storage")
    refused = module(pipeline_acls(name))
    assert refused["failed"]
    assert "make it one of super.users" in refused["msg"]


class As:
    """What one user may do, tried with the clients that the apps use."""

    def __init__(self, broker: SecureBroker, user: str) -> None:
        self.options = broker.client(user) | {"allow_auto_create_topics": False}

    def writes(self, topic: str) -> bool:
        producer = KafkaProducer(
            **self.options, acks="all", enable_idempotence=True, max_block_ms=10_000
        )
        try:
            producer.send(topic, key=b"key", value=b"value").get(timeout=60)
        except KafkaError as error:
            # Who may write nowhere gets no producer's id, and kafka-python wraps that refusal.
            if "AuthorizationFailed" in repr(error):
                return False
            raise
        finally:
            with contextlib.suppress(KafkaError):
                producer.close(timeout=1)
        return True

    def reads(self, topic: str) -> bool:
        """Without a group, as the audit does."""
        partition = TopicPartition(topic, 0)
        with self._consumer() as consumer:
            try:
                if not consumer.partitions_for_topic(topic):
                    return False
            except AuthorizationError:
                return False
            consumer.assign([partition])
            consumer.seek_to_beginning(partition)
            return self._records(consumer)

    def works(self, topic: str, group: str) -> bool:
        """In a group, to which it commits, as the workers do."""
        with self._consumer(group_id=group) as consumer:
            consumer.subscribe([topic])
            if not self._records(consumer):
                return False
            consumer.commit()
            return True

    def looks_at(self, topic: str, group: str) -> bool:
        """Where a group stands, without joining it, as the audit does."""
        with self._consumer(group_id=group) as consumer:
            try:
                consumer.committed(TopicPartition(topic, 0))
            except AuthorizationError:
                return False
            return True

    @contextlib.contextmanager
    def _consumer(self, **options: Any) -> Iterator[Any]:
        consumer = KafkaConsumer(
            **self.options,
            **options,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        try:
            yield consumer
        finally:
            consumer.close(autocommit=False)

    @staticmethod
    def _records(consumer: Any) -> bool:
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                if consumer.poll(timeout_ms=200):
                    return True
        except AuthorizationError:
            return False
        raise TimeoutError("neither records nor a refusal")


# kafka-python drops the socket of a connection that it gives up while it is being made.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
def test_each_app_may_do_its_work_and_nothing_else(
    module: Module, secure_broker: SecureBroker
) -> None:
    prefix = f"{uuid.uuid4()}-"
    images, predictions = f"{prefix}iot-topic", f"{prefix}iot-predictions"
    dead_letters = f"{prefix}iot-dead-letter"
    topics = (images, predictions, dead_letters)
    secure_broker.create_topics(dict.fromkeys(topics, (1, 1_000_000)))
    for topic in topics:
        secure_broker.send(topic, b"value", b"key")
    apps = {user: As(secure_broker, user) for user in USERS}
    for user, app in apps.items():
        assert not app.writes(images), f"{user} without ACLs"

    assert module(pipeline_acls(prefix))["changed"] is True
    assert module(pipeline_acls(prefix))["changed"] is False

    written = {user: {topic for topic in topics if app.writes(topic)} for user, app in apps.items()}
    assert written == {
        "iot-producer": {images},
        "iot-inference": {predictions, dead_letters},
        "iot-storage": {dead_letters},
        "iot-audit": set(),
        "iot-operator": set(topics),
    }
    read = {user: {topic for topic in topics if app.reads(topic)} for user, app in apps.items()}
    assert read == {
        "iot-producer": set(),
        "iot-inference": {images},
        "iot-storage": {images, predictions},
        "iot-audit": set(topics),
        "iot-operator": {dead_letters},
    }
    groups = (f"{prefix}iot-inference", f"{prefix}iot-storage")
    joined = {
        user: {group for group in groups if app.works(images, group)} for user, app in apps.items()
    }
    assert joined == {
        "iot-producer": set(),
        "iot-inference": {groups[0]},
        "iot-storage": {groups[1]},
        "iot-audit": set(),
        "iot-operator": set(),
    }
    audit = apps["iot-audit"]
    assert {group for group in groups if audit.looks_at(images, group)} == set(groups)
    assert not any(apps["iot-operator"].looks_at(images, group) for group in groups)
