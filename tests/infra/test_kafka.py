"""The brokers, and the topics that the inventory declares."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.backend.base import CommandResult
from testinfra.host import Host

GROUP = "kafka_brokers"
BIN = "/opt/kafka/bin"
CONFIG = "/opt/kafka/config"


@pytest.fixture
def tool(host: Host, variables: dict[str, Any]) -> Callable[[str], CommandResult]:
    """Runs one of Kafka's tools against the cluster, as the admin where there is one."""

    def run(command: str) -> CommandResult:
        name, _, arguments = command.partition(" ")
        settings = f"--command-config={CONFIG}/admin.properties"
        return host.run(
            f"{BIN}/{name} --bootstrap-server=%s {settings} {arguments}"
            if variables["kafka_broker_authentication"] != "none"
            else f"{BIN}/{name} --bootstrap-server=%s {arguments}",
            variables["kafka_bootstrap_servers"],
        )

    return run


def server_properties(host: Host) -> dict[str, str]:
    text = host.file("/opt/kafka/config/server.properties").content_string
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.partition("=")[::2] for line in lines)


def test_version(host: Host) -> None:
    assert re.match(r"4\.3\.\d", host.check_output(f"{BIN}/kafka-topics.sh --version"))


def test_java(host: Host) -> None:
    found = re.search(r'version "(\d+)', host.run("java -version").stderr)
    assert found
    assert int(found[1]) in {17, 21}


def test_data_is_its_own_and_private(host: Host) -> None:
    folders = server_properties(host)["log.dirs"].split(",")
    for name in folders:
        assert not name.startswith("/tmp")
        folder = host.file(name)
        assert folder.user == "kafka"
        assert not folder.mode & 0o007
        assert host.file(f"{name}/meta.properties").exists


def test_code_and_settings_are_not_the_brokers_to_change(host: Host) -> None:
    settings = host.file("/opt/kafka/config/server.properties")
    assert settings.user == "root"
    assert settings.mode & 0o027 == 0
    assert host.file(f"{BIN}/kafka-topics.sh").user == "root"


def test_advertises_a_name_that_others_reach(host: Host, variables: dict[str, Any]) -> None:
    advertised = server_properties(host)["advertised.listeners"]
    names = re.findall(r"//([^:/,]+):", advertised)
    assert names
    assert not {"localhost", "127.0.0.1", "0.0.0.0"} & set(names)  # noqa: S104 it is compared
    assert f":{variables['kafka_client_port']}" in advertised


def test_heap_fits_the_host(host: Host, variables: dict[str, Any]) -> None:
    arguments = host.check_output("ps --no-headers -ww -o args -p %s", main_pid(host))
    heap = re.search(r"-Xmx(\d+)([mMgG])", arguments)
    assert heap
    heap_mb = int(heap[1]) * (1024 if heap[2] in "gG" else 1)
    memory = re.search(r"MemTotal:\s+(\d+)", host.check_output("cat /proc/meminfo"))
    assert memory
    # A container of the lab sees the memory of the machine, so the inventory says its own.
    host_mb = variables.get("vm_memory_mb", int(memory[1]) // 1024)
    assert 256 <= heap_mb <= host_mb * 3 // 4


def main_pid(host: Host) -> str:
    return str(host.check_output("systemctl show --property=MainPID --value kafka"))


def test_topics_are_as_declared_and_healthy(
    tool: Callable[[str], CommandResult], variables: dict[str, Any]
) -> None:
    answer = tool("kafka-topics.sh --describe")
    assert answer.rc == 0, answer.stderr
    described = answer.stdout
    for topic in variables["kafka_resources_topics"]:
        found = re.search(rf"^Topic: {re.escape(topic['name'])}\s.*$", described, re.MULTILINE)
        assert found, f"{topic['name']} is missing"
        assert re.search(rf"PartitionCount: {topic['partitions']}\b", found[0])
        assert re.search(rf"ReplicationFactor: {topic['replication_factor']}\b", found[0])
        configs = set(found[0].rpartition("Configs: ")[2].strip().split(","))
        assert {f"{name}={value}" for name, value in topic["config"].items()} <= configs

    partitions = re.findall(r"Leader: (\S+)\s+Replicas: (\S+)\s+Isr: (\S+)", described)
    assert len(partitions) >= sum(t["partitions"] for t in variables["kafka_resources_topics"])
    for leader, replicas, in_sync in partitions:
        assert leader.isdigit(), "a partition is offline"
        assert set(in_sync.split(",")) == set(replicas.split(",")), "a replica lags behind"


def test_quorum_has_a_leader_and_all_its_voters(tool: Callable[[str], CommandResult]) -> None:
    answer = tool("kafka-metadata-quorum.sh describe --status")
    assert answer.rc == 0, answer.stderr
    status = answer.stdout
    assert re.search(r"LeaderId:\s+\d+", status)
    lag = re.search(r"MaxFollowerLag:\s+(\d+)", status)
    assert lag
    assert int(lag[1]) < 1000


def test_settings_are_those_of_the_inventory(host: Host, variables: dict[str, Any]) -> None:
    found = server_properties(host)
    protocols = set(
        dict(
            pair.split(":") for pair in found["listener.security.protocol.map"].split(",")
        ).values()
    )
    if variables["kafka_broker_authentication"] == "none":
        assert protocols == {"PLAINTEXT"}
        return
    assert protocols <= {"SSL", "SASL_SSL"}
    assert found["authorizer.class.name"].endswith(".StandardAuthorizer")
    assert found["allow.everyone.if.no.acl.found"] == "false"


def test_secrets_are_read_only_by_those_who_need_them(host: Host, login: str) -> None:
    admin = host.file(f"{CONFIG}/admin.properties")
    assert (admin.user, admin.group, admin.mode) == ("root", "root", 0o600)
    keystore = host.file(server_properties(host)["ssl.keystore.location"])
    assert (keystore.user, keystore.group, keystore.mode) == ("root", "kafka", 0o640)
    assert host.file(f"{CONFIG}/jaas.conf").exists == (login == "plain")
    assert host.run("ls /run/kafka-format.* /run/kafka-admin.*").stdout == ""


def listeners(host: Host) -> dict[str, str]:
    """Name and port of each listener."""
    return dict(
        re.findall(r"(\w+)://[^,]*?:(\d+)", server_properties(host)["advertised.listeners"])
    )


@pytest.mark.usefixtures("login")
def test_every_listener_speaks_only_new_tls_and_shows_the_certificate_on_disk(host: Host) -> None:
    """Also after a renewal, which Kafka must have read."""
    properties = server_properties(host)
    name = re.findall(r"//([^:/,]+):", properties["advertised.listeners"])[0]
    fingerprint = "openssl x509 -noout -fingerprint -sha256"
    on_disk = host.check_output(f"{fingerprint} -in %s", properties["ssl.keystore.location"])
    for listener, port in listeners(host).items():
        connect = (
            f"openssl s_client -connect {name}:{port} -verify_hostname {name}"
            f" -CAfile {properties['ssl.truststore.location']} -verify_return_error"
        )
        shown = host.run(f"{connect} </dev/null | {fingerprint}")
        assert shown.stdout.strip() == on_disk, f"{listener}: {shown.stderr}"
        old = host.run(f"{connect} -tls1_1 -cipher DEFAULT@SECLEVEL=0 </dev/null")
        assert "Cipher is (NONE)" in old.stdout, f"{listener} takes TLS 1.1"
