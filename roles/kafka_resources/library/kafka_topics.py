"""Ansible module: make the topics of a Kafka cluster what the inventory declares."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kafka_access import open_access, serve

DOCUMENTATION = """
module: kafka_topics
short_description: Make the topics of a Kafka cluster what they are declared to be
description:
  - Creates topics, sets their configuration, and adds partitions where that is allowed.
  - Never deletes a topic, lowers its number of partitions or moves its replicas. Where that would
    be needed, nothing at all is changed and the module fails with what to do.
  - Topics and configuration keys that are not named are left alone.
  - Needs the Python package kafka-python (3.0 or newer) on the host it runs on.
options:
  bootstrap_servers:
    description: Brokers to ask first, as C(host:port), separated by commas.
    type: str
    required: true
  client:
    description: How to connect. C(security_protocol) is C(PLAINTEXT), C(SSL) or C(SASL_SSL);
      C(sasl_mechanism) is C(SCRAM-SHA-512) or C(PLAIN), with C(username) and C(password);
      C(ca_file) names the authorities that are trusted, else it is those of the system;
      C(certificate_file) and C(key_file) show who we are to brokers that ask for a certificate.
    type: dict
    default: {}
  topics:
    description: The topics.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The topic's name.
        type: str
        required: true
      partitions:
        description: Number of partitions.
        type: int
        required: true
      replication_factor:
        description: Number of replicas; -1 leaves it to the cluster.
        type: int
        default: -1
      config:
        description: Configuration of the topic by key. A value of null resets a key.
        type: dict
        default: {}
  grow_partitions:
    description: Whether partitions may be added to an existing topic. Records with a key that is
      there already may then go to another partition than before.
    type: bool
    default: false
  timeout:
    description: Seconds to wait for a broker, and for each change.
    type: int
    default: 30
"""

EXAMPLES = """
- name: Declare a topic
  kafka_topics:
    bootstrap_servers: broker:9092
    topics:
      - name: iot-topic
        partitions: 4
        config:
          retention.ms: 604800000
"""

RETURN = """
created:
  description: Names of the topics that were created.
  type: list
grown:
  description: Names of the topics that were given more partitions.
  type: list
configured:
  description: Names of the topics whose configuration was changed.
  type: list
"""


@dataclass(frozen=True)
class Topic:
    """A topic as it is declared or as it is. `config` holds what is set on the topic itself."""

    name: str
    partitions: int
    replication_factor: int = -1
    config: Mapping[str, str | None] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """Return the topic the way a diff shows it."""
        return {
            "partitions": self.partitions,
            "replication_factor": self.replication_factor,
            "config": dict(sorted(self.config.items())),
        }


@dataclass
class Plan:
    """What has to be done, and what stands in the way of it."""

    create: list[Topic] = field(default_factory=list)
    grow: dict[str, int] = field(default_factory=dict)
    configure: dict[str, dict[str, str | None]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Tell whether every topic is as declared."""
        return not (self.create or self.grow or self.configure)


def as_text(value: object) -> str | None:
    """Return a configuration value as Kafka writes it; None stays None."""
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_plan(
    declared: Iterable[Topic], existing: Mapping[str, Topic], *, grow_partitions: bool
) -> Plan:
    """Compare the declared topics with the existing ones, which are given by name."""
    plan = Plan()
    for topic in declared:
        present = existing.get(topic.name)
        if present is None:
            plan.create.append(topic)
            continue
        if topic.partitions < present.partitions:
            plan.problems.append(
                f"{topic.name} has {present.partitions} partitions and {topic.partitions} are "
                "declared. Kafka cannot remove partitions: declare as many as there are, or move "
                "the records to a new topic."
            )
        elif topic.partitions > present.partitions:
            if grow_partitions:
                plan.grow[topic.name] = topic.partitions
            else:
                plan.problems.append(
                    f"{topic.name} has {present.partitions} partitions and {topic.partitions} are "
                    "declared. With more of them, records of the same key may go to another "
                    "partition than before. If that does no harm, set "
                    "kafka_resources_grow_partitions to true for this run."
                )
        if topic.replication_factor not in {-1, present.replication_factor}:
            plan.problems.append(
                f"{topic.name} has {present.replication_factor} replicas of each partition and "
                f"{topic.replication_factor} are declared. Run playbooks/rebalance.yml with "
                "-e rebalance_execute=true first, or declare as many as there are."
            )
        changes = {
            key: value for key, value in topic.config.items() if present.config.get(key) != value
        }
        if changes:
            plan.configure[topic.name] = changes
    return plan


def after(plan: Plan, existing: Mapping[str, Topic]) -> dict[str, Topic]:
    """Return what the plan makes of the existing topics."""
    result = dict(existing)
    for name in plan.grow.keys() | plan.configure.keys():
        topic = result[name]
        config = {**topic.config, **plan.configure.get(name, {})}
        result[name] = Topic(
            name,
            plan.grow.get(name, topic.partitions),
            topic.replication_factor,
            {key: value for key, value in config.items() if value is not None},
        )
    for topic in plan.create:
        config = {key: value for key, value in topic.config.items() if value is not None}
        result[topic.name] = Topic(topic.name, topic.partitions, topic.replication_factor, config)
    return result


def read_topics(admin: Any, names: set[str]) -> dict[str, Topic]:
    """Read those of the named topics that exist, through a KafkaAdminClient."""
    from kafka.admin import ConfigResource, ConfigResourceType

    found = [topic for topic in admin.describe_topics() if topic["name"] in names]
    if not found:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic["name"]) for topic in found]
    configs = admin.describe_configs(resources)["topic"]
    return {
        topic["name"]: Topic(
            topic["name"],
            len(topic["partitions"]),
            len(topic["partitions"][0]["replica_nodes"]),
            {
                key: entry["value"]
                for key, entry in configs[topic["name"]].items()
                if entry["config_source"] == "DYNAMIC_TOPIC_CONFIG"
            },
        )
        for topic in found
    }


def carry_out(admin: Any, plan: Plan, *, validate_only: bool) -> None:
    """Do what is planned, or let the brokers check it. Raises ValueError and KafkaError."""
    from kafka.admin import AlterConfigOp, ConfigResource, ConfigResourceType

    if plan.create:
        created = {
            topic.name: {
                "num_partitions": topic.partitions,
                "replication_factor": topic.replication_factor,
                "configs": {key: value for key, value in topic.config.items() if value is not None},
            }
            for topic in plan.create
        }
        answer = admin.create_topics(created, validate_only=validate_only, raise_errors=False)
        refuse_errors(answer["topics"])
        if not validate_only:
            admin.wait_for_topics(list(created))
    if plan.grow:
        answer = admin.create_partitions(plan.grow, validate_only=validate_only, raise_errors=False)
        refuse_errors(answer.to_dict()["results"])
    resources = [
        ConfigResource(
            ConfigResourceType.TOPIC,
            name,
            {
                key: (AlterConfigOp.DELETE, None) if value is None else (AlterConfigOp.SET, value)
                for key, value in changes.items()
            },
        )
        for name, changes in plan.configure.items()
    ]
    if resources:
        results = admin.alter_configs(resources, validate_only=validate_only)
        refused = [f"{name}: {text}" for name, text in results["topic"].items() if text != "OK"]
        if refused:
            raise ValueError("; ".join(refused))


def refuse_errors(results: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError with what the brokers say of the topics that they refused."""
    refused = [
        f"{result['name']}: {result['error_message'] or result['error_code']}"
        for result in results
        if result["error_code"] != 0
    ]
    if refused:
        raise ValueError("; ".join(refused))


def diff_of(plan: Plan, existing: Mapping[str, Topic]) -> dict[str, str]:
    """Return the changed topics before and after, as Ansible's --diff shows them."""
    changed = {topic.name for topic in plan.create} | plan.grow.keys() | plan.configure.keys()

    def text(topics: Mapping[str, Topic]) -> str:
        shown = {name: topics[name].shown() for name in sorted(changed & topics.keys())}
        return json.dumps(shown, indent=2) + "\n" if shown else ""

    return {"before": text(existing), "after": text(after(plan, existing))}


def declared_topics(parameter: list[dict[str, Any]]) -> list[Topic]:
    """Turn the module's parameter `topics` into topics. Raises ValueError."""
    topics = [
        Topic(
            entry["name"],
            entry["partitions"],
            entry["replication_factor"],
            {key: as_text(value) for key, value in entry["config"].items()},
        )
        for entry in parameter
    ]
    names = [topic.name for topic in topics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Declared more than once: {', '.join(twice)}.")
    for topic in topics:
        if topic.partitions < 1:
            raise ValueError(f"{topic.name}: a topic has at least one partition.")
    return topics


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do the module's work and return its result. Raises ValueError and KafkaError."""
    parameters = module.params
    declared = declared_topics(parameters["topics"])
    with open_access(parameters, "kafka-topics") as access:
        existing = read_topics(access.admin, {topic.name for topic in declared})
        plan = make_plan(declared, existing, grow_partitions=parameters["grow_partitions"])
        if plan.problems:
            raise ValueError(" ".join(plan.problems))
        # The brokers know what is valid: one mistake, and nothing is changed.
        carry_out(access.admin, plan, validate_only=True)
        for name, partitions in plan.grow.items():
            module.warn(
                f"{name} gets {partitions} partitions instead of {existing[name].partitions}: a "
                "record may go to another one than earlier records of its key."
            )
        if not module.check_mode:
            carry_out(access.admin, plan, validate_only=False)
    return {
        "changed": not plan.is_empty(),
        "created": [topic.name for topic in plan.create],
        "grown": sorted(plan.grow),
        "configured": sorted(plan.configure),
        "diff": diff_of(plan, existing),
    }


def main() -> None:
    """Run as an Ansible module."""
    serve(
        "Topics",
        {
            "topics": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "partitions": {"type": "int", "required": True},
                    "replication_factor": {"type": "int", "default": -1},
                    "config": {"type": "dict", "default": {}},
                },
            },
            "grow_partitions": {"type": "bool", "default": False},
        },
        run,
    )


if __name__ == "__main__":
    main()
