"""Passwords and keys stand where they must, and nowhere else on any host."""

import base64
import re
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

pytestmark = pytest.mark.timeout(600)  # A host's journal may be long.

Place = tuple[str, str, str]

EVERYONE = {"all"}
BROKERS = {"kafka_brokers", "kafka_controllers"}
DATABASE = {"couchdb_servers"}
APPS = {
    "iot-producer": "producers",
    "iot-inference": "inference_nodes",
    "iot-storage": "storage_nodes",
    "iot-audit": "storage_nodes",
    "iot-operator": "storage_nodes",
}

# Ways in which Kafka's clients may prove who they are.
ANY = {"scram", "plain", "mtls", "none"}
TLS = ANY - {"none"}
PASSWORDS = {"scram", "plain"}
LISTED = {"plain"}  # Brokers have the users' passwords in a file.

KEY = "the host's key"
JAAS: Place = ("/opt/kafka/config/jaas.conf", "root:kafka", "640")
STANDIN_ADMIN: Place = ("/etc/couchdb/admin.password", "root:couchdb", "640")


def of_app(file: str) -> Place:
    return f"/etc/iot-pipeline/{file}", "root:iot-pipeline", "640"


# What a host of these groups holds where clients log in to Kafka so: path, owner, mode.
HELD: tuple[tuple[str, set[str], set[str], Place], ...] = (
    (KEY, EVERYONE, ANY, ("{pki}/host.key", "root:ssl-cert", "640")),
    (KEY, BROKERS, TLS, ("/etc/kafka/keystore.pem", "root:kafka", "640")),
    (
        "kafka_admin_password",
        BROKERS,
        PASSWORDS,
        ("/opt/kafka/config/admin.properties", "root:root", "600"),
    ),
    ("kafka_admin_password", BROKERS, LISTED, JAAS),
    *(
        (f"kafka_passwords.{app}", {group}, PASSWORDS, of_app(f"{app}.kafka.password"))
        for app, group in APPS.items()
    ),
    *((f"kafka_passwords.{app}", BROKERS, LISTED, JAAS) for app in APPS),
    ("couchdb_passwords.iot-storage", {"storage_nodes"}, ANY, of_app("store.password")),
    ("couchdb_passwords.iot-audit", {"storage_nodes"}, ANY, of_app("store-audit.password")),
    ("couchdb_admin_password", DATABASE, ANY, ("/root/.netrc-couchdb", "root:root", "600")),
    ("couchdb_admin_password", DATABASE, ANY, STANDIN_ADMIN),
)


def held(node: Any) -> dict[str, set[Place]]:
    """Where each secret must be on a host."""
    groups = {*node.groups, "all"}
    login = node.variables["kafka_broker_authentication"]
    found: dict[str, set[Place]] = {name: set() for name, *_ in HELD}
    for name, holders, logins, (path, *how) in HELD:
        if groups & holders and login in logins:
            found[name].add((path.replace("{pki}", folder(node)), *how))  # type: ignore[arg-type]
    if node.variables.get("couchdb_distribution") != "standin":
        found["couchdb_admin_password"].discard(STANDIN_ADMIN)
    if not node.variables.get("pki_enabled"):
        del found[KEY]
    return found


def folder(node: Any) -> str:
    return str(node.variables.get("pki_dir", "/etc/ssl/iot-pipeline"))


def forms(name: str, secret: Any) -> list[Any]:
    """A secret as it is, and as a client of HTTP sends it with a user's name."""
    login = f"{name.partition('.')[2] or 'admin'}:{secret.value}"
    return [secret, type(secret)(base64.b64encode(login.encode()).decode())]


def test_secrets_are_where_they_must_be_and_nowhere_else(
    host: Host, node: Any, secrets: dict[str, Any], run_script: Callable[..., Any]
) -> None:
    """In files, the journal, units, processes' arguments and their environments."""
    expected = held(node)
    asked = {
        "secrets": {name: forms(name, secret) for name, secret in secrets.items()},
        "key": f"{folder(node)}/host.key" if KEY in expected else "",
    }
    answer = run_script(host, "find_secrets.py", asked)
    # It has looked into all of it.
    assert answer["searched"]["files"] > 1000
    assert all(answer["searched"].values()), answer["searched"]
    found = {
        # The folder's name has the version.
        name: {(re.sub(r"^/opt/kafka-[\d.]+/", "/opt/kafka/", at), *how) for at, *how in places}
        for name, places in answer["found"].items()
    }
    nowhere: dict[str, set[Any]] = {name: set() for name in {*found, *expected}}
    assert nowhere | found == nowhere | expected
