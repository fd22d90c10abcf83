"""Makes, counts and removes the benchmark's topics, groups and rights.

Runs on a broker's host as root, in the environment of the role kafka_resources, as the cluster's
administrator. Reads what to do as JSON from standard input and prints JSON.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ConfigResource,
    ConfigResourceType,
    MemberToRemove,
    NewTopic,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
)

PREFIX = "iot-bench-"
PATIENCE = 30.0  # seconds
ALLOWED = (
    (ResourceType.TOPIC, ACLOperation.READ),
    (ResourceType.TOPIC, ACLOperation.WRITE),
    (ResourceType.GROUP, ACLOperation.READ),
)
"""What the apps may do with all that is called `iot-bench-*`."""


def client(servers: list[str], file: Path) -> dict[str, Any]:
    """How to connect as the administrator: from the settings of Kafka's own tools on this host.

    Without such a file, the brokers ask nobody who they are.
    """
    options: dict[str, Any] = {"bootstrap_servers": servers}
    if not file.exists():
        return options
    lines = [line.strip() for line in file.read_text().splitlines()]
    known = dict(line.split("=", 1) for line in lines if "=" in line and line[0] not in "#!")
    options["security_protocol"] = known["security.protocol"]
    options["ssl_cafile"] = known["ssl.truststore.location"]
    if "ssl.keystore.location" in known:
        # Certificate and key are in one file.
        options["ssl_certfile"] = options["ssl_keyfile"] = known["ssl.keystore.location"]
    if "sasl.mechanism" in known:
        words = dict(re.findall(r'(\w+)="([^"]*)"', known["sasl.jaas.config"]))
        options["sasl_mechanism"] = known["sasl.mechanism"]
        options["sasl_plain_username"] = words["username"]
        options["sasl_plain_password"] = words["password"]
    return options


def wait_for(check: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {PATIENCE:.0f} s in vain until {what}")
        time.sleep(0.2)


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


def grant(admin: Any, principals: list[str]) -> None:
    """Let principals use topics and groups that begin with the prefix, and wait until they may."""
    acls = [
        ACL(
            principal,
            "*",
            operation,
            ACLPermissionType.ALLOW,
            ResourcePattern(kind, PREFIX, ACLResourcePatternType.PREFIXED),
        )
        for principal in principals
        for kind, operation in ALLOWED
    ]
    failed = admin.create_acls(acls)["failed"]
    if failed:
        raise RuntimeError(f"rights are refused: {failed}")
    wait_for(lambda: set(acls) <= set(granted(admin)), "the rights are known")


def granted(admin: Any) -> list[Any]:
    """The rights on what begins with the prefix."""
    found: list[Any] = admin.describe_acls(_rights())[0]
    return found


def revoke(admin: Any) -> None:
    """Take back all rights on what begins with the prefix, and wait until they are gone."""
    admin.delete_acls([_rights()])
    wait_for(lambda: not granted(admin), "the rights are gone")


def _rights() -> ACLFilter:
    pattern = ResourcePatternFilter(ResourceType.ANY, PREFIX, ACLResourcePatternType.PREFIXED)
    return ACLFilter(None, None, ACLOperation.ANY, ACLPermissionType.ANY, pattern)


def remove(admin: Any, prefix: str) -> None:
    """Remove topics and groups whose names begin with the prefix, and wait until they are gone."""
    if not prefix.startswith(PREFIX):
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
    wait_for(
        lambda: not any(name.startswith(prefix) for name in admin.list_topics()),
        f"the topics {prefix}* are gone",
    )


def records(options: dict[str, Any], topic: str) -> int:
    """How many records a topic holds."""
    with_offsets = KafkaConsumer(**options, enable_auto_commit=False)
    try:
        numbers = with_offsets.partitions_for_topic(topic) or ()
        partitions = [TopicPartition(topic, number) for number in numbers]
        starts = with_offsets.beginning_offsets(partitions)
        ends = with_offsets.end_offsets(partitions)
        return sum(ends[partition] - starts[partition] for partition in partitions)
    finally:
        with_offsets.close()


def main() -> None:
    request = json.load(sys.stdin)
    options = client(request["servers"], Path(request["admin"]))
    has_rights = "security_protocol" in options
    answer: Any = None
    if request["action"] == "records":
        answer = records(options, request["topic"])
    else:
        admin = KafkaAdminClient(**options)
        try:
            if request["action"] == "create":
                create(admin, request["topics"])
            elif request["action"] == "grant":
                if has_rights:
                    grant(admin, request["principals"])
            else:
                remove(admin, request["prefix"])
                if has_rights and request["prefix"] == PREFIX:
                    revoke(admin)
        finally:
            admin.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
