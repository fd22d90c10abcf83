"""Ansible module: make the users of a Kafka cluster what the inventory declares."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kafka_access import (
    SCRAM,
    Access,
    explain_connection,
    logs_in,
    open_access,
    serve,
)

DOCUMENTATION = """
module: kafka_users
short_description: Make the users of a Kafka cluster what they are declared to be
description:
  - Creates users that log in with SCRAM-SHA-512, and changes the password of those whose declared
    one does not let them in. Kafka does not show passwords, so each is tried by logging in with it.
  - Other users are left alone, or removed with all that they log in with where I(remove_unknown)
    says so; but never the user that this module logs in as, nor one of I(keep).
  - A new password counts at once. Who is connected stays so until the connection ends.
  - Needs the Python package kafka-python (3.0 or newer) on the host it runs on, and a listener that
    offers SCRAM-SHA-512 at I(bootstrap_servers).
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
  users:
    description: The users.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The user's name, of letters, digits, ".", "_" and "-".
        type: str
        required: true
      password:
        description: The user's password.
        type: str
        required: true
  remove_unknown:
    description: Whether users that are not declared are removed.
    type: bool
    default: false
  keep:
    description: Users that are not declared and yet stay, such as the brokers' own.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait for a broker, and for each change.
    type: int
    default: 30
"""

EXAMPLES = """
- name: Declare a user
  kafka_users:
    bootstrap_servers: broker:9092
    client:
      security_protocol: SASL_SSL
      username: kafka
      password: "{{ kafka_admin_password }}"
      ca_file: /etc/ssl/iot-pipeline/ca.pem
    users:
      - name: iot-producer
        password: "{{ iot_producer_password }}"
"""

RETURN = """
created:
  description: Names of the users that were created.
  type: list
changed_passwords:
  description: Names of the users whose password was changed.
  type: list
removed:
  description: Names of the users that were removed.
  type: list
"""

NAME = re.compile(r"[A-Za-z0-9._-]+")

Existing = Mapping[str, frozenset[str]]
"""Users by name, each with the mechanisms that it has a password for."""


@dataclass(frozen=True)
class User:
    """A user as it is declared."""

    name: str
    password: str = field(repr=False)


@dataclass
class Plan:
    """What has to be done."""

    create: list[User] = field(default_factory=list)
    change: list[User] = field(default_factory=list)
    remove: dict[str, frozenset[str]] = field(default_factory=dict)

    def is_empty(self) -> bool:
        """Tell whether every user is as declared."""
        return not (self.create or self.change or self.remove)


def declared_users(parameter: Iterable[Mapping[str, str]], own: str) -> list[User]:
    """Turn the module's parameter `users` into users; `own` is who we log in as.

    Raises:
        ValueError: the declaration cannot be carried out.
    """
    users = [User(entry["name"], entry["password"]) for entry in parameter]
    names = [user.name for user in users]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Declared more than once: {', '.join(twice)}.")
    for user in users:
        if not NAME.fullmatch(user.name):
            raise ValueError(
                f'{user.name!r} is no name for a user: use letters, digits, ".", "_" and "-".'
            )
        if not user.password:
            raise ValueError(f"{user.name} has no password.")
        if user.name == own:
            raise ValueError(
                f"{user.name} is the user that this is done as: it cannot be one of those declared."
            )
    return users


def make_plan(
    declared: Iterable[User],
    existing: Existing,
    is_right: Callable[[User], bool],
    *,
    keep: frozenset[str] | None,
) -> Plan:
    """Compare the declared users with the existing ones.

    Args:
        declared: the users that there should be.
        existing: those that there are.
        is_right: tells whether the declared password lets an existing user in.
        keep: users that are not removed though they are not declared; None keeps all.
    """
    plan = Plan()
    names = set()
    for user in declared:
        names.add(user.name)
        if SCRAM not in existing.get(user.name, ()):
            plan.create.append(user)
        elif not is_right(user):
            plan.change.append(user)
    if keep is not None:
        for name, mechanisms in existing.items():
            # Of a declared user, only what could let it in with another password.
            unknown = mechanisms - {SCRAM} if name in names else mechanisms
            if unknown and name not in keep:
                plan.remove[name] = unknown
    return plan


def diff_of(plan: Plan, existing: Existing) -> dict[str, str]:
    """Return the changed users before and after, as Ansible's --diff shows them: no passwords."""
    before: dict[str, dict[str, str]] = {}
    after: dict[str, dict[str, str]] = {}
    for user in plan.create:
        after[user.name] = {SCRAM: "the declared password"}
    for user in plan.change:
        before[user.name] = {SCRAM: "another password"}
        after[user.name] = {SCRAM: "the declared password"}
    for name, mechanisms in plan.remove.items():
        before.setdefault(name, {}).update(dict.fromkeys(mechanisms, "a password"))
        if mechanisms != existing[name]:
            after.setdefault(name, {})

    def text(users: Mapping[str, Mapping[str, str]]) -> str:
        return json.dumps(users, indent=2, sort_keys=True) + "\n" if users else ""

    return {"before": text(before), "after": text(after)}


def read_users(admin: Any) -> dict[str, frozenset[str]]:
    """Read all users that have a password, through a KafkaAdminClient. Raises KafkaError."""
    return {
        name: frozenset(
            info["mechanism"].name.replace("_", "-") for info in found["credential_infos"]
        )
        for name, found in admin.describe_user_scram_credentials().items()
    }


def alter(admin: Any, alterations: list[Any]) -> None:
    """Carry out changes. The brokers judge each user by itself. Raises ValueError, KafkaError."""
    refused = {
        name: problem
        for name, problem in admin.alter_user_scram_credentials(alterations).items()
        if problem
    }
    if refused:
        raise ValueError("; ".join(f"{name}: {text}" for name, text in sorted(refused.items())))


def carry_out(access: Access, plan: Plan) -> None:
    """Do what is planned, and see that it is done. Raises ValueError and KafkaError."""
    from kafka.admin import UserScramCredentialDeletion, UserScramCredentialUpsertion

    written = [*plan.create, *plan.change]
    if written:
        alter(
            access.admin,
            [UserScramCredentialUpsertion(u.name, SCRAM, u.password) for u in written],
        )
        for user in written:
            access.wait_until(
                lambda user=user: logs_in_everywhere(access, user),
                f"{user.name} can log in with its new password",
            )
    if plan.remove:
        alter(
            access.admin,
            [
                UserScramCredentialDeletion(name, mechanism)
                for name, mechanisms in plan.remove.items()
                for mechanism in sorted(mechanisms)
            ],
        )
        access.wait_until(
            lambda: (
                not any(
                    mechanisms & read_users(access.admin).get(name, frozenset())
                    for name, mechanisms in plan.remove.items()
                )
            ),
            f"{', '.join(sorted(plan.remove))} are gone",
        )


def is_right(access: Access, user: User) -> bool:
    """Tell whether the declared password lets the user in. Raises ValueError."""
    try:
        return bool(logs_in(access.server, access.client, user.name, user.password, access.timeout))
    except OSError as error:
        raise ValueError(f"{access.server}: {explain_connection(error)}") from error


def logs_in_everywhere(access: Access, user: User) -> bool:
    """Tell whether each server that answers lets the user in: each learns of a change by itself."""
    for server in access.servers:
        try:
            if not logs_in(server, access.client, user.name, user.password, access.timeout):
                return False
        except OSError:
            if server == access.server:
                return False
    return True


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do the module's work and return its result. Raises ValueError and KafkaError."""
    parameters = module.params
    own = parameters["client"].get("username") or ""
    declared = declared_users(parameters["users"], own)
    with open_access(parameters, "kafka-users") as access:
        if not access.client.has_users:
            raise ValueError(
                "Passwords are tried by logging in: set the client's security_protocol to SASL_SSL."
            )
        access.require("DESCRIBE", "ALTER")
        existing = read_users(access.admin)
        plan = make_plan(
            declared,
            existing,
            lambda user: is_right(access, user),
            keep=frozenset([own, *parameters["keep"]]) if parameters["remove_unknown"] else None,
        )
        if not module.check_mode:
            carry_out(access, plan)
    return {
        "changed": not plan.is_empty(),
        "created": [user.name for user in plan.create],
        "changed_passwords": [user.name for user in plan.change],
        "removed": sorted(plan.remove),
        "diff": diff_of(plan, existing),
    }


def main() -> None:
    """Run as an Ansible module."""
    serve(
        "Users",
        {
            "users": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "password": {"type": "str", "required": True, "no_log": True},
                },
            },
            "remove_unknown": {"type": "bool", "default": False},
            "keep": {"type": "list", "elements": "str", "default": []},
        },
        run,
    )


if __name__ == "__main__":
    main()
