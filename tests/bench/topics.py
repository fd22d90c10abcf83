"""Makes, reads and removes the benchmark's topics and groups.

Runs on a host in the apps' environment. Reads what to do as JSON from standard input and prints
JSON.
"""

import json
import sys
import time
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, MemberToRemove, NewTopic

PATIENCE = 30.0  # seconds


def create(admin: Any, topics: list[dict[str, Any]]) -> None:
    """Make topics; each has the configuration of the topic it is to be `like`."""
    names = {topic["like"] for topic in topics}
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, n) for n in names])
    new = [
        NewTopic(
            name=topic["name"],
            num_partitions=topic["partitions"],
            replication_factor=1,
            topic_configs={
                key: entry["value"] if isinstance(entry, dict) else entry
                for key, entry in found["topic"][topic["like"]].items()
            },
        )
        for topic in topics
    ]
    admin.create_topics(new)
    admin.wait_for_topics([topic["name"] for topic in topics])


def remove(admin: Any, prefix: str) -> None:
    """Remove topics and groups whose names begin with the prefix, and wait until they are gone."""
    if not prefix.startswith("iot-bench-"):
        raise ValueError(f"{prefix} is not the benchmark's")
    topics = [name for name in admin.list_topics() if name.startswith(prefix)]
    if topics:
        admin.delete_topics(topics)
    groups = [group["group_id"] for group in admin.list_groups()]
    groups = [group for group in groups if group.startswith(prefix)]
    for group in groups:
        members = admin.describe_groups([group])[group]["members"]
        # A member with a name of its own is kept for a while after it has left.
        names = [member["group_instance_id"] for member in members]
        left = [MemberToRemove(group_instance_id=name) for name in names if name]
        if left:
            admin.remove_group_members(group, left)
    if groups:
        admin.delete_groups(groups)
    end = time.monotonic() + PATIENCE
    while any(name.startswith(prefix) for name in admin.list_topics()):
        if time.monotonic() > end:
            raise TimeoutError(f"topics {prefix}* are still there")
        time.sleep(0.2)


def records(servers: list[str], topic: str) -> int:
    """How many records a topic holds."""
    with_offsets = KafkaConsumer(bootstrap_servers=servers, enable_auto_commit=False)
    try:
        numbers = with_offsets.partitions_for_topic(topic) or ()
        partitions = [TopicPartition(topic, number) for number in numbers]
        starts = with_offsets.beginning_offsets(partitions)
        ends = with_offsets.end_offsets(partitions)
        return sum(ends[partition] - starts[partition] for partition in partitions)
    finally:
        with_offsets.close()


def values(servers: list[str], topic: str, count: int) -> list[str]:
    """The values of some records of a topic."""
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        consumer_timeout_ms=10_000,
    )
    try:
        found = (record.value.decode() for record in consumer)
        return [value for _, value in zip(range(count), found, strict=False)]
    finally:
        consumer.close()


def main() -> None:
    request = json.load(sys.stdin)
    servers = request["servers"]
    answer: Any = None
    if request["action"] == "records":
        answer = records(servers, request["topic"])
    elif request["action"] == "values":
        answer = values(servers, request["topic"], request["count"])
    else:
        admin = KafkaAdminClient(bootstrap_servers=servers)
        try:
            if request["action"] == "create":
                create(admin, request["topics"])
            else:
                remove(admin, request["prefix"])
        finally:
            admin.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
