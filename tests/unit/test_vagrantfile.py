"""The machines that the Vagrantfile boots are those that Ansible converges."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iot_lab import hosts, images, paths

GOOD_HOST = {
    "ansible_host": "192.168.56.21",
    "vm_memory_mb": 512,
    "vm_cpus": 1,
    "vm_os": "debian13",
}

pytestmark = pytest.mark.skipif(
    shutil.which("ruby") is None, reason="Ruby comes with Vagrant: lab/bin/lab setup"
)


def derive(inventory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ruby", str(paths.ROOT / "lab" / "machines.rb"), str(inventory)],
        check=False,
        capture_output=True,
        text=True,
    )


def machines_of(folder: Path, tree: object) -> list[dict[str, Any]]:
    file = folder / "hosts.yml"
    file.write_text(json.dumps(tree))  # JSON is YAML.
    done = derive(file)
    assert done.returncode == 0, done.stderr
    machines: list[dict[str, Any]] = json.loads(done.stdout)["machines"]
    return machines


def error_of(folder: Path, tree: object) -> str:
    file = folder / "hosts.yml"
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    done = derive(file)
    assert done.returncode == 1
    assert done.stdout == ""
    assert str(file) in done.stderr
    return done.stderr


def hosts_of(**changes: dict[str, Any]) -> dict[str, Any]:
    return {"all": {"hosts": {"one": {**GOOD_HOST, **changes.get("one", {})}}}}


def inventory_as_ansible_sees_it(inventory: Path) -> dict[str, Any]:
    command = Path(sys.executable).with_name("ansible-inventory")
    if not command.exists():
        command = paths.TOOLS / "bin" / "ansible-inventory"
    done = subprocess.run(
        [str(command), "--inventory", str(inventory), "--list"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "ANSIBLE_CONFIG": str(paths.ROOT / "ansible" / "ansible.cfg")},
    )
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize("topology", hosts.topologies())
def test_every_topology_boots_what_ansible_converges(topology: str) -> None:
    seen = inventory_as_ansible_sees_it(paths.INVENTORY / topology)
    variables = seen["_meta"]["hostvars"]

    machines = hosts.machines(topology)

    assert {machine.name for machine in machines} == set(variables)
    for machine in machines:
        expected = variables[machine.name]
        assert machine.address == expected["ansible_host"]
        assert machine.memory_mb == expected["vm_memory_mb"]
        assert machine.cpus == expected["vm_cpus"]
        assert machine.os == expected["vm_os"]
        assert set(machine.groups) == {
            group for group, content in seen.items() if machine.name in content.get("hosts", [])
        }


@pytest.mark.parametrize("topology", hosts.topologies())
def test_machines_that_boot_together_publish_ports_of_their_own(topology: str) -> None:
    found = json.loads(derive(paths.INVENTORY / topology / "hosts.yml").stdout)["machines"]
    ports = {machine["ssh_port"] for machine in found}
    assert len(ports) == len(found)
    assert min(ports) > 1024
    assert "host: machine.ssh_port" in (paths.ROOT / "Vagrantfile").read_text()


def test_variables_merge_as_ansible_merges_them(tmp_path: Path) -> None:
    tree = {
        "all": {
            "vars": {"vm_os": "debian12", "vm_cpus": 1, "vm_memory_mb": 512},
            "hosts": {"one": {"ansible_host": "192.168.56.21"}},
            "children": {
                "brokers": {
                    "vars": {"vm_memory_mb": 1024, "vm_cpus": 2},
                    "hosts": {"one": None, "two": {"ansible_host": "192.168.56.22", "vm_cpus": 3}},
                    "children": {
                        "big": {"vars": {"vm_memory_mb": 2048}, "hosts": {"two": None}},
                    },
                },
            },
        }
    }

    machines = machines_of(tmp_path, tree)

    seen = inventory_as_ansible_sees_it(tmp_path / "hosts.yml")["_meta"]["hostvars"]
    assert [machine["name"] for machine in machines] == ["one", "two"]
    for machine in machines:
        variables = seen[machine["name"]]
        assert (machine["os"], machine["cpus"], machine["memory_mb"]) == (
            variables["vm_os"],
            variables["vm_cpus"],
            variables["vm_memory_mb"],
        )


def test_every_operating_system_has_an_image(tmp_path: Path) -> None:
    for system, suite in images.SUITES.items():
        (machine,) = machines_of(tmp_path, hosts_of(one={"vm_os": system}))
        assert machine["image"] == images.name(system)
        assert machine["box"] == f"debian/{suite}64"


@pytest.mark.parametrize("key", sorted(GOOD_HOST))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    lacking = {name: value for name, value in GOOD_HOST.items() if name != key}

    error = error_of(tmp_path, {"all": {"hosts": {"one": lacking}}})

    assert f"host 'one' lacks {key}" in error


@pytest.mark.parametrize(
    "key,value,expected",
    [
        ("vm_os", "debian11", "must be one of debian12, debian13, not"),
        ("vm_memory_mb", "512", "must be a whole number from 256 up, not"),
        ("vm_memory_mb", 64, "must be a whole number from 256 up, not 64"),
        ("vm_cpus", 0, "must be a whole number from 1 up, not 0"),
        ("vm_cpus", 1.5, "must be a whole number from 1 up, not 1.5"),
        ("ansible_host", "10.0.0.5", "must be an address in 192.168.56.0/24"),
        ("ansible_host", "192.168.56.1", "must be an address in 192.168.56.0/24 from .2 to .254"),
        ("ansible_host", "192.168.56.255", "must be an address in 192.168.56.0/24 from .2 to .254"),
        ("ansible_host", "one.example", "must be an address in"),
        ("ansible_host", 21, "must be an address in"),
        ("ansible_host", None, "must be an address in"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, key: str, value: object, expected: str) -> None:
    error = error_of(tmp_path, hosts_of(one={key: value}))

    assert f"host 'one': {key} {expected}" in error


def test_two_hosts_cannot_share_an_address(tmp_path: Path) -> None:
    tree = {"all": {"hosts": {"one": GOOD_HOST, "two": GOOD_HOST}}}

    assert "192.168.56.21 is given to one and two" in error_of(tmp_path, tree)


@pytest.mark.parametrize(
    "tree,expected",
    [
        ("all: [", "while parsing a flow node"),
        ("hosts: {}\n", "expected a mapping with the key 'all'"),
        ("", "expected a mapping with the key 'all'"),
        ({"all": {"hosts": {}}}, "no hosts under 'all'"),
        ({"all": {"children": {"brokers": ["one"]}}}, "group 'brokers' must be a mapping"),
        ({"all": {"hosts": {"node[1:3]": GOOD_HOST}}}, "'node[1:3]' is no host name"),
        ({"all": {"hosts": {"Upper_case": GOOD_HOST}}}, "'Upper_case' is no host name"),
    ],
)
def test_a_broken_inventory_is_explained(tmp_path: Path, tree: object, expected: str) -> None:
    assert expected in error_of(tmp_path, tree)


def test_an_unknown_topology_names_those_that_exist() -> None:
    done = derive(paths.INVENTORY / "nowhere" / "hosts.yml")

    assert done.returncode == 1
    assert "TOPOLOGY is one of:" in done.stderr
    assert "couchdb" in done.stderr


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="Vagrant: lab/bin/lab setup")
class TestVagrant:
    def vagrant(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["vagrant", *words],
            check=False,
            capture_output=True,
            text=True,
            cwd=paths.ROOT,
            env={**os.environ, "VAGRANT_CHECKPOINT_DISABLE": "1", **environment},
        )

    # Vagrant reads the settings of its own providers where those are not installed, too; libvirt is
    # a plugin's.
    @pytest.mark.parametrize("provider", ["docker", "virtualbox", "libvirt"])
    def test_the_vagrantfile_is_valid_for_every_provider(self, provider: str) -> None:
        done = self.vagrant("validate", "--ignore-provider", VAGRANT_DEFAULT_PROVIDER=provider)

        if "Please use a provider that exists" in done.stderr:
            pytest.skip(f"Vagrant's plugin for {provider} is not installed")
        assert done.returncode == 0, done.stderr

    def test_an_unknown_topology_ends_with_one_clear_line(self) -> None:
        done = self.vagrant("validate", TOPOLOGY="nowhere")

        assert done.returncode != 0
        assert "Vagrantfile: " in done.stderr
        assert "no such inventory" in done.stderr
