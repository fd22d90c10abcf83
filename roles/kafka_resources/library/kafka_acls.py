"""Ansible module: make the ACLs of a Kafka cluster what the inventory declares."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kafka_access import Access, open_access, serve

DOCUMENTATION = """
module: kafka_acls
short_description: Make the ACLs of a Kafka cluster what they are declared to be
description:
  - Adds the ACLs that are missing. Others are left alone, or removed where I(remove_unknown) says
    so; but never those of the user that this module logs in as.
  - Adds before it removes, so that nobody loses on the way what it keeps in the end.
  - Needs the Python package kafka-python (3.0 or newer) on the host it runs on, and brokers with an
    authorizer.
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
  acls:
    description: The ACLs.
    type: list
    elements: dict
    required: true
    suboptions:
      principals:
        description: To whom, for instance C(User:iot-producer).
        type: list
        elements: str
        required: true
      resource_type:
        description: The kind of what it is granted on.
        type: str
        choices: [topic, group, cluster, transactional_id]
        required: true
      resource_name:
        description: Its name, or how its name begins, or C(*) for all. A cluster is always called
          C(kafka-cluster).
        type: str
        required: true
      pattern:
        description: Whether I(resource_name) is a whole name or the beginning of one.
        type: str
        choices: [literal, prefixed]
        default: literal
      operations:
        description: What is granted, for instance C(read). C(read) and C(write) imply C(describe).
        type: list
        elements: str
        required: true
      permission:
        description: Whether it is granted, or forbidden though another ACL grants it.
        type: str
        choices: [allow, deny]
        default: allow
      hosts:
        description: Addresses from which it counts; C(*) for all.
        type: list
        elements: str
        default: ["*"]
  remove_unknown:
    description: Whether ACLs that are not declared are removed.
    type: bool
    default: false
  timeout:
    description: Seconds to wait for a broker, and for each change.
    type: int
    default: 30
"""

EXAMPLES = """
- name: Let a user write to a topic
  kafka_acls:
    bootstrap_servers: broker:9092
    client:
      security_protocol: SASL_SSL
      username: kafka
      password: "{{ kafka_admin_password }}"
      ca_file: /etc/ssl/iot-pipeline/ca.pem
    acls:
      - principals: [User:iot-producer]
        resource_type: topic
        resource_name: iot-topic
        operations: [write]
"""

RETURN = """
added:
  description: The ACLs that were added, each as one line.
  type: list
removed:
  description: The ACLs that were removed, each as one line.
  type: list
"""

# What the brokers ask for. They take other operations too, which then are of no use.
OPERATIONS = {
    "topic": {
        *("all", "read", "write", "create", "delete", "alter", "describe"),
        *("describe_configs", "alter_configs"),
    },
    "group": {"all", "read", "describe", "delete", "describe_configs", "alter_configs"},
    "cluster": {
        *("all", "create", "alter", "describe", "cluster_action"),
        *("describe_configs", "alter_configs", "idempotent_write"),
    },
    "transactional_id": {"all", "write", "describe"},
}
CLUSTER = "kafka-cluster"
PRINCIPAL = re.compile(r"[A-Za-z]+:\S.*")


@dataclass(frozen=True, order=True)
class Acl:
    """One permission. All but the names in the small letters of Kafka's own words."""

    principal: str
    resource_type: str
    resource_name: str
    pattern: str
    operation: str
    permission: str
    host: str

    def __str__(self) -> str:
        kind = self.resource_type if self.pattern == "literal" else f"{self.resource_type}s like"
        end = "*" if self.pattern == "prefixed" else ""
        host = "" if self.host == "*" else f" from {self.host}"
        text = f"{self.principal}: {self.permission} {self.operation} on {kind} "
        return f"{text}{self.resource_name}{end}{host}"


@dataclass(frozen=True)
class Plan:
    """What has to be done."""

    add: list[Acl] = field(default_factory=list)
    remove: list[Acl] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Tell whether the ACLs are as declared."""
        return not (self.add or self.remove)


def declared_acls(parameter: Iterable[Mapping[str, Any]]) -> set[Acl]:
    """Turn the module's parameter `acls` into ACLs. Raises ValueError, with all that is wrong."""
    problems = []
    acls = set()
    for entry in parameter:
        kind, name, principals = (
            entry[key] for key in ("resource_type", "resource_name", "principals")
        )
        where = f"{', '.join(principals)} on {kind} {name}"
        operations = [operation.lower() for operation in entry["operations"]]
        unknown = sorted(set(operations) - OPERATIONS[kind])
        if not all(PRINCIPAL.fullmatch(principal) for principal in principals):
            problems.append(f"{where}: a principal is written like User:iot-producer.")
        if not name:
            problems.append(f"{where}: the resource has no name.")
        if kind == "cluster" and (name != CLUSTER or entry["pattern"] != "literal"):
            problems.append(f"{where}: a cluster's name is {CLUSTER}, and literal.")
        if name == "*" and entry["pattern"] == "prefixed":
            problems.append(f"{where}: for all names, set the pattern to literal.")
        if unknown or not operations:
            problems.append(
                f"{where}: operations are {', '.join(sorted(OPERATIONS[kind]))}, not "
                f"{', '.join(unknown) or 'none'}."
            )
        if not entry["hosts"]:
            problems.append(f'{where}: hosts is empty; for all hosts it is ["*"].')
        acls |= {
            Acl(principal, kind, name, entry["pattern"], operation, entry["permission"], host)
            for principal in principals
            for operation in operations
            for host in entry["hosts"]
        }
    if problems:
        raise ValueError(" ".join(problems))
    return acls


def make_plan(
    declared: set[Acl], existing: set[Acl], *, remove_unknown: bool, own: str = ""
) -> Plan:
    """Compare the declared ACLs with the existing ones; none of `own` is removed."""
    unknown = {acl for acl in existing - declared if acl.principal != own}
    return Plan(sorted(declared - existing), sorted(unknown) if remove_unknown else [])


def diff_of(plan: Plan) -> dict[str, str]:
    """Return what changes before and after, as Ansible's --diff shows it."""
    return {
        "before": "".join(f"{acl}\n" for acl in plan.remove),
        "after": "".join(f"{acl}\n" for acl in plan.add),
    }


def read_acls(admin: Any) -> set[Acl]:
    """Read all ACLs, through a KafkaAdminClient. Raises KafkaError."""
    from kafka.admin import (
        ACLFilter,
        ACLOperation,
        ACLPermissionType,
        ACLResourcePatternType,
        ResourcePatternFilter,
        ResourceType,
    )

    everything = ACLFilter(
        None,
        None,
        ACLOperation.ANY,
        ACLPermissionType.ANY,
        ResourcePatternFilter(ResourceType.ANY, None, ACLResourcePatternType.ANY),
    )
    found, _ = admin.describe_acls(everything)
    return {
        Acl(
            acl.principal,
            acl.resource_pattern.resource_type.name.lower(),
            acl.resource_pattern.resource_name,
            acl.resource_pattern.pattern_type.name.lower(),
            acl.operation.name.lower(),
            acl.permission_type.name.lower(),
            acl.host,
        )
        for acl in found
    }


def of_kafka(acl: Acl) -> Any:
    """Return an ACL as kafka-python has it."""
    from kafka.admin import (
        ACL,
        ACLOperation,
        ACLPermissionType,
        ACLResourcePatternType,
        ResourcePattern,
        ResourceType,
    )

    return ACL(
        acl.principal,
        acl.host,
        ACLOperation[acl.operation.upper()],
        ACLPermissionType[acl.permission.upper()],
        ResourcePattern(
            ResourceType[acl.resource_type.upper()],
            acl.resource_name,
            ACLResourcePatternType[acl.pattern.upper()],
        ),
    )


def carry_out(access: Access, plan: Plan) -> None:
    """Do what is planned, and see that it is done. Raises ValueError and KafkaError."""
    from kafka.errors import NoError

    refused = []
    if plan.add:
        wanted = [of_kafka(acl) for acl in plan.add]
        done = access.admin.create_acls(wanted)
        # The answer names those that succeeded; the errors are in the order of the others.
        failed = [
            acl for acl, each in zip(plan.add, wanted, strict=True) if each not in done["succeeded"]
        ]
        refused = [
            f"{acl}: {error.__name__}" for acl, error in zip(failed, done["failed"], strict=False)
        ]
    if not refused and plan.remove:
        answers = access.admin.delete_acls([of_kafka(acl) for acl in plan.remove])
        refused = [
            f"{acl}: {error.__name__}"
            for acl, (_, _, error) in zip(plan.remove, answers, strict=True)
            if error is not NoError
        ]
    if refused:
        raise ValueError("; ".join(refused))

    def is_done() -> bool:
        existing = read_acls(access.admin)
        return existing.issuperset(plan.add) and existing.isdisjoint(plan.remove)

    if not plan.is_empty():
        access.wait_until(is_done, "the brokers know the new ACLs")


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do the module's work and return its result. Raises ValueError and KafkaError."""
    parameters = module.params
    declared = declared_acls(parameters["acls"])
    with open_access(parameters, "kafka-acls") as access:
        access.require("DESCRIBE", "ALTER")
        own = access.client.username if access.client.has_users else ""
        plan = make_plan(
            declared,
            read_acls(access.admin),
            remove_unknown=parameters["remove_unknown"],
            own=f"User:{own}",
        )
        if not module.check_mode:
            carry_out(access, plan)
    return {
        "changed": not plan.is_empty(),
        "added": [str(acl) for acl in plan.add],
        "removed": [str(acl) for acl in plan.remove],
        "diff": diff_of(plan),
    }


def main() -> None:
    """Run as an Ansible module."""
    serve(
        "ACLs",
        {
            "acls": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "principals": {"type": "list", "elements": "str", "required": True},
                    "resource_type": {
                        "type": "str",
                        "choices": list(OPERATIONS),
                        "required": True,
                    },
                    "resource_name": {"type": "str", "required": True},
                    "pattern": {
                        "type": "str",
                        "choices": ["literal", "prefixed"],
                        "default": "literal",
                    },
                    "operations": {"type": "list", "elements": "str", "required": True},
                    "permission": {
                        "type": "str",
                        "choices": ["allow", "deny"],
                        "default": "allow",
                    },
                    "hosts": {"type": "list", "elements": "str", "default": ["*"]},
                },
            },
            "remove_unknown": {"type": "bool", "default": False},
        },
        run,
    )


if __name__ == "__main__":
    main()
