"""Tries what each app of this host may do at Kafka, as that app, and prints what came of it.

    stdin   {"apps": ["iot-producer"], "topics": ["iot-topic"], "groups": ["iot-storage"],
             "too_large": 3000000}
    stdout  {"iot-producer": {"read iot-topic": "refused", "write iot-topic": "granted", ...}}

Nothing is left behind. What is written is larger than the topic takes, which a broker looks at only
after it has looked at who writes; a topic is asked for with `validate_only`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import (
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    KafkaAdminClient,
    MemberToRemove,
    ResourcePatternFilter,
    ResourceType,
)
from kafka.errors import (
    AuthorizationError,
    KafkaError,
    MessageSizeTooLargeError,
    NoError,
    RetriableError,
)

from iot_pipeline.kafka import client_options
from iot_pipeline.settings import COMMANDS, CommandSettings, load

SETTINGS: dict[str, type[CommandSettings]] = {
    command.settings.SERVICE: command.settings for command in COMMANDS
}

# A partition or a group may be moving from one broker to another.
TRIES = 5


def write(options: dict[str, Any], topic: str, size: int) -> None:
    producer = KafkaProducer(
        **options,
        acks="all",
        max_request_size=2 * size,
        max_block_ms=10_000,
        # An idempotent producer is refused before it names a topic.
        enable_idempotence=False,
    )
    try:
        producer.send(topic, value=bytes(size)).get(timeout=10)
    except MessageSizeTooLargeError:
        return
    finally:
        producer.close(timeout=1)
    raise ValueError(f"{topic} took a record of {size} bytes")


def read(options: dict[str, Any], topic: str) -> None:
    consumer = KafkaConsumer(**options, group_id=None, enable_auto_commit=False)
    try:
        partitions = [
            TopicPartition(topic, number)
            for number in sorted(consumer.partitions_for_topic(topic) or {0})
        ]
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        first, last = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
        # A topic without a record has nothing to show; who may not read it is told so all the same.
        if not consumer.poll(timeout_ms=10_000 if first != last else 2_000) and first != last:
            raise ValueError(f"{topic} showed no record")
    finally:
        consumer.close(autocommit=False)


def administer(options: dict[str, Any], ask: Callable[[KafkaAdminClient], Any]) -> None:
    admin = KafkaAdminClient(**{k: v for k, v in options.items() if k not in NOT_FOR_ADMINS})
    try:
        ask(admin)
    finally:
        admin.close()


def see_acls(options: dict[str, Any]) -> None:
    def look(admin: KafkaAdminClient) -> None:
        _, error = admin.describe_acls(EVERY_ACL)
        if error is not NoError:
            raise error

    administer(options, look)


NOT_FOR_ADMINS = {"allow_auto_create_topics", "metrics_enabled"}
EVERY_ACL = ACLFilter(
    None,
    None,
    ACLOperation.ANY,
    ACLPermissionType.ANY,
    ResourcePatternFilter(ResourceType.ANY, None, ACLResourcePatternType.ANY),
)


def make_topic(options: dict[str, Any]) -> None:
    administer(options, lambda admin: admin.create_topics({"new": {}}, validate_only=True))


def look_at(options: dict[str, Any], group: str) -> None:
    administer(options, lambda admin: admin.list_group_offsets(group))


def join(options: dict[str, Any], group: str) -> None:
    """What only members may: one leaves, whom nobody knows."""
    nobody = [MemberToRemove(group_instance_id="nobody")]
    administer(options, lambda admin: admin.remove_group_members(group, nobody))


def attempts(asked: dict[str, Any]) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """What is tried: a function of a client's options, and what else it takes."""
    return {
        **{f"read {topic}": (read, (topic,)) for topic in asked["topics"]},
        **{f"write {topic}": (write, (topic, asked["too_large"])) for topic in asked["topics"]},
        **{f"join {group}": (join, (group,)) for group in asked["groups"]},
        **{f"look at {group}": (look_at, (group,)) for group in asked["groups"]},
        "make a topic": (make_topic, ()),
        "see who may what": (see_acls, ()),
    }


def outcome(attempt: Callable[..., None], *arguments: Any) -> str:
    found = ""
    for _ in range(TRIES):
        try:
            attempt(*arguments)
        except AuthorizationError:
            return "refused"
        except (KafkaError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            if not isinstance(error, RetriableError):
                break
        else:
            return "granted"
        time.sleep(1)
    return found


def main(asked: dict[str, Any]) -> None:
    answers = {}
    for app in asked["apps"]:
        options = client_options(load(SETTINGS[app]))  # type: ignore[arg-type] # one of Kafka's
        answers[app] = {
            what: outcome(attempt, options, *rest)
            for what, (attempt, rest) in attempts(asked).items()
        }
    print(json.dumps(answers))


if __name__ == "__main__":
    main(json.load(sys.stdin))
