"""The module kafka_users against a real broker, called by Ansible as a play calls it."""

import importlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ansible.module_utils
import pytest
from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from iot_lab.paths import ROOT
from iot_lab.processes import Broker
from iot_lab.secure_broker import ADMIN, DAY, Authority, SecureBroker


class Module:
    """Calls the module as the brokers' administrator."""

    def __init__(self, call: Callable[..., dict[str, Any]], broker: SecureBroker) -> None:
        self.call = call
        self.servers = broker.bootstrap_servers
        self.client = broker.settings()
        self.secrets = list(broker.passwords.values())

    def __call__(
        self, users: dict[str, str], *, check: bool = False, remove: bool = False
    ) -> dict[str, Any]:
        parameters = {
            "bootstrap_servers": self.servers,
            "client": self.client,
            "users": [{"name": name, "password": users[name]} for name in users],
            "remove_unknown": remove,
            "timeout": 10,
        }
        result = self.call("kafka_users", parameters, check=check)
        shown = [word for word in [*self.secrets, *users.values()] if word in result["output"]]
        assert not shown, "a password is shown"
        return result


@pytest.fixture
def module(secure_broker: SecureBroker, ansible_module: Callable[..., dict[str, Any]]) -> Module:
    return Module(ansible_module, secure_broker)


@pytest.fixture
def name() -> str:
    return f"user-{uuid.uuid4()}"


def logs_in(broker: SecureBroker, name: str, password: str, patience: int = 30) -> bool:
    """Whether kafka-python's own client gets in; a wrong password it tries for so many seconds."""
    options = broker.client() | {"sasl_plain_username": name, "sasl_plain_password": password}
    try:
        KafkaAdminClient(**options, bootstrap_timeout_ms=1000 * patience).close()
    except KafkaError:
        return False
    return True


def is_refused(broker: SecureBroker, name: str, password: str) -> bool:
    """Whether it does not."""
    return not logs_in(broker, name, password, patience=2)


def test_a_user_through_its_life(module: Module, secure_broker: SecureBroker, name: str) -> None:
    old, new = "an old password", "a new password"
    assert module({name: old}, check=True)["created"] == [name]
    created = module({name: old})
    assert created["created"] == [name], "check mode has created the user"
    assert f'"{name}"' in created["output"], "the diff does not name the user"
    assert logs_in(secure_broker, name, old)
    assert module({name: old})["changed"] is False

    assert module({name: new}, check=True)["changed_passwords"] == [name]
    assert logs_in(secure_broker, name, old), "check mode has changed the password"
    assert module({name: new})["changed_passwords"] == [name]
    assert logs_in(secure_broker, name, new)
    assert is_refused(secure_broker, name, old)
    assert module({name: new})["changed"] is False


def test_undeclared_users_go_only_when_told(
    module: Module, secure_broker: SecureBroker, name: str
) -> None:
    others = {user: word for user, word in secure_broker.passwords.items() if user != ADMIN}
    module({name: "an old password"})
    assert module(others)["changed"] is False
    assert name in module(others, check=True, remove=True)["removed"]
    assert logs_in(secure_broker, name, "an old password"), "check mode has removed the user"
    assert name in module(others, remove=True)["removed"]
    assert is_refused(secure_broker, name, "an old password")
    assert module(others, remove=True)["changed"] is False
    # The administrator is not declared either.
    assert logs_in(secure_broker, ADMIN, secure_broker.passwords[ADMIN])


def open_access(broker: SecureBroker, servers: str, patience: int = 30, /, **changes: str) -> None:
    """Connect as the modules do, without Ansible around it."""
    # Where Ansible puts what a role's modules share.
    ansible.module_utils.__path__.append(str(ROOT / "roles/kafka_resources/module_utils"))
    kafka_access = importlib.import_module("ansible.module_utils.kafka_access")
    client = broker.settings() | changes
    parameters = {"bootstrap_servers": servers, "client": client, "timeout": patience}
    with kafka_access.open_access(parameters, "test") as access:
        assert access.server == servers


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"password": "not this one at all"}, "does not let in kafka with SCRAM-SHA-512: "),
        ({"username": "nobody"}, "does not let in nobody with SCRAM-SHA-512: "),
        ({"sasl_mechanism": "PLAIN", "password": "x"}, "does not let in kafka with PLAIN: "),
        ({"ca_file": "OTHER"}, "its certificate is not trusted: "),
        ({"ca_file": "/nowhere/ca.pem"}, "ca_file /nowhere/ca.pem: No such file"),
        ({"security_protocol": "PLAINTEXT"}, "is this listener one for TLS\\?"),
        ({"password": ""}, "set username and password"),
    ],
    ids=["password", "name", "plain-password", "authority", "file", "no-tls", "nothing"],
)
def test_what_keeps_us_out_is_told(
    secure_broker: SecureBroker, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    if changes.get("ca_file") == "OTHER":
        changes = {"ca_file": str(Authority(tmp_path, "another authority").certificate)}
    # A broker that wants TLS just hangs up, like one that starts: that is tried again.
    patience = 2 if "security_protocol" in changes else 30
    with pytest.raises(ValueError, match=said):
        open_access(secure_broker, secure_broker.bootstrap_servers, patience, **changes)
    open_access(secure_broker, secure_broker.bootstrap_servers)


def test_tls_on_a_plain_port_is_told(broker: Broker, secure_broker: SecureBroker) -> None:
    with pytest.raises(ValueError, match=f"{broker.bootstrap_servers}: "):
        open_access(secure_broker, broker.bootstrap_servers, 2)


def test_certificates_that_do_not_do_are_told(secure_broker: SecureBroker, tmp_path: Path) -> None:
    servers = secure_broker.mutual_servers
    open_access(secure_broker, servers, **secure_broker.mutual_settings())
    for identity in (
        Authority(tmp_path / "other", "another authority").issue("kafka"),
        secure_broker.authority.issue("late", -DAY),
    ):
        files = {"certificate_file": str(identity.certificate), "key_file": str(identity.key)}
        with pytest.raises(ValueError, match="it refuses our certificate"):
            open_access(secure_broker, servers, security_protocol="SSL", **files)
    with pytest.raises(ValueError, match="it refuses our certificate, or the lack of one"):
        open_access(secure_broker, servers, security_protocol="SSL")


def test_a_refusal_is_one_message(module: Module, name: str) -> None:
    module.client = module.client | {"password": "not this one at all"}
    refused = module({name: "an old password"}, check=True)
    assert refused["failed"]
    assert refused["msg"].startswith("Users were not reconciled through 127.0.0.1:")
    assert "does not let in kafka with SCRAM-SHA-512" in refused["msg"]


def test_only_an_administrator_may(module: Module, secure_broker: SecureBroker, name: str) -> None:
    module.client = secure_broker.settings("iot-producer")
    refused = module({name: "an old password"})
    assert refused["failed"]
    assert "make it one of super.users" in refused["msg"]


def test_without_logins_no_password_can_be_tried(
    module: Module, secure_broker: SecureBroker, name: str
) -> None:
    module.servers, module.client = secure_broker.mutual_servers, secure_broker.mutual_settings()
    refused = module({name: "an old password"})
    assert refused["failed"]
    assert "set the client's security_protocol to SASL_SSL" in refused["msg"]
