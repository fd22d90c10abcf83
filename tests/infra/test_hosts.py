"""What holds on every host."""

import re
from typing import Any

import pytest
from testinfra.host import Host


def test_no_unit_has_failed(host: Host) -> None:
    assert host.check_output("systemctl list-units --failed --plain --no-legend") == ""


def test_names_resolve(host: Host, variables: dict[str, Any], topology: Any) -> None:
    entries = variables.get("base_hosts_entries", {})
    for name in {*topology.nodes, *entries}:
        found = {
            line.split()[0] for line in host.check_output("getent ahosts %s", name).split("\n")
        }
        # Without an entry the name is in DNS.
        assert found == {entries[name]} if name in entries else found


def test_extra_authorities_are_trusted(host: Host, variables: dict[str, Any]) -> None:
    if not variables.get("base_extra_ca_bundle"):
        pytest.skip("the inventory adds no certificate authority")
    added = host.file("/usr/local/share/ca-certificates/extra-bundle.crt")
    assert added.mode == 0o644
    trusted = host.file("/etc/ssl/certs/ca-certificates.crt").content_string
    for certificate in re.findall(
        "-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", added.content_string, re.DOTALL
    ):
        assert certificate.replace("\n", "") in trusted.replace("\n", "")


def expected_sockets(groups: tuple[str, ...], variables: dict[str, Any]) -> set[tuple[str, int]]:
    """Address and port of each TCP socket of the pipeline; `*` is any address."""
    expected = set()
    kafka = variables.get("kafka_broker_bind_address") or "*"
    if "kafka_brokers" in groups:
        expected.add((kafka, variables["kafka_client_port"]))
        if variables["kafka_broker_authentication"] != "none":
            expected.add((kafka, variables.get("kafka_broker_replication_port", 9094)))
    if "kafka_controllers" in groups:
        expected.add((kafka, variables["kafka_controller_port"]))
    if "couchdb_servers" in groups:
        address = variables["couchdb_bind_address"]
        expected.add((address, variables["couchdb_port"]))
        if variables.get("couchdb_tls") and variables.get("couchdb_distribution") != "standin":
            # The official server cannot close it.
            expected.add((address, variables.get("couchdb_plain_port", 5984)))
    if "mongodb_servers" in groups:
        expected.add((variables["mongodb_bind_address"], variables["mongodb_port"]))
        if variables.get("mongodb_distribution") != "standin":
            # Over which its host reaches it.
            expected.add(("127.0.0.1", variables["mongodb_port"]))
    for group, port in {"producers": 9101, "inference_nodes": 9102, "storage_nodes": 9103}.items():
        if group in groups:
            expected.add(("127.0.0.1", port))
    return expected


def listening(host: Host) -> set[tuple[str, int, str]]:
    """Address, port and program of each listening TCP socket."""
    found = set()
    for line in host.check_output("ss --listening --tcp --numeric --processes --no-header").split(
        "\n"
    ):
        address, _, port = line.split()[3].rpartition(":")
        program = re.search(r'users:\(\("([^"]+)"', line)
        address = re.sub(r"%\w+$|^\[::ffff:|[\[\]]", "", address)
        address = "*" if address in {"0.0.0.0", "::", "*"} else address  # noqa: S104 it is compared
        found.add((address, int(port), program[1] if program else "?"))
    return found


def test_listens_where_it_should_and_nowhere_else(
    host: Host, node: Any, variables: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    expected = expected_sockets(node.groups, variables)
    found = listening(host)
    assert expected <= {(address, port) for address, port, _ in found}
    # What only the host itself can reach is its own affair, but for our services.
    ours = re.compile("java|beam|epmd|mongod|node|python|iot-pipeline")
    allowed = {variables.get("ansible_port", 22), *pytestconfig.getoption("also_listening")}
    assert {
        (address, port, program)
        for address, port, program in found
        if (address, port) not in expected
        and port not in allowed
        and (ours.match(program) or address not in {"127.0.0.1", "::1"})
        # CouchDB's runtime speaks to itself over loopback.
        and not (re.match("beam|epmd", program) and address == "127.0.0.1")
    } == set()
