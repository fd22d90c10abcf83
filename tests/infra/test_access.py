"""Who is let in by the pipeline's ports, and what each app may do there.

Every port is tried from its own host, where no firewall helps it, with everything that somebody
might show. What the firewall adds is in test_firewall.py, where secrets are in test_secrets.py.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from testinfra.host import Host

from iot_lab.secure_broker import DAY, Authority, ExistingAuthority, Identity

PYTHON = "/opt/iot-pipeline/current/bin/python"

# Of the right authority, for a name that is nobody's.
STRANGER = "stranger.invalid"


def folder(variables: dict[str, Any]) -> str:
    return str(variables.get("pki_dir", "/etc/ssl/iot-pipeline"))


@dataclass(frozen=True)
class Pem:
    """A certificate and its key, which a failed test must not show."""

    value: str = field(repr=False)

    @classmethod
    def of(cls, identity: Identity) -> "Pem":
        return cls(identity.key.read_text() + identity.certificate.read_text())


@pytest.fixture(scope="session")
def made_up() -> Iterator[Authority]:
    """An authority that calls itself like ours, and that nobody trusts."""
    with tempfile.TemporaryDirectory() as name:
        yield Authority(Path(name), "iot-pipeline authority")


@pytest.fixture(scope="session")
def ours(topology: Any, secrets: dict[str, Any]) -> Iterator[Authority | None]:
    """The authority that signs the hosts' certificates, where this machine has its key."""
    known = next(iter(topology.nodes.values())).variables
    made_in = known.get("pki_authority_dir", "")
    certificate = Path(known.get("pki_authority_certificate_file", f"{made_in}/ca.pem"))
    file = Path(known.get("pki_authority_key_file", f"{made_in}/ca.key"))
    passphrase = secrets.get("pki_authority_key_passphrase")
    try:
        key: Any = load_pem_private_key(
            file.read_bytes(), passphrase.value.encode() if passphrase else None
        )
    except (OSError, ValueError):
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        yield ExistingAuthority(Path(name), certificate, key)


Shown = Callable[[str, Any], Any]


@pytest.fixture
def shown(made_up: Authority, ours: Authority | None) -> Shown:
    """What somebody shows who comes to a host in one of these ways: a certificate, or nothing."""

    def show(way: str, node: Any) -> Any:
        if way in {"an expired certificate", "a stranger's certificate"} and ours is None:
            pytest.skip("the authority's key is not on this machine")
        makers: dict[str, Callable[[], Any]] = {
            "a certificate of another authority": lambda: Pem.of(made_up.issue(node.name)),
            "an expired certificate": lambda: Pem.of(ours.issue(node.name, -DAY)) if ours else "",
            "a stranger's certificate": lambda: Pem.of(ours.issue(STRANGER)) if ours else "",
            "the host's own certificate": lambda: [
                f"{folder(node.variables)}/{name}" for name in ("host.pem", "host.key")
            ],
        }
        return makers[way]() if way in makers else ""

    return show


@dataclass(frozen=True)
class Door:
    """A port, and what one has to show there."""

    address: str
    port: int
    speaks: str
    wants: str
    tls: bool
    # Whether it has something to tell to who is let in: a controller has not, to clients.
    tells: bool = True
    # Whether it looks at a certificate that it does not want.
    doubts: bool = False


def doors(node: Any) -> list[Door]:
    """The ports on which a host serves others."""
    known = node.variables
    login = known["kafka_broker_authentication"]
    at = known.get("kafka_broker_bind_address") or "127.0.0.1"
    among_themselves = ("nothing", False) if login == "none" else ("certificate", True)
    found = []
    if "kafka_brokers" in node.groups:
        clients = ("password", True) if login in {"scram", "plain"} else among_themselves
        found.append(Door(at, known["kafka_client_port"], "kafka", *clients))
        if login != "none":
            port = known.get("kafka_broker_replication_port", 9094)
            found.append(Door(at, port, "kafka", *among_themselves))
    if "kafka_controllers" in node.groups:
        port = known["kafka_controller_port"]
        found.append(Door(at, port, "kafka", *among_themselves, tells=False))
    if "couchdb_servers" in node.groups:
        at, tls = known["couchdb_bind_address"], known.get("couchdb_tls", False)
        found.append(Door(at, known["couchdb_port"], "http", "password", tls))
        if tls and known.get("couchdb_distribution") != "standin":
            # The official server cannot close it.
            port = known.get("couchdb_plain_port", 5984)
            found.append(Door(at, port, "http", "password", tls=False))
    if "mongodb_servers" in node.groups:
        at, tls = known["mongodb_bind_address"], known.get("mongodb_tls", False)
        standin = known.get("mongodb_distribution") == "standin"
        wants = "nothing" if standin else "password"
        found.append(Door(at, known["mongodb_port"], "mongodb", wants, tls, doubts=not standin))
    return found


WAYS = (
    "plain text",
    "no certificate",
    "an expired certificate",
    "a certificate of another authority",
    "a stranger's certificate",
    "the host's own certificate",
)


def welcome(door: Door, way: str) -> dict[str, bool]:
    """What a door answers to who comes in this way: `up`, that it is there; `use`, what it has."""
    answered = {
        "nothing": {way: {"up", "use"} for way in WAYS},
        "password": {way: {"up"} for way in WAYS},
        # The other broker comes so. Who else has a certificate sees what ACLs let him see: nothing.
        "certificate": {
            "a stranger's certificate": {"up"},
            "the host's own certificate": {"up", "use"},
        },
    }[door.wants].get(way, set())
    doubtful = {"an expired certificate", "a certificate of another authority"}
    if door.tls != (way != "plain text") or (door.doubts and way in doubtful):
        answered = set()
    return {"up": "up" in answered, "use": "use" in answered and door.tells}


@pytest.mark.parametrize("way", WAYS)
def test_ports_open_to_what_they_want_and_to_nothing_else(
    host: Host, node: Any, way: str, shown: Shown, run_script: Callable[..., Any]
) -> None:
    tried = doors(node)
    if not tried:
        pytest.skip("this host serves nobody")
    asked = {
        "doors": [asdict(door) for door in tried],
        "tls": way != "plain text",
        "identity": shown(way, node),
        "topic": node.variables["pipeline_image_topic"],
    }
    answers = run_script(host, "knock.py", asked)
    assert dict(zip(tried, answers, strict=True)) == {door: welcome(door, way) for door in tried}


def test_ssh_wants_a_known_key(node: Any, tmp_path: Path) -> None:
    if node.variables.get("ansible_connection") == "local":
        pytest.skip("the host is this machine")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    known = node.variables
    login = f"{known.get('ansible_user', 'root')}@{known.get('ansible_host', node.name)}"
    checks = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
    mine = ("BatchMode=yes", "IdentitiesOnly=yes", "IdentityAgent=none", "ControlPath=none")
    port = f"Port={known.get('ansible_port', 22)}"
    options = [word for option in (*checks, *mine, port) for word in ("-o", option)]
    refused = subprocess.run(
        ["ssh", "-F", "none", *options, "-i", key, login, "true"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 255
    assert "Permission denied" in refused.stderr


# How a client may come to a broker: what it changes in its settings, and what it hears of a broker
# that wants a password, and of one that wants a certificate.
NO_USER = {"IOT_SASL_USERNAME": "", "IOT_SASL_PASSWORD_FILE": ""}
NO_CERTIFICATE = {"IOT_TLS_CERTIFICATE_FILE": "", "IOT_TLS_KEY_FILE": ""}
A_USER = {
    "IOT_SECURITY_PROTOCOL": "SASL_SSL",
    "IOT_SASL_USERNAME": "{app}",
    "IOT_SASL_PASSWORD_FILE": "{wrong}",
    **NO_CERTIFICATE,
}


def a_certificate(certificate: str, key: str) -> dict[str, str]:
    return {
        **NO_USER,
        "IOT_SECURITY_PROTOCOL": "SSL",
        "IOT_TLS_CERTIFICATE_FILE": certificate,
        "IOT_TLS_KEY_FILE": key,
    }


LOGINS: dict[str, tuple[dict[str, str], str, str]] = {
    "as itself": ({}, "^$", "^$"),
    "in plain text": (
        {
            **NO_USER,
            **NO_CERTIFICATE,
            "IOT_SECURITY_PROTOCOL": "PLAINTEXT",
            "IOT_TLS_CA_FILE": "",
        },
        "wants TLS",
        "wants TLS",
    ),
    "as nobody": (
        {**NO_USER, **NO_CERTIFICATE, "IOT_SECURITY_PROTOCOL": "SSL"},
        "wants a user",
        "refuses our certificate, or that there is none",
    ),
    "with a wrong password": (A_USER, "refuses user '{app}'", "refuses our certificate"),
    "as the admin with a wrong password": (
        {**A_USER, "IOT_SASL_USERNAME": "{admin}"},
        "refuses user '{admin}'",
        "refuses our certificate",
    ),
    "as the admin with the app's password": (
        {"IOT_SASL_USERNAME": "{admin}"},
        "refuses user '{admin}'",
        "",  # There is none.
    ),
    "with an expired certificate": (
        a_certificate("{expired}", "{expired}"),
        "wants a user",
        "refuses our certificate",
    ),
    "with a certificate of another authority": (
        a_certificate("{another}", "{another}"),
        "wants a user",
        "refuses our certificate",
    ),
    "with the host's certificate": (
        a_certificate("{folder}/host.pem", "{folder}/host.key"),
        "wants a user",
        "^$",
    ),
    "trusting another authority": (
        {"IOT_TLS_CA_FILE": "{authority}"},
        "its certificate is refused",
        "its certificate is refused",
    ),
}


def test_brokers_let_in_who_proves_it(
    host: Host,
    node: Any,
    app: str,
    login: str,
    made_up: Authority,
    ours: Authority | None,
    run_script: Callable[..., Any],
) -> None:
    known = node.variables
    names = {"app": app, "admin": known.get("kafka_broker_admin_user", "kafka")}
    files = {
        "wrong": "this is not the password\n",
        "another": Pem.of(made_up.issue(node.name)),
        "authority": made_up.certificate.read_text(),
    }
    if ours:
        files["expired"] = Pem.of(ours.issue(node.name, -DAY))
    column = 1 if login == "mtls" else 0
    expected = {
        way: heard[column]
        for way, (_, *heard) in LOGINS.items()
        if heard[column] and (ours or way != "with an expired certificate")
    }
    placed = {name: f"{{{name}}}" for name in files} | names | {"folder": folder(known)}
    asked = {
        "app": app,
        "servers": known["kafka_bootstrap_servers"].split(","),
        "files": files,
        "ways": {
            way: {
                key: text.format_map({"expired": "", **placed})
                for key, text in LOGINS[way][0].items()
            }
            for way in expected
        },
    }
    for server, problems in run_script(host, "log_in_to_kafka.py", asked, PYTHON).items():
        for way, words in expected.items():
            assert re.search(words.format_map(names), problems[way]), (server, way, problems[way])


# What each app may do at Kafka; whatever else is tried, it may not.
MAY: dict[str, set[str]] = {
    "iot-producer": {"write {images}"},
    "iot-inference": {
        "read {images}",
        "write {predictions}",
        "write {dead_letters}",
        "join iot-inference",
        "look at iot-inference",
    },
    "iot-storage": {
        "read {images}",
        "read {predictions}",
        "write {dead_letters}",
        "join iot-storage",
        "look at iot-storage",
    },
    "iot-audit": {
        "read {images}",
        "read {predictions}",
        "read {dead_letters}",
        "look at iot-inference",
        "look at iot-storage",
    },
    "iot-operator": {
        "write {images}",
        "write {predictions}",
        "read {dead_letters}",
        "write {dead_letters}",
    },
}
APPS = {
    "producers": {"iot-producer"},
    "inference_nodes": {"iot-inference"},
    "storage_nodes": {"iot-storage", "iot-audit", "iot-operator"},
}


@pytest.mark.timeout(300)
def test_apps_may_do_at_kafka_what_they_need_and_nothing_else(
    host: Host, node: Any, app: str, login: str, run_script: Callable[..., Any]
) -> None:
    known = node.variables
    topics = {
        "images": known["pipeline_image_topic"],
        "predictions": known["pipeline_prediction_topic"],
        "dead_letters": known["pipeline_dead_letter_topic"],
    }
    limits = [
        int(topic["config"].get("max.message.bytes", 1_048_588))
        for topic in known["kafka_resources_topics"]
    ]
    apps = APPS["storage_nodes"] if app == "iot-storage" else {app}
    asked = {
        "apps": sorted(apps),
        "topics": list(topics.values()),
        "groups": ["iot-inference", "iot-storage"],
        "too_large": max(limits) + 100_000,
    }
    answers = run_script(host, "use_kafka.py", asked, PYTHON)
    assert set(answers) == apps
    for name, answer in answers.items():
        # A certificate tells the host, whichever of its apps has shown it.
        here = {a for group, names in APPS.items() if group in node.groups for a in names}
        who = here if login == "mtls" else {name}
        granted = {line.format_map(topics) for one in who for line in MAY[one]}
        if login == "mtls" and {"kafka_brokers", "kafka_controllers"} & set(node.groups):
            # A host of the cluster may do everything.
            granted = set(answer)
        assert answer == {what: "granted" if what in granted else "refused" for what in answer}, (
            name
        )
        assert granted <= set(answer)
