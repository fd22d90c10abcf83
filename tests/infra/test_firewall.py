"""Who may reach which port, on hosts that have the firewall."""

import ipaddress
from typing import Any

import pytest
from testinfra.host import Host

TABLE = "nft list table inet iot_pipeline"

# What listens anywhere in a topology, and some that nothing should open.
PORTS = (22, 111, 2181, 3142, 4369, 5984, 6984, 7072, 9092, 9093, 9101, 9102, 9103)


@pytest.fixture(autouse=True)
def firewall(variables: dict[str, Any]) -> None:
    if "firewall_rules" not in variables or not variables.get("firewall_enabled", True):
        pytest.skip("the inventory leaves this host without a firewall")


def test_is_loaded_now_and_at_boot(host: Host) -> None:
    service = host.service("iot-firewall")
    assert service.is_enabled
    assert service.is_running
    rules = host.check_output(TABLE)
    assert "hook input priority filter; policy drop;" in rules


def test_nothing_takes_the_rules_back(host: Host) -> None:
    timer = host.run("systemctl is-active iot-firewall-rollback.timer")
    assert timer.stdout.strip() == "inactive"


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


def test_lets_other_hosts_in_as_their_groups_allow(
    host: Host, node: Any, topology: Any, variables: dict[str, Any]
) -> None:
    """Seen from this host: the ports of all others."""
    own = variables.get("ansible_host", node.name)
    others = {
        other.variables.get("ansible_host", other.name): other
        for other in topology.nodes.values()
        if other.name != node.name and "firewall_rules" in other.variables
    }
    # All at once: each that is dropped takes the whole two seconds. 0: connected; 1: refused by the
    # host's kernel, so the firewall let it through; 124: no answer.
    knocks = " ".join(
        f"(timeout 2 bash -c 'exec 3<>/dev/tcp/{address}/{port}' 2>/dev/null; "
        f"echo {address} {port} $?) &"
        for address in others
        for port in PORTS
    )
    answers = host.check_output(f"{knocks} wait").splitlines()
    assert len(answers) == len(others) * len(PORTS)
    for answer in answers:
        address, port, status = answer.split()
        expected = may_reach(others[address].variables, own, int(port))
        assert (status != "124") == expected, (others[address].name, port)
