"""The hosts of a topology on this machine: their network, their containers, Vagrant's records.

A run may find what a run that was cut off left behind. `prepare` puts that right and touches
nothing that does not carry the lab's label.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iot_lab import paths
from iot_lab.console import say
from iot_lab.shell import LabError, answer, engine, first, retried, root_command

NETWORK = "iot-lab"
LABEL = "iot-lab"
ROOT_LABEL = "iot-lab.root"

# States from which `vagrant up` starts a container again.
STARTABLE = frozenset({"configured", "created", "exited", "stopped"})


@dataclass(frozen=True)
class Machine:
    """A host as the inventory describes it."""

    name: str
    address: str
    memory_mb: int
    cpus: int
    os: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Container:
    """A container that carries the lab's label."""

    id: str
    name: str
    topology: str
    root: str
    state: str
    pid: int

    def is_ours(self) -> bool:
        """Tell whether this checkout of the repository made it."""
        return self.root == str(paths.ROOT)

    def is_alive(self) -> bool:
        """Tell whether its first process runs, whatever the engine remembers."""
        try:
            # The process may be another's by now: the cgroup tells.
            return self.id in Path(f"/proc/{self.pid}/cgroup").read_text()
        except OSError:
            return False


def topologies() -> list[str]:
    """Return the names of the inventories that the lab can boot; production's are not of them."""
    return sorted(file.parents[2].name for file in paths.INVENTORY.glob("*/group_vars/all/lab.yml"))


def derived(topology: str) -> tuple[str, list[Machine]]:
    """Return the subnet and the machines of a topology, as the Vagrantfile derives them.

    Raises LabError when the inventory is wrong.
    """
    script = paths.ROOT / "lab" / "machines.rb"
    try:
        found = json.loads(
            answer("ruby", str(script), str(paths.INVENTORY / topology / "hosts.yml"))
        )
    except LabError as error:
        # The script's own words are clearer than the command that was run.
        raise LabError(str(error).rpartition("lab: ")[2]) from error
    return found["subnet"], [
        Machine(
            name=machine["name"],
            address=machine["address"],
            memory_mb=machine["memory_mb"],
            cpus=machine["cpus"],
            os=machine["os"],
            groups=tuple(machine["groups"]),
        )
        for machine in found["machines"]
    ]


def machines(topology: str) -> list[Machine]:
    """Return the machines of a topology. Raises LabError when the inventory is wrong."""
    return derived(topology)[1]


def containers() -> list[Container]:
    """Return every container with the lab's labels, running or not."""
    labels = ("--filter", f"label={LABEL}", "--filter", f"label={ROOT_LABEL}")
    listed = engine("ps", "--all", *labels, "--format", "json")
    return [
        Container(
            id=entry["Id"],
            name=first(entry["Names"], ""),
            topology=entry["Labels"][LABEL],
            root=entry["Labels"][ROOT_LABEL],
            state=entry["State"],
            pid=entry["Pid"],
        )
        for entry in json.loads(listed or "[]")
    ]


def prepare(topology: str) -> None:
    """Make the network, and put right what an interrupted run left of hosts and records.

    Raises LabError when another checkout's lab holds the addresses, or the network cannot be made.
    """
    subnet, wanted = derived(topology)
    # First, since the addresses of a host that is removed are given back to its network.
    if _network_settings() is None:
        _create_network(topology, subnet)
    found = containers()
    kept = [container for container in found if _keep(container, topology, wanted)]
    _forget_lost(wanted, kept)
    _tell_changes(wanted, kept)
    _renew_network(topology, subnet)


def destroy() -> None:
    """Remove every container of this checkout, Vagrant's records of them, and the network."""
    mine = [container for container in containers() if container.is_ours()]
    _remove(mine)
    for record in paths.VAGRANT_MACHINES.glob("*/docker"):
        _forget(record)
    if _network_settings() and not _attached():
        engine("network", "rm", NETWORK)


def _keep(container: Container, topology: str, wanted: Sequence[Machine]) -> bool:
    """Tell whether a container may stay. One that may not is removed."""
    if not container.is_ours():
        in_use = container.state in STARTABLE or container.is_alive()
        if in_use and (Path(container.root) / "Vagrantfile").exists():
            raise LabError(
                f"the lab of {container.root} holds the addresses: its host {container.name} "
                f"exists. Destroy it first: make -C {container.root} lab-destroy"
            )
        _tell("a host of another checkout, gone or killed", container)
        _remove([container])
        return False
    if container.topology != topology:
        raise LabError(
            f"the topology {container.topology} is up, and both use the same network. "
            f"Destroy it first: make lab-destroy"
        )
    names = {_container_name(topology, machine.name): machine.name for machine in wanted}
    if container.name not in names:
        _tell("a host that the inventory no longer has", container)
        _remove([container])
        return False
    if _recorded(names[container.name]) != container.id:
        _tell("a host that Vagrant has no record of", container)
        _remove([container])
        return False
    if container.state not in STARTABLE and not container.is_alive():
        # Its monitor died with it, so the engine will never learn how it ended, nor start it again.
        _tell("a host whose processes were killed", container)
        _remove([container])
        return False
    return True


def _container_name(topology: str, machine: str) -> str:
    return f"iot-{topology}-{machine}"


def _recorded(machine: str) -> str | None:
    """Return the container that Vagrant takes for a machine."""
    try:
        return (paths.VAGRANT_MACHINES / machine / "docker" / "id").read_text().strip()
    except FileNotFoundError:
        return None


def _forget_lost(wanted: Sequence[Machine], kept: Sequence[Container]) -> None:
    """Remove Vagrant's records of containers that do not exist (any more)."""
    existing = {container.id for container in kept}
    for machine in wanted:
        recorded = _recorded(machine.name)
        if recorded is not None and recorded not in existing:
            say(f"    {machine.name}: Vagrant's record of a host that is gone was removed")
            _forget(paths.VAGRANT_MACHINES / machine.name / "docker")


def _forget(record: Path) -> None:
    """Empty the folder of Vagrant's record; a running Vagrant wants the folder itself."""
    for file in record.iterdir():
        file.unlink()


def _tell_changes(wanted: Sequence[Machine], kept: Sequence[Container]) -> None:
    """Say which hosts are not what the inventory says by now: Vagrant changes none that exists."""
    if not kept:
        return
    described = json.loads(engine("inspect", *(container.id for container in kept)))
    by_name = {entry["Name"].lstrip("/"): entry for entry in described}
    for machine in wanted:
        entry = first([by_name[name] for name in by_name if name.endswith(f"-{machine.name}")])
        if entry and _settings(entry) != (machine.address, machine.memory_mb, machine.cpus):
            say(
                f"    {machine.name} was made with other settings than the inventory's; "
                f"to make it anew: vagrant destroy --force {machine.name}, then make lab"
            )


def _settings(entry: dict[str, Any]) -> tuple[str, int, int]:
    network = entry["NetworkSettings"]["Networks"].get(NETWORK, {})
    configured = network.get("IPAMConfig") or {}
    limits = entry["HostConfig"]
    return (
        # A stopped container has its address in the configuration alone.
        network.get("IPAddress") or configured.get("IPv4Address", ""),
        limits["Memory"] // 2**20,
        limits["NanoCpus"] // 10**9,
    )


def _renew_network(topology: str, subnet: str) -> None:
    """Make the network anew if it is not as it should be, or nothing is on it."""
    settings = _network_settings() or {}
    if _attached():
        if [entry["subnet"] for entry in settings["subnets"]] != [subnet]:
            raise LabError(
                f"the network {NETWORK} is not {subnet}; destroy its hosts first: make lab-destroy"
            )
        return
    engine("network", "rm", NETWORK)
    _create_network(topology, subnet)


def _create_network(topology: str, subnet: str) -> None:
    _remove_bridge(subnet)
    create = ["network", "create", "--subnet", subnet, "--disable-dns"]
    try:
        engine(*create, "--label", f"{LABEL}={topology}", NETWORK)
    except LabError as error:
        holder = first(_interfaces(subnet))
        raise LabError(
            f"cannot make the network {NETWORK}, {subnet}"
            + (f": the interface {holder} has an address in it" if holder else "")
            + f"\n{error}"
        ) from error


def _network_settings() -> dict[str, Any] | None:
    found: Sequence[dict[str, Any]] = [entry for entry in _networks() if entry["name"] == NETWORK]
    return found[0] if found else None


def _networks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(engine("network", "ls", "--format", "json") or "[]")
    return found


def _attached() -> bool:
    return bool(engine("ps", "--all", "--quiet", "--filter", f"network={NETWORK}"))


def _interfaces(subnet: str) -> list[str]:
    """Return the network interfaces of this machine that have an address in a subnet."""
    routes = json.loads(answer("ip", "-json", "route", "show", subnet) or "[]")
    return [route["dev"] for route in routes]


def _remove_bridge(subnet: str) -> None:
    """Remove the engine's bridge of a network that the engine has forgotten."""
    known = {entry["network_interface"] for entry in _networks()}
    for interface in _interfaces(subnet):
        if re.fullmatch(r"podman\d+", interface) and interface not in known:
            say(f"    {interface}: the bridge of a network that is gone was removed")
            answer(*root_command("ip", "link", "delete", interface))


def _tell(what: str, container: Container) -> None:
    say(f"    {container.name}: {what} was removed")


def _remove(found: Sequence[Container]) -> None:
    if found:
        command = ("rm", "--force", "--ignore", "--time", "2", "--volumes")
        # One that ends by itself just then cannot be stopped, and can be removed once it has ended.
        retried(2, lambda: engine(*command, *(entry.id for entry in found)), pause=1.0)


def vagrant(*arguments: str) -> list[str]:
    """Return the command that runs Vagrant on what is already prepared."""
    return ["env", "IOT_LAB_PREPARED=1", "VAGRANT_CHECKPOINT_DISABLE=1", "vagrant", *arguments]


def in_containers() -> bool:
    """Tell whether the hosts are containers here, and not another provider's machines."""
    return os.environ.get("VAGRANT_DEFAULT_PROVIDER", "docker") == "docker"


def has_other_machines() -> bool:
    """Tell whether Vagrant has records of machines that are no containers."""
    records = paths.VAGRANT_MACHINES.glob("*/*/id")
    return any(record.parent.name != "docker" for record in records)
