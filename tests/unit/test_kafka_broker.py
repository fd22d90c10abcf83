"""What the role kafka_broker makes of its variables: Ansible itself renders it, as a play would."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLE = Path(__file__).parents[2] / "roles/kafka_broker"
PASSWORD = "not/a-real=pass+word"
SCRAM = {"kafka_broker_authentication": "scram", "kafka_broker_admin_password": PASSWORD}

# As it was written before there was a choice: a running cluster must not be restarted by it.
NONE = """\
# Ansible managed
advertised.listeners=PLAINTEXT://none-broker:9092,CONTROLLER://none-broker:9093
auto.create.topics.enable=false
controller.listener.names=CONTROLLER
controller.quorum.auto.join.enable=true
controller.quorum.bootstrap.servers=none-broker:9093
default.replication.factor=1
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
listeners=PLAINTEXT://:9092,CONTROLLER://:9093
log.dirs=/var/lib/kafka/data
min.insync.replicas=1
node.id=1
offsets.topic.replication.factor=1
process.roles=broker,controller
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.replication.factor=1
"""


def alone(name: str, **variables: Any) -> dict[str, Any]:
    members = {"kafka_broker_controllers": [name], "kafka_broker_brokers": [name]}
    return {name: members | SCRAM | variables}


def scattered() -> dict[str, Any]:
    """A controller without broker, and brokers without controller."""
    members = {"kafka_broker_controllers": ["c1"], "kafka_broker_brokers": ["b1", "b2"]}
    return dict.fromkeys(("c1", "b1", "b2"), members | SCRAM)


# What systemd or a shell would take for something of its own.
JVM_OPTIONS = [
    "-Xlog:gc*:file=/var/log/kafka/gc-%t-%p.log",
    '-Da="quoted"',
    "-Db='quoted'",
    "-Dc=c:\\new\\temp\\",
    "-Dd=$HOME${HOME}`id`",
    "-De=100%",
    "-Df=#;é",
]

HOSTS = {
    **alone("none-broker", kafka_broker_authentication="none"),
    **alone("scram-broker", kafka_broker_rack="rack-1"),
    **alone(
        "plain-broker",
        kafka_broker_authentication="plain",
        kafka_broker_users=[{"name": "iot-producer", "password": "of-the-producer"}],
    ),
    **alone("odd-broker", kafka_broker_jvm_options=JVM_OPTIONS),
    **alone(
        "mtls-broker", kafka_broker_authentication="mtls", kafka_broker_super_users=["monitoring"]
    ),
    **scattered(),
}
TEMPLATES = (
    "server.properties",
    "kafka.service",
    "jaas.conf",
    "admin.properties",
    "host.properties",
)


def play(folder: Path, hosts: dict[str, Any], tasks: list[dict[str, Any]]) -> None:
    """Run tasks with the role's variables, on hosts that are all this machine."""
    folder.mkdir(exist_ok=True)
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    known = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "kafka_broker_host_memory_mb": 1024,
    }
    inventory = {"all": {"hosts": hosts, "vars": defaults | known}}
    (folder / "hosts.yml").write_text(json.dumps(inventory))
    for part in ("templates", "filter_plugins"):
        (folder / part).symlink_to(ROLE / part)
    variables = [str(ROLE / "vars/main.yml")]
    start = {"hosts": "all", "gather_facts": False, "vars_files": variables, "tasks": tasks}
    (folder / "play.yml").write_text(json.dumps([start]))
    program = shutil.which("ansible-playbook")
    assert program, "the tools are not on PATH"
    done = subprocess.run(
        [program, f"--inventory={folder}/hosts.yml", str(folder / "play.yml")],
        env={k: v for k, v in os.environ.items() if not k.startswith("ANSIBLE_")}
        | {"ANSIBLE_FORKS": "4"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def answering(folder: Path, task: dict[str, Any], content: str) -> dict[str, Any]:
    """A task after which each host leaves this in a file of its name, or why the task failed."""

    def leave(content: str) -> dict[str, Any]:
        file = f"{folder}/{{{{ inventory_hostname }}}}"
        return {"ansible.builtin.copy": {"dest": file, "content": content}}

    return {"block": [task, leave(content)], "rescue": [leave("{{ ansible_failed_result.msg }}")]}


@dataclass
class Rendered:
    texts: dict[str, dict[str, str]]

    def text(self, host: str, name: str) -> str:
        return self.texts[host][name]

    def properties(self, host: str, name: str = "server.properties") -> dict[str, str]:
        lines = [n for n in self.text(host, name).splitlines() if n and not n.startswith("#")]
        return dict(line.partition("=")[::2] for line in lines)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    folder = tmp_path_factory.mktemp("kafka-broker")
    lookups = [f"lookup('ansible.builtin.template', '{name}.j2')" for name in TEMPLATES]
    found = dict(zip(TEMPLATES, lookups, strict=True))
    found["start inputs"] = (
        "(_kafka_broker_start_inputs + _kafka_broker_secret_start_inputs) | join"
    )
    texts = ", ".join(f"'{name}': {expression}" for name, expression in found.items())
    write = {
        "ansible.builtin.copy": {
            "content": f"{{{{ {{{texts}}} | to_json }}}}",
            "dest": f"{folder}/{{{{ inventory_hostname }}}}.json",
        }
    }
    play(folder / "play", HOSTS, [write])
    return Rendered({host: json.loads((folder / f"{host}.json").read_text()) for host in HOSTS})


def test_none_is_what_it_was(rendered: Rendered) -> None:
    assert rendered.text("none-broker", "server.properties") == NONE
    assert "java.security" not in rendered.text("none-broker", "kafka.service")


SECURE = sorted(HOSTS.keys() - {"none-broker"})


@pytest.mark.parametrize("host", SECURE)
def test_nothing_is_plain_text_and_nothing_is_allowed_by_itself(
    rendered: Rendered, host: str
) -> None:
    found = rendered.properties(host)
    protocols = dict(pair.split(":") for pair in found["listener.security.protocol.map"].split(","))
    assert set(protocols.values()) <= {"SSL", "SASL_SSL"}
    assert protocols["CONTROLLER"] == "SSL"
    assert found["listener.name.controller.ssl.client.auth"] == "required"
    listeners = re.findall(r"(\w+)://", found["listeners"])
    assert set(listeners) <= set(protocols)
    assert set(found["ssl.enabled.protocols"].split(",")) == {"TLSv1.2", "TLSv1.3"}
    assert found["ssl.endpoint.identification.algorithm"] == "https"
    assert found["authorizer.class.name"].endswith(".StandardAuthorizer")
    assert found["allow.everyone.if.no.acl.found"] == "false"


def test_clients_have_passwords_and_brokers_certificates(rendered: Rendered) -> None:
    for host, mechanism in {"scram-broker": "SCRAM-SHA-512", "plain-broker": "PLAIN"}.items():
        found = rendered.properties(host)
        assert found["listeners"] == "CLIENT://:9092,BROKER://:9094,CONTROLLER://:9093"
        assert (
            found["listener.security.protocol.map"] == "CONTROLLER:SSL,CLIENT:SASL_SSL,BROKER:SSL"
        )
        assert found["inter.broker.listener.name"] == "BROKER"
        assert found["listener.name.broker.ssl.client.auth"] == "required"
        assert found["sasl.enabled.mechanisms"] == mechanism
        assert found["super.users"] == f"User:kafka;User:{host}"


def test_a_rack_is_told_where_there_is_one(rendered: Rendered) -> None:
    assert rendered.properties("scram-broker")["broker.rack"] == "rack-1"
    assert "broker.rack" not in rendered.properties("plain-broker")


def test_only_a_cluster_of_brokers_looks_for_a_lost_one(rendered: Rendered) -> None:
    found = rendered.properties("b1")
    assert found["broker.session.timeout.ms"] == "4000"
    assert found["broker.heartbeat.interval.ms"] == "1000"
    assert "broker.session.timeout.ms" not in rendered.properties("scram-broker")


def test_with_mtls_all_have_certificates(rendered: Rendered) -> None:
    found = rendered.properties("mtls-broker")
    # As with passwords, so that brokers of one kind and the other understand each other.
    assert found["listeners"] == "CLIENT://:9092,BROKER://:9094,CONTROLLER://:9093"
    assert found["listener.security.protocol.map"] == "CONTROLLER:SSL,CLIENT:SSL,BROKER:SSL"
    assert found["inter.broker.listener.name"] == "BROKER"
    assert found["listener.name.client.ssl.client.auth"] == "required"
    assert found["listener.name.broker.ssl.client.auth"] == "required"
    assert not [name for name in found if "sasl" in name]
    assert found["super.users"] == "User:kafka;User:mtls-broker;User:monitoring"


def test_each_part_has_the_listeners_of_its_own(rendered: Rendered) -> None:
    controller, broker = rendered.properties("c1"), rendered.properties("b1")
    assert controller["listeners"] == "CONTROLLER://:9093"
    assert broker["listeners"] == "CLIENT://:9092,BROKER://:9094"
    # Each knows all others, by their certificates.
    assert (
        controller["super.users"] == broker["super.users"] == "User:kafka;User:c1;User:b1;User:b2"
    )
    assert not [n for n in controller if n.startswith(("listener.name.broker", "sasl", "inter."))]


@pytest.mark.parametrize("host", sorted(HOSTS))
def test_passwords_stand_where_only_few_may_read(rendered: Rendered, host: str) -> None:
    for name in ("server.properties", "kafka.service", "host.properties"):
        text = rendered.text(host, name)
        assert HOSTS[host]["kafka_broker_admin_password"] not in text
        assert "of-the-producer" not in text


def test_tools_come_as_the_admin(rendered: Rendered) -> None:
    for host, login in {
        "scram-broker": "ScramLoginModule",
        "plain-broker": "PlainLoginModule",
    }.items():
        found = rendered.properties(host, "admin.properties")
        assert found["security.protocol"] == "SASL_SSL"
        assert found["sasl.jaas.config"].endswith(
            f'.{login} required username="kafka" password="{PASSWORD}";'
        )
    found = rendered.properties("mtls-broker", "admin.properties")
    assert found["security.protocol"] == "SSL"
    assert (
        found["ssl.keystore.location"]
        == rendered.properties("mtls-broker")["ssl.keystore.location"]
    )


def test_users_of_plain_are_in_the_file_that_java_is_told_of(rendered: Rendered) -> None:
    text = rendered.text("plain-broker", "jaas.conf")
    assert re.findall(r'user_(\S+)="(.*?)"', text) == [
        ("kafka", PASSWORD),
        ("iot-producer", "of-the-producer"),
    ]
    assert text.count(";") == 2
    unit = rendered.text("plain-broker", "kafka.service")
    assert "-Djava.security.auth.login.config=/opt/kafka-" in unit
    assert "java.security" not in rendered.text("scram-broker", "kafka.service")


def test_java_gets_its_options_letter_by_letter(
    rendered: Rendered, environment_of: Callable[[str], dict[str, str]]
) -> None:
    options = environment_of(rendered.text("odd-broker", "kafka.service"))["KAFKA_OPTS"]
    assert options.split(" ")[-len(JVM_OPTIONS) :] == JVM_OPTIONS


def test_recovery_is_not_cut_off_and_a_play_waits_only_so_long(rendered: Rendered) -> None:
    assert "TimeoutStartSec=infinity" in rendered.text("scram-broker", "kafka.service")
    starting = [
        task
        for name in ("start", "restart")
        for task in yaml.safe_load((ROLE / f"tasks/{name}.yml").read_text())
        if "ansible.builtin.systemd_service" in task or "ansible.builtin.command" in task
    ]
    assert len(starting) == 3
    assert all("kafka_broker_start_timeout" in task["timeout"] for task in starting)


def test_another_password_restarts_only_where_brokers_read_it_at_their_start(
    rendered: Rendered,
) -> None:
    assert PASSWORD not in rendered.text("scram-broker", "start inputs")
    assert PASSWORD in rendered.text("plain-broker", "start inputs")
    assert "of-the-producer" in rendered.text("plain-broker", "start inputs")


@pytest.mark.parametrize(
    "subject, user",
    [
        ("CN=broker", "broker"),
        ("CN=broker.example.com,O=Example,C=NL", "broker.example.com"),
        # What a careless authority might sign for somebody else.
        ("O=Example,CN=broker", None),
        ("CN=broker+OU=x,O=Example", None),
        ("OU=x\\,CN=broker,O=Example", None),
        ("CN=broker\\,O=Example", None),
    ],
)
def test_a_certificate_is_the_user_of_its_common_name(
    rendered: Rendered, subject: str, user: str | None
) -> None:
    rules = rendered.properties("scram-broker")["ssl.principal.mapping.rules"]
    rule = re.fullmatch(r"RULE:(.*)/\$1/,DEFAULT", rules)
    assert rule
    found = re.match(rule[1], subject)
    assert (found[1] if found else None) == user


# Settings that the role needs to know, with the variable that says each.
OWNED = {
    "log.dirs": "kafka_broker_data_dir",
    "log.dir": "kafka_broker_data_dir",
    "metadata.log.dir": "kafka_broker_data_dir",
    "node.id": "kafka_broker_node_id",
    "broker.id": "kafka_broker_node_id",
    "broker.rack": "kafka_broker_rack",
    "process.roles": "kafka_broker_controllers",
    "controller.quorum.bootstrap.servers": "kafka_broker_controllers",
    "controller.quorum.voters": "kafka_broker_controllers",
    "listeners": "kafka_broker_bind_address",
    "advertised.listeners": "kafka_broker_advertised_host",
    "listener.security.protocol.map": "kafka_broker_authentication",
    "inter.broker.listener.name": "kafka_broker_authentication",
    "sasl.enabled.mechanisms": "kafka_broker_authentication",
    "listener.name.client.ssl.client.auth": "kafka_broker_authentication",
    "listener.name.client.scram-sha-512.sasl.jaas.config": "kafka_broker_users",
    "ssl.keystore.location": "kafka_broker_tls_certificate",
    "listener.name.broker.ssl.truststore.location": "kafka_broker_tls_ca",
    "super.users": "kafka_broker_super_users",
    "broker.session.timeout.ms": "kafka_broker_session_timeout_ms",
}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"kafka_broker_authentication": "kerberos"},
        'kafka_broker_authentication is "kerb',
    ),
    "no-password": ({"kafka_broker_admin_password": ""}, "(not set: 8 or more letters"),
    "odd-password": ({"kafka_broker_admin_password": 'quote"inside'}, "(not shown: 8 or more"),
    "admin-is-host": ({"kafka_broker_admin_user": "admin-is-host"}, "no host's name"),
    "bad-user": (
        {
            "kafka_broker_authentication": "plain",
            "kafka_broker_users": [{"name": "kafka", "password": PASSWORD}],
        },
        "kafka_broker_users names kafka",
    ),
    "blank-in-option": ({"kafka_broker_jvm_options": ["-Da=1 -Db=2"]}, '"-Da=1 -Db=2"'),
    "no-option": ({"kafka_broker_jvm_options": ["Xmx1g"]}, '"Xmx1g"'),
    "two-lines": ({"kafka_broker_jvm_options": ["-Da\x07"]}, "kafka_broker_jvm_options holds"),
    "odd-folder": ({"kafka_broker_data_dir": "/srv/100%/kafka"}, 'dir is "/srv/100%/kafka"'),
    "folder-with-blank": ({"kafka_broker_data_dir": "/srv/my kafka"}, 'dir is "/srv/my kafka"'),
    "two-folders": ({"kafka_broker_data_dir": "/data1/k,/data2/k"}, 'dir is "/data1/k,/data2/k"'),
    "odd-address": ({"kafka_broker_bind_address": "a;b"}, 'kafka_broker_bind_address is "a;b"'),
    "odd-version": ({"kafka_broker_version": 4.3}, "kafka_broker_version is 4.3"),
    "number": ({"kafka_broker_admin_password": 12345678}, "kafka_broker_admin_password: YAML"),
    "number-of-user": (
        {
            "kafka_broker_authentication": "plain",
            "kafka_broker_users": [{"name": "u", "password": 12345678}],
        },
        "kafka_broker_users, u: YAML",
    ),
    "odd-settings": (
        {
            "kafka_broker_config_overrides": {
                "a\nlog.dirs": "/x",
                "b": [2],
                "c": None,
                "d": "1\nlog.dirs=/x",
            }
        },
        "log.dirs, b, c, d. Each setting needs a name",
    ),
    "owned-settings": (
        {"kafka_broker_config_overrides": dict.fromkeys(OWNED, "1")},
        "must know itself",
    ),
    "no-certificate": (
        {"kafka_broker_tls_certificate": "/nonexistent/host.pem"},
        "/nonexistent/host.pem is missing on no-certificate",
    ),
}


def test_what_cannot_work_is_refused_with_its_reason(tmp_path: Path) -> None:
    for name in ("ca", "certificate", "key"):
        (tmp_path / name).touch()
    files = {f"kafka_broker_tls_{n}": str(tmp_path / n) for n in ("ca", "certificate", "key")}
    hosts: dict[str, Any] = {}
    for name, (variables, _) in WRONG.items():
        hosts |= alone(name, **files | variables)
    # Each differs from this one, which passes, in one thing alone.
    fine = {"log.cleaner.threads": 2, "auto.create.topics.enable": True, "ssl.cipher.suites": "x"}
    more = {"kafka_broker_config_overrides": fine, "kafka_broker_jvm_options": JVM_OPTIONS}
    hosts |= alone("right", **files, **more)
    preflight = {"ansible.builtin.include_tasks": str(ROLE / "tasks/preflight.yml")}
    play(tmp_path / "play", hosts, [answering(tmp_path, preflight, "passed")])
    assert (tmp_path / "right").read_text() == "passed"
    for name, (_, reason) in WRONG.items():
        assert reason in (tmp_path / name).read_text()
        assert 'quote"inside' not in (tmp_path / name).read_text()
    owned = (tmp_path / "owned-settings").read_text()
    for name, variable in OWNED.items():
        assert re.search(rf"^{name}: set .*{variable}\b.* instead", owned, re.MULTILINE), owned


@pytest.mark.parametrize(
    "formatted, asked, what",
    [
        ("", "abc", "founded"),
        ("ab", "abc", "joined"),
        ("a", "ac", "joined"),
        ("", "c", "a, b cannot tell whether there is a cluster"),
    ],
)
def test_a_cluster_is_founded_only_where_all_say_that_there_is_none(
    tmp_path: Path, formatted: str, asked: str, what: str
) -> None:
    members = {"kafka_broker_controllers": [*"abc"], "kafka_broker_brokers": [*"abc"]}
    stats = {
        host: {"__kafka_broker_meta": {"stat": {"exists": host in formatted}}} for host in asked
    }
    hosts = {host: members | SCRAM | stats.get(host, {}) for host in "abc"}
    guard = yaml.safe_load((ROLE / "tasks/format.yml").read_text())[0]["block"][0]
    content = (
        "{{ 'founded' if '--initial-controllers' in _kafka_broker_format_voters else 'joined' }}"
    )
    task = {"when": "inventory_hostname == 'c'", **answering(tmp_path, guard, content)}
    play(tmp_path / "play", hosts, [task])
    assert what in (tmp_path / "c").read_text()


INPUTS = ("properties", "logging", "unit", "started")


def what_becomes_of(running: bool, changed: bool, renewed: bool, others: bool) -> str:
    """Say it as docs/operations.md does: `others` are other controllers."""
    match running, changed, renewed, others:
        case False, _, _, _:
            return "start"
        case True, True, _, _:
            return "restart"
        case True, False, True, True:
            return "restart"
        case True, False, True, False:
            return "reload"
        case _:
            return "none"


def test_a_service_is_restarted_only_for_a_reason(tmp_path: Path) -> None:
    # Each state with no input changed, and with each of them changed alone.
    rows = []
    states = product(["active", "activating", "inactive"], [True, False], [True, False])
    for (state, renewed, others), changed in product(states, [None, "archive", *INPUTS]):
        expected = what_becomes_of(state != "inactive", changed is not None, renewed, others)
        row = {"state": state, "renewed": renewed, "others": others, "changed": changed}
        rows.append(row | {"expected": expected})
    assert {row["expected"] for row in rows} == {"start", "restart", "reload", "none"}
    tell = {
        "ansible.builtin.assert": {
            "that": "_kafka_broker_action == item.expected",
            "fail_msg": "{{ _kafka_broker_action }}, not {{ item.expected }}",
        },
        "loop": rows,
        "vars": {
            "kafka_broker_controllers": "{{ ['one', 'two'] if item.others else ['one'] }}",
            "_kafka_broker_installed": "{{ item.changed != 'archive' }}",
            "__kafka_broker_service": {"stdout": "{{ item.state }}"},
            "__kafka_broker_certificates": {"changed": "{{ item.renewed }}"},
        }
        | {f"__kafka_broker_{n}": {"changed": f"{{{{ item.changed == '{n}' }}}}"} for n in INPUTS},
    }
    play(tmp_path / "play", alone("one"), [tell])


def test_the_gate_lets_a_sick_one_be_restarted_and_nobody_else(tmp_path: Path) -> None:
    described = {
        "kafka-topics.sh": LACKING.format("1,2"),
        "kafka-metadata-quorum.sh": "NodeId\tLag\tStatus\n1\t0\tLeader\n3\t5000\tFollower\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in described.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        tool.chmod(0o755)
    members = {"kafka_broker_controllers": [*"abc"], "kafka_broker_brokers": [*"abc"]}
    hosts = dict.fromkeys("abc", members | SCRAM | {"kafka_broker_health_timeout": 1})
    gate = {
        "ansible.builtin.include_tasks": str(ROLE / "tasks/health.yml"),
        "vars": {"_kafka_broker_spared": "{{ kafka_broker_node_id }}"},
    }
    task = answering(tmp_path, gate, "passed") | {"vars": {"_kafka_broker_home": str(tmp_path)}}
    play(tmp_path / "play", hosts, [task])
    assert (tmp_path / "c").read_text() == "passed"
    for other in "ab":
        assert "playbooks/rolling-restart.yml -l" in (tmp_path / other).read_text()


LACKING = "\tTopic: t\tPartition: 0\tLeader: 1\tReplicas: 1,2,3\tIsr: {}\tElr: \n"


@pytest.mark.parametrize(
    "answer, described, order",
    [
        ("LeaderId:  2\n", "", "a c b"),
        ("", "", "a b c"),
        ("LeaderId:  1\n", LACKING.format("1,2"), "c b a"),
        ("LeaderId:  2\n", LACKING.format("1,3"), "b a c"),
    ],
)
def test_the_one_that_is_missing_is_restarted_first_and_the_controllers_leader_last(
    tmp_path: Path, answer: str, described: str, order: str
) -> None:
    members = {
        "kafka_broker_controllers": ["a", "b", "c"],
        "kafka_broker_brokers": ["a", "b", "c"],
        "__kafka_broker_leader": {"stdout": answer},
        "__kafka_broker_lacked": {"stdout": described},
    }
    content = {"content": "{{ _kafka_broker_order | join(' ') }}"}
    write = {"ansible.builtin.copy": content | {"dest": f"{tmp_path}/{{{{ inventory_hostname }}}}"}}
    play(tmp_path / "play", dict.fromkeys("abc", members | SCRAM), [write])
    assert {(tmp_path / host).read_text() for host in "abc"} == {order}
