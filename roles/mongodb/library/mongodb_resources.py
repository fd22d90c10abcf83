"""Ansible module: make what is in a MongoDB server what the inventory declares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

DOCUMENTATION = """
module: mongodb_resources
short_description: Make what is in a MongoDB server what it is declared to be
description:
  - Creates the admin, where nobody has an account yet; then users, collections and indexes. Changes
    the password of users whose declared one does not let them in, and their roles.
  - MongoDB does not show passwords, so each is tried by logging in with it.
  - What is not declared is left alone, but for collections that are declared absent.
  - Needs the Python package pymongo on the host that it runs on. For the first admin, and for a new
    replica set, that must be the server's own host, with a C(server) of loopback. Over loopback the
    certificate may have any name.
options:
  server:
    description: The server, as C(host:port).
    type: str
    required: true
  tls_ca:
    description: PEM file of the authorities that signed the server's certificate. Empty connects
      without TLS.
    type: str
    default: ""
  admin_user:
    description: User with the role C(root). Empty where the server has no users.
    type: str
    default: ""
  admin_password:
    description: The admin's password.
    type: str
    default: ""
  replica_set:
    description: Name of the replica set that the server is a member of. Empty where it is in none.
    type: str
    default: ""
  members:
    description: Members of the replica set, as C(host:port), by which its primary is found, and to
      make it of where there is none.
    type: list
    elements: str
    default: []
  wait_for:
    description: Servers, as C(host:port), of which each must be the primary or a secondary of its
      replica set, or be in none yet, before anything is done.
    type: list
    elements: str
    default: []
  users:
    description: The users.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The user's name.
        type: str
        required: true
      password:
        description: The user's password.
        type: str
        required: true
      database:
        description: Database that the user belongs to and logs in at.
        type: str
        required: true
      roles:
        description: What the user may do there, by the names of built-in roles.
        type: list
        elements: str
        required: true
  collections:
    description: The collections.
    type: list
    elements: dict
    default: []
    suboptions:
      database:
        description: The collection's database.
        type: str
        required: true
      name:
        description: The collection's name.
        type: str
        required: true
      state:
        description: C(absent) drops it, with all that is in it.
        type: str
        choices: [present, absent]
        default: present
      indexes:
        description: Its indexes, each with C(name) and C(fields), all ascending and in this order.
        type: list
        elements: dict
        default: []
  timeout:
    description: Seconds until the server, or the replica set's primary, must have answered.
    type: int
    default: 30
"""

EXAMPLES = """
- name: Declare a user and a collection
  mongodb_resources:
    server: 127.0.0.1:27017
    admin_user: admin
    admin_password: "{{ mongodb_admin_password }}"
    users:
      - name: iot-storage
        password: "{{ iot_storage_password }}"
        database: kafka_db
        roles: [readWrite]
    collections:
      - database: kafka_db
        name: image
"""

RETURN = """
changes:
  description: What was done, a line for each change.
  type: list
"""

# What the server answers, by the codes of src/mongo/base/error_codes.yml.
UNAUTHORIZED = 13
AUTHENTICATION_FAILED = 18

MECHANISM = "SCRAM-SHA-256"
LOOPBACK = "127."  # whoever answers there is this host
PAUSE = 1.0  # seconds between two looks at a replica set


class Problem(Exception):
    """What stands in the way, in words for the person who runs the play."""


@dataclass(frozen=True)
class User:
    """A user as declared."""

    name: str
    database: str
    roles: frozenset[str]
    password: str = field(repr=False)


@dataclass(frozen=True)
class Server:
    """How one connects."""

    address: str
    tls_ca: str
    replica_set: str
    members: tuple[str, ...]
    timeout: int

    @contextmanager
    def connect(
        self, login: Mapping[str, Any] | None = None, *, alone: bool = False
    ) -> Iterator[Any]:
        """Give a client: of the set whose primary it finds, or of this server alone."""
        from pymongo import MongoClient

        options: dict[str, Any] = {"tls": True, "tlsCAFile": self.tls_ca} if self.tls_ca else {}
        addresses = self.address
        if self.replica_set and not alone:
            options["replicaSet"] = self.replica_set
            addresses = ",".join(self.members)
        else:
            options["directConnection"] = True
            if self.tls_ca and self.address.startswith(LOOPBACK):
                options["tlsAllowInvalidHostnames"] = True
        milliseconds = self.timeout * 1000
        with MongoClient(
            f"mongodb://{addresses}",
            serverSelectionTimeoutMS=milliseconds,
            connectTimeoutMS=milliseconds,
            **options,
            **(login or {}),
        ) as client:
            yield client

    def lets_in(self, name: str, password: str, database: str) -> bool:
        """Tell whether a password is right. Raises PyMongoError where that cannot be told."""
        from pymongo.errors import OperationFailure

        login = {
            "username": name,
            "password": password,
            "authSource": database,
            "authMechanism": MECHANISM,
        }
        try:
            # The server wants to know who one is before it answers anything.
            with self.connect(login) as client:
                client.admin.command("ping")
        except OperationFailure as error:
            if error.code != AUTHENTICATION_FAILED:
                raise
            return False
        return True


def wait_for(server: Server) -> None:
    """Wait until a member serves its set, or is in none yet. Raises Problem, PyMongoError."""
    ends = time.monotonic() + server.timeout
    is_alone = False
    with server.connect(alone=True) as client:
        while True:
            # One may ask this before one has logged in.
            said = client.admin.command("hello")
            if said.get("isWritablePrimary") or said.get("secondary"):
                return
            # One that has just started may have to read first that it is in a set.
            was_alone, is_alone = is_alone, not said.get("setName")
            if is_alone and was_alone:
                return
            if time.monotonic() > ends and not is_alone:
                raise Problem(
                    f"{server.address} has been neither primary nor secondary of "
                    f"{said['setName']} for {server.timeout} s: it starts, recovers, or copies "
                    "what it missed. No further member is restarted until it has."
                )
            time.sleep(PAUSE)


def _make_set(server: Server, client: Any, login: Mapping[str, Any]) -> None:
    from pymongo.errors import OperationFailure

    members = [{"_id": number, "host": member} for number, member in enumerate(server.members)]
    command = {"replSetInitiate": {"_id": server.replica_set, "members": members}}
    try:
        client.admin.command(command)
    except OperationFailure as error:
        if error.code != UNAUTHORIZED:
            raise
        # It ran by itself until now, and has users.
        with server.connect(login, alone=True) as known:
            known.admin.command(command)


def initiate(server: Server, login: Mapping[str, Any], *, check_mode: bool) -> list[str]:
    """Make the replica set where there is none. Raises Problem, PyMongoError."""
    from pymongo.errors import OperationFailure, PyMongoError

    changes: list[str] = []
    ends = time.monotonic() + server.timeout
    with server.connect(alone=True) as client:
        while not client.admin.command("hello").get("setName"):
            if check_mode:
                return [f"replica set {server.replica_set} is made"]
            try:
                _make_set(server, client, login)
                changes = [f"replica set {server.replica_set} is made"]
            except OperationFailure as error:
                # Not all of them are up yet, or they are a set already, which will tell this one.
                if time.monotonic() > ends:
                    raise Problem(
                        f"The replica set {server.replica_set} cannot be made: {error}. All of its "
                        "members have to run, and reach each other."
                    ) from error
            except PyMongoError:
                if time.monotonic() > ends:
                    raise
            time.sleep(PAUSE)
    return changes


def ensure_admin(server: Server, name: str, password: str, *, check_mode: bool) -> list[str]:
    """Create the admin where nobody has an account. Raises Problem, PyMongoError."""
    from pymongo.errors import NotPrimaryError, OperationFailure

    if server.lets_in(name, password, "admin"):
        return []
    refused = (
        f"MongoDB refuses {name}'s password. Set mongodb_admin_password to the one that it was "
        "installed with; to change it, first do so in MongoDB (db.changeUserPassword in mongosh)."
    )
    if check_mode:
        raise Problem(f"{refused} Or nobody has an account yet: a run without --check mends that.")
    try:
        # MongoDB lets whoever comes over loopback make the first account, and only that.
        with server.connect(alone=True) as client:
            client.admin.command(
                "createUser", name, pwd=password, roles=["root"], mechanisms=[MECHANISM]
            )
    except NotPrimaryError as error:
        raise Problem(
            "Nobody has an account yet, and another member has become the primary, where alone the "
            "first one can be made. Restart mongod there, and run this again."
        ) from error
    except OperationFailure as error:
        if error.code != UNAUTHORIZED:
            raise
        raise Problem(refused) from error
    return [f"user {name} of admin is created"]


def user_commands(
    user: User, existing: Mapping[str, Any] | None, is_right: Callable[[User], bool]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Give what has to be done for a user: in words, a command's name, and its arguments.

    Args:
        user: the user that there should be.
        existing: what `usersInfo` says of it; None where there is none.
        is_right: tells whether the declared password lets an existing user in.
    """
    who = f"user {user.name} of {user.database}"
    roles = sorted(user.roles)
    secret = {"pwd": user.password, "mechanisms": [MECHANISM]}
    if existing is None:
        yield f"{who} is created, with {', '.join(roles)}", "createUser", {**secret, "roles": roles}
        return
    has = {(role["db"], role["role"]) for role in existing["roles"]}
    if has != {(user.database, role) for role in roles}:
        yield f"{who} is given {', '.join(roles)}", "updateUser", {"roles": roles}
    if not is_right(user):
        yield f"{who} gets another password", "updateUser", secret


def index_changes(
    collection: Mapping[str, Any], existing: Mapping[str, Any]
) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Give the indexes that are missing: name and keys. Raises Problem.

    Args:
        collection: the collection as declared.
        existing: its indexes as pymongo's `index_information` tells them.
    """
    for index in collection["indexes"]:
        keys = [(name, 1) for name in index["fields"]]
        found = existing.get(index["name"])
        if found is None:
            yield index["name"], keys
        elif [tuple(key) for key in found["key"]] != keys:
            raise Problem(
                f"The index {index['name']} of {collection['name']} sorts by other fields than "
                f"{', '.join(index['fields'])}. Give the new one another name, or drop the old one."
            )


def ensure_users(
    server: Server, client: Any, users: Iterable[User], *, check_mode: bool
) -> list[str]:
    """Make users what they are declared to be. Raises PyMongoError."""
    changes = []
    for user in users:
        database = client[user.database]
        found = database.command("usersInfo", {"user": user.name, "db": user.database})["users"]
        commands = user_commands(
            user,
            found[0] if found else None,
            lambda user: server.lets_in(user.name, user.password, user.database),
        )
        for words, command, arguments in commands:
            changes.append(words)
            if not check_mode:
                database.command(command, user.name, **arguments)
    return changes


def ensure_collections(
    client: Any, collections: Iterable[Mapping[str, Any]], *, check_mode: bool
) -> list[str]:
    """Make collections and indexes what they are declared to be. Raises Problem, PyMongoError."""
    changes = []
    for wanted in collections:
        database, name = client[wanted["database"]], wanted["name"]
        full = f"{wanted['database']}.{name}"
        is_there = name in database.list_collection_names()
        if wanted["state"] == "absent":
            if is_there:
                changes.append(f"collection {full} is dropped")
                if not check_mode:
                    database.drop_collection(name)
            continue
        if not is_there:
            changes.append(f"collection {full} is created")
            if not check_mode:
                database.create_collection(name)
        existing = database[name].index_information() if is_there else {}
        for index, keys in index_changes(wanted, existing):
            changes.append(f"index {index} of {full} is created")
            if not check_mode:
                database[name].create_index(keys, name=index)
    return changes


def run(parameters: Mapping[str, Any], *, check_mode: bool) -> list[str]:
    """Do all of it and return what was changed. Raises Problem, PyMongoError."""
    server = Server(
        parameters["server"],
        parameters["tls_ca"],
        parameters["replica_set"],
        tuple(parameters["members"]),
        parameters["timeout"],
    )
    for address in parameters["wait_for"]:
        wait_for(replace(server, address=address))
    users = [
        User(entry["name"], entry["database"], frozenset(entry["roles"]), entry["password"])
        for entry in parameters["users"]
    ]
    changes = []
    name, password = parameters["admin_user"], parameters["admin_password"]
    login = {"username": name, "password": password, "authSource": "admin"} if name else {}
    if server.replica_set:
        changes += initiate(server, login, check_mode=check_mode)
        if changes and check_mode:
            return changes
    if login:
        changes += ensure_admin(server, name, password, check_mode=check_mode)
    with server.connect(login) as client:
        if login:
            changes += ensure_users(server, client, users, check_mode=check_mode)
        changes += ensure_collections(client, parameters["collections"], check_mode=check_mode)
    return changes


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "server": {"type": "str", "required": True},
            "tls_ca": {"type": "str", "default": ""},
            "admin_user": {"type": "str", "default": ""},
            "admin_password": {"type": "str", "default": "", "no_log": True},
            "replica_set": {"type": "str", "default": ""},
            "members": {"type": "list", "elements": "str", "default": []},
            "wait_for": {"type": "list", "elements": "str", "default": []},
            "users": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "password": {"type": "str", "required": True, "no_log": True},
                    "database": {"type": "str", "required": True},
                    "roles": {"type": "list", "elements": "str", "required": True},
                },
            },
            "collections": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "database": {"type": "str", "required": True},
                    "name": {"type": "str", "required": True},
                    "state": {
                        "type": "str",
                        "choices": ["present", "absent"],
                        "default": "present",
                    },
                    "indexes": {
                        "type": "list",
                        "elements": "dict",
                        "default": [],
                        "options": {
                            "name": {"type": "str", "required": True},
                            "fields": {"type": "list", "elements": "str", "required": True},
                        },
                    },
                },
            },
            "timeout": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    try:
        from pymongo.errors import PyMongoError
    except ImportError:
        module.fail_json(msg=missing_required_lib("pymongo"))
    try:
        changes = run(module.params, check_mode=module.check_mode)
    except (Problem, PyMongoError) as error:
        module.fail_json(msg=str(error))
    shown = "".join(f"{line}\n" for line in changes)
    module.exit_json(changed=bool(changes), changes=changes, diff={"before": "", "after": shown})


if __name__ == "__main__":
    main()
