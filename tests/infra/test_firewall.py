"""Who may reach which port, on hosts that have the firewall."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import pytest
import testinfra
from testinfra.host import Host

TABLE = "nft list table inet iot_pipeline"

# What listens anywhere in a topology, and some that nothing should open.
PORTS = (22, 111, 2181, 3142, 4369, 5984, 6984, 7072, 9092, 9093, 9101, 9102, 9103, 27017)


def has_firewall(variables: dict[str, Any]) -> bool:
    return "firewall_rules" in variables and bool(variables.get("firewall_enabled", True))


@pytest.fixture
def firewall(variables: dict[str, Any]) -> None:
    if not has_firewall(variables):
        pytest.skip("the inventory leaves this host without a firewall")


@pytest.mark.usefixtures("firewall")
def test_is_loaded_now_and_at_boot(host: Host) -> None:
    service = host.service("iot-firewall")
    assert service.is_enabled
    assert service.is_running
    rules = host.check_output(TABLE)
    assert "hook input priority filter; policy drop;" in rules


@pytest.mark.usefixtures("firewall")
def test_nothing_takes_the_rules_back(host: Host) -> None:
    timer = host.run("systemctl is-active iot-firewall-rollback.timer")
    assert timer.stdout.strip() == "inactive"


@pytest.mark.usefixtures("firewall")
def test_opens_what_the_inventory_says(host: Host, variables: dict[str, Any]) -> None:
    rules = host.check_output(TABLE)
    opened = [line for line in rules.splitlines() if " dport " in line and "@opening_" in line]
    families = 0
    for rule in variables["firewall_rules"]:
        for mark in (":", "."):
            if any(mark in source for source in rule["sources"]):
                families += 1
        assert not rule["sources"] or any(
            f"dport {rule['port']} accept" in line and f'"{rule["name"]}"' in line
            for line in opened
        )
    ssh = [line for line in opened if '"ssh"' in line]
    assert len(opened) == families + len(ssh)


def may_reach(variables: dict[str, Any], source: str, port: int) -> bool:
    openings = [(variables.get("ansible_port", 22), variables.get("firewall_ssh_sources"))]
    openings += [(rule["port"], rule["sources"]) for rule in variables["firewall_rules"]]
    address = ipaddress.ip_address(source)
    return any(
        # Without a list, ssh is open to all.
        opened == port
        and (networks is None or any(address in ipaddress.ip_network(n) for n in networks))
        for opened, networks in openings
    )


def address_of(node: Any) -> str:
    return str(node.variables.get("ansible_host", node.name))


@pytest.fixture(scope="module")
def walled(topology: Any) -> dict[str, Any]:
    """The hosts that have the firewall, by address."""
    found = {address_of(node): node for node in topology.nodes.values()}
    return {address: node for address, node in found.items() if has_firewall(node.variables)}


@pytest.fixture(scope="module")
def ports(topology: Any, walled: dict[str, Any]) -> set[int]:
    """The ports that any of them listens on or opens, and some that none should."""
    sockets = [
        line.split()[3]
        for node in walled.values()
        for line in topology.host(node)
        .check_output("ss --listening --tcp --numeric --no-header")
        .splitlines()
    ]
    rules = [rule for node in walled.values() for rule in node.variables["firewall_rules"]]
    return {*PORTS, *(int(s.rpartition(":")[2]) for s in sockets), *(r["port"] for r in rules)}


def opened(node: Any, source: str, ports: set[int]) -> list[int]:
    return sorted(port for port in ports if may_reach(node.variables, source, port))


@pytest.mark.usefixtures("firewall")
def test_lets_other_hosts_in_as_their_groups_allow(
    host: Host,
    node: Any,
    walled: dict[str, Any],
    ports: set[int],
    run_script: Callable[..., Any],
) -> None:
    """Seen from this host: the ports of all others that mean anything."""
    own = address_of(node)
    others = {address: other for address, other in walled.items() if address != own}
    found = run_script(host, "scan_ports.py", {"ports": dict.fromkeys(others, sorted(ports))})
    assert found == {address: opened(other, own, ports) for address, other in others.items()}


def test_a_host_with_little_business_finds_nothing_else(
    topology: Any, walled: dict[str, Any], ports: set[int], run_script: Callable[..., Any]
) -> None:
    """A scan, from the host that the others let in least."""
    if not walled:
        pytest.skip("the inventory has no firewall")
    scanned = ports | {*range(1, 10_241)}
    expected = {
        own: {other: opened(walled[other], own, scanned) for other in walled if other != own}
        for own in walled
    }
    own = min(expected, key=lambda address: sum(map(len, expected[address].values())))
    asked = {"ports": dict.fromkeys(expected[own], sorted(scanned))}
    found = run_script(topology.host(walled[own]), "scan_ports.py", asked)
    assert found == expected[own], f"seen from {walled[own].name}"


def test_a_machine_outside_the_groups_reaches_ssh_alone(
    walled: dict[str, Any], ports: set[int], run_script: Callable[..., Any]
) -> None:
    """A scan, from the machine that runs the tests."""
    scanned = ports | {*range(1, 1025)}
    own = {address: own_address(address) for address in walled}
    if not walled or set(own.values()) & set(walled):
        pytest.skip("the inventory has no firewall, or this machine is one of its hosts")
    expected = {a: opened(node, own[a], scanned) for a, node in walled.items()}
    asked = {"ports": dict.fromkeys(walled, sorted(scanned))}
    assert run_script(testinfra.get_host("local://"), "scan_ports.py", asked) == expected
    for address, found in expected.items():
        assert set(found) <= {walled[address].variables.get("ansible_port", 22)}


def own_address(towards: str) -> str:
    """From where this machine talks to an address; nothing is sent."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as endpoint:
        endpoint.connect((towards, 9))
        return str(endpoint.getsockname()[0])
