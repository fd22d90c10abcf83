"""Tests of running hosts: the lab's or production's, whichever the inventory names.

    pytest tests/infra --ansible-inventory=inventory/production

The hosts are reached by ssh as Ansible reaches them, and sudo must not ask for a password there.
Tests marked e2e send images and a few broken records through the pipeline, and try to write what
nobody but the admin may; leave them out with `-m "not e2e"`, and the others only look, log in with
what must be refused, and knock at ports. What breaks something is a drill: docs/drills.md.
"""

import datetime as dt
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import testinfra
from testinfra.host import Host

ROOT = Path(__file__).parents[2]

# Group of the inventory -> the systemd unit that its hosts run.
UNITS = {
    "kafka_controllers": "kafka",
    "kafka_brokers": "kafka",
    "couchdb_servers": "couchdb",
    "mongodb_servers": "mongod",
    "producers": "iot-producer",
    "inference_nodes": "iot-inference",
    "storage_nodes": "iot-storage",
}

# What the tests need to know of each host, as Ansible sees it.
VARIABLES = (
    "ansible_connection",
    "ansible_host",
    "ansible_port",
    "ansible_ssh_common_args",
    "ansible_ssh_extra_args",
    "ansible_ssh_private_key_file",
    "ansible_user",
    "base_extra_ca_bundle",
    "base_hosts_entries",
    "couchdb_admin_user",
    "couchdb_bind_address",
    "couchdb_database",
    "couchdb_distribution",
    "couchdb_enforce_readers",
    "couchdb_plain_port",
    "couchdb_port",
    "couchdb_tls",
    "firewall_enabled",
    "firewall_rules",
    "firewall_ssh_sources",
    "inference_engine",
    "kafka_bootstrap_servers",
    "kafka_broker_admin_user",
    "kafka_broker_authentication",
    "kafka_broker_bind_address",
    "kafka_broker_replication_port",
    "kafka_client_port",
    "kafka_controller_port",
    "kafka_resources_topics",
    "mongodb_admin_user",
    "mongodb_bind_address",
    "mongodb_distribution",
    "mongodb_port",
    "mongodb_replica_set",
    "mongodb_tls",
    "pipeline_dead_letter_topic",
    "pipeline_image_topic",
    "pipeline_prediction_topic",
    "pki_authority_certificate_file",
    "pki_authority_dir",
    "pki_authority_key_file",
    "pki_certificate_file",
    "pki_dir",
    "pki_enabled",
    "pki_renew_before_days",
    "store_has_users",
    "store_url",
    "vm_memory_mb",
)

# Passwords, by themselves or in a dictionary; see the fixture `secrets`.
SECRETS = (
    "couchdb_admin_password",
    "couchdb_passwords",
    "kafka_admin_password",
    "kafka_passwords",
    "mongodb_admin_password",
    "mongodb_passwords",
    "mongodb_replica_set_key",
    "pki_authority_key_passphrase",
)

UNSET = "not set in the inventory"


@dataclass(frozen=True)
class Node:
    """A host of the inventory."""

    name: str
    groups: tuple[str, ...]
    variables: dict[str, Any]

    @property
    def units(self) -> list[str]:
        return sorted({unit for group, unit in UNITS.items() if group in self.groups})


# What an inventory that does not say it gets from the role.
DEFAULTS = {"kafka_broker_authentication": "scram", "store_has_users": True}


def read_inventory(config: pytest.Config) -> dict[str, Node]:
    """The hosts, with what the tests need to know of each."""
    found, problem = ask_inventory(config, ("group_names", *VARIABLES))
    if problem or not found:
        pytest.exit(f"no hosts found in {source_of(config)}:\n{problem}", returncode=2)
    return {
        name: Node(name, tuple(known.pop("group_names")), DEFAULTS | known)
        for name, known in found.items()
    }


def source_of(config: pytest.Config) -> str:
    """The inventory that the tests are for."""
    return config.getoption("ansible_inventory") or str(ROOT / "inventory/couchdb")


def chosen_hosts(config: pytest.Config) -> set[str]:
    """The hosts and groups that are tested host by host; all where there are none."""
    return set(filter(None, config.getoption("limit").split(",")))


def ask_inventory(
    config: pytest.Config, names: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], str]:
    """Each host's variables, evaluated as `ansible-inventory` does not; and what went wrong."""
    looked_up = f"query('ansible.builtin.vars', *{names}, default='{UNSET}')"
    message = f"{{{{ dict({names} | zip({looked_up})) }}}}"
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("ansible"), "all"),
            f"--inventory={source_of(config)}",
            *(f"--extra-vars={given}" for given in config.getoption("extra_vars")),
            *("--module-name=ansible.builtin.debug", f"--args={json.dumps({'msg': message})}"),
        ],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            # molecule forces colours.
            "ANSIBLE_FORCE_COLOR": "false",
            "ANSIBLE_NOCOLOR": "true",
        },
    )
    answers = re.compile(r"^(\S+) \| SUCCESS => (\{.*?^\})", re.MULTILINE | re.DOTALL)
    found = {
        name: {key: value for key, value in json.loads(answer)["msg"].items() if value != UNSET}
        for name, answer in answers.findall(done.stdout)
    }
    # Without the answers, which may hold secrets.
    problem = answers.sub("", done.stdout) + done.stderr if done.returncode else ""
    return found, problem


NODES = pytest.StashKey[dict[str, Node]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--also-listening",
        action="append",
        default=[],
        metavar="PORT",
        type=int,
        help="TCP port on which hosts may listen besides ssh and the pipeline's (monitoring, …)",
    )
    parser.addoption(
        "--extra-vars",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what site.yml was run with, if anything: kafka_authentication=mtls",
    )
    parser.addoption(
        "--limit",
        default="",
        metavar="NAME,NAME…",
        help="hosts and groups: what is tested host by host is tested of these alone, and what is "
        "tested of the topology as a whole, of the whole",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NODES] = nodes = read_inventory(config)
    known = {name for node in nodes.values() for name in (node.name, *node.groups)}
    if unknown := chosen_hosts(config) - known:
        raise pytest.UsageError(f"{source_of(config)} has no host or group {', '.join(unknown)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test on each host of its module's GROUP, on which its module's VARIABLE is true.

    One that takes `unit` runs for each service there, one that takes `app` for each of the apps.
    """
    if not {"host", "node"} & set(metafunc.fixturenames):
        return
    group = getattr(metafunc.module, "GROUP", "all")
    variable = getattr(metafunc.module, "VARIABLE", None)
    chosen = chosen_hosts(metafunc.config)
    nodes = [
        node
        for node in metafunc.config.stash[NODES].values()
        if (not chosen or chosen & {node.name, *node.groups})
        and (group == "all" or group in node.groups)
        and (variable is None or node.variables.get(variable))
    ]
    for argument, prefix in (("unit", ""), ("app", "iot-")):
        if argument in metafunc.fixturenames:
            pairs = [(n, unit) for n in nodes for unit in n.units if unit.startswith(prefix)]
            ids = [f"{node.name}-{unit}" for node, unit in pairs]
            metafunc.parametrize(f"node, {argument}", pairs, ids=ids)
            return
    metafunc.parametrize("node", nodes, ids=[node.name for node in nodes])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of a module whose VARIABLE is true on no host."""
    wanted = {
        item
        for item in items
        if (variable := getattr(getattr(item, "module", None), "VARIABLE", None)) is None
        or any(node.variables.get(variable) for node in config.stash[NODES].values())
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = [item for item in items if item in wanted]


@pytest.fixture(scope="session")
def control_path() -> Iterator[str]:
    # A short path: that of a socket may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ssh-")
    yield f"{folder}/%%C"  # testinfra formats the command line once more.
    shutil.rmtree(folder, ignore_errors=True)


CONNECTIONS: dict[str, Host] = {}


def connect(node: Node, control_path: str) -> Host:
    """One connection a host, kept for the session."""
    if node.name not in CONNECTIONS:
        known = node.variables
        if known.get("ansible_connection") == "local":
            CONNECTIONS[node.name] = testinfra.get_host("local://", sudo=True)
        else:
            extra = [known.get(f"ansible_ssh_{kind}_args", "") for kind in ("common", "extra")]
            CONNECTIONS[node.name] = testinfra.get_host(
                f"ssh://{known.get('ansible_host', node.name)}:{known.get('ansible_port', 22)}",
                ssh_identity_file=known.get("ansible_ssh_private_key_file"),
                ssh_extra_args=" ".join(
                    [*filter(None, extra), f"-o User={known['ansible_user']}"]
                    if "ansible_user" in known
                    else filter(None, extra)
                ),
                controlpath=control_path,
                sudo=True,
            )
    return CONNECTIONS[node.name]


@pytest.fixture
def host(node: Node, control_path: str) -> Host:
    """The host under test, as root."""
    return connect(node, control_path)


@pytest.fixture
def variables(node: Node) -> dict[str, Any]:
    """The inventory's variables of the host under test."""
    return node.variables


@dataclass(frozen=True)
class Secret:
    """What a failed test must not show."""

    value: str = field(repr=False)


@pytest.fixture(scope="session")
def secrets(pytestconfig: pytest.Config) -> dict[str, Secret]:
    """The inventory's secrets that are set: of a dictionary, each as `name.key`."""
    __tracebackhide__ = True
    found, problem = ask_inventory(pytestconfig, SECRETS)
    if problem:
        pytest.fail(f"the inventory's secrets cannot be read:\n{problem}", pytrace=False)
    flat: dict[str, Secret] = {}
    for variables in found.values():
        for name, value in variables.items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{name}.{key}".rstrip("."): Secret(text) for key, text in entries if text}
    return flat


Script = Callable[..., Any]


@pytest.fixture(scope="session")
def run_script() -> Script:
    """Runs one of on_host/ on a host, as root, and returns what it answers to what it is asked.

    Questions may hold secrets: they stand in no process's arguments.
    """

    def run(host: Host, name: str, asked: dict[str, Any], python: str = "python3") -> Any:
        __tracebackhide__ = True
        script = Path(__file__).with_name("on_host") / name
        backend = host.backend
        command = backend.get_command(f"{python} -c %s", script.read_text())
        if backend.NAME == "ssh":
            words, arguments = backend._build_ssh_command(command)
            command = backend.quote(" ".join(words), *arguments)
        done = subprocess.run(
            shlex.split(command),
            check=False,
            capture_output=True,
            text=True,
            input=json.dumps(asked, default=lambda secret: secret.value),
        )
        if done.returncode:
            pytest.fail(f"{name} failed on {backend.get_hostname()}:\n{done.stderr}", pytrace=False)
        return json.loads(done.stdout)

    return run


@pytest.fixture
def store(variables: dict[str, Any]) -> str:
    """Which database it is, where it asks who one is."""
    if not variables["store_has_users"]:
        pytest.skip("the server that stands in for the database asks nobody who he is")
    return str(urlsplit(variables["store_url"]).scheme)


@pytest.fixture
def login(variables: dict[str, Any]) -> str:
    """How Kafka's clients prove who they are, where they have to."""
    found = str(variables["kafka_broker_authentication"])
    if found == "none":
        pytest.skip("Kafka asks nobody who he is")
    return found


@dataclass(frozen=True)
class Topology:
    """All hosts, for tests that span them."""

    nodes: dict[str, Node]
    control_path: str

    def first(self, group: str) -> Host:
        """A host of the group; the test is skipped where the inventory has none."""
        for node in self.nodes.values():
            if group in node.groups:
                return connect(node, self.control_path)
        pytest.skip(f"the inventory has no host in {group}")

    def host(self, node: Node) -> Host:
        """A host of the inventory, as root."""
        return connect(node, self.control_path)

    def services(self) -> dict[tuple[str, str], str]:
        """The invocation of every service, which changes when it is started anew."""
        return {
            (node.name, unit): connect(node, self.control_path).check_output(
                "systemctl show --property=InvocationID --value %s", unit
            )
            for node in self.nodes.values()
            for unit in node.units
        }

    def variable(self, name: str) -> Any:
        """A variable that is the same on all hosts."""
        return next(iter(self.nodes.values())).variables[name]


@pytest.fixture(scope="session")
def topology(pytestconfig: pytest.Config, control_path: str) -> Topology:
    return Topology(pytestconfig.stash[NODES], control_path)


class Audit:
    """The audit of what is produced from now on."""

    def __init__(self, storage: Host) -> None:
        self._storage = storage
        self._since = dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")

    def wait(self, images: int, seconds: float = 60) -> dict[str, Any]:
        """What it says once so many images are all stored and predicted, or the time is up."""
        until = time.monotonic() + seconds
        command = f"iot-pipeline audit --json --since {self._since}"
        while True:
            seen: dict[str, Any] = json.loads(self._storage.run(command).stdout)
            whole = seen["produced"] >= images and not seen["pending"] and not seen["missing"]
            if whole or time.monotonic() > until:
                return seen
            time.sleep(1)


@pytest.fixture
def audit(topology: Topology) -> Audit:
    """The audit of what is produced during the test."""
    return Audit(topology.first("storage_nodes"))


def services_of(arguments: dict[str, Any]) -> list[tuple[Host, str]]:
    unit = arguments.get("unit") or arguments.get("app")
    if unit and "host" in arguments:
        return [(arguments["host"], unit)]
    topology = arguments.get("topology")
    if topology is None:
        return []
    return [
        (connect(node, topology.control_path), unit)
        for node in topology.nodes.values()
        for unit in node.units
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the journals of the services that it looked at."""
    report: pytest.TestReport = yield
    if report.failed:
        for host, unit in services_of(getattr(item, "funcargs", {})):
            journal = host.run("journalctl --unit=%s --lines=30 --no-pager", unit)
            report.sections.append((f"journal of {unit}", journal.stdout))
    return report
