"""What can be done to hosts, and how it is undone, even when a drill fails or is cut off.

Everything happens inside the lab's own hosts: this machine's clock, network and disks are left
alone. What lasts is undone by the host itself, too, should nobody come back to undo it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from iot_lab import ansible, hosts, paths, remote, report
from iot_lab.drills.drill import FOLDER, Step
from iot_lab.hosts import Machine
from iot_lab.shell import LabError, engine, shown

GRACE = 120  # seconds after which a host undoes by itself what should have been undone
VOLUME = "/run/iot-drill-volume"
DATA = {
    "kafka.service": "/var/lib/kafka",
    "couchdb.service": "/var/lib/couchdb",
    "mongod.service": "/var/lib/mongodb",
}
ROOM_MB = 48  # free on the small volume, beside a quarter of it
PATIENCE = 300.0  # seconds that the lab has to be whole again


Place = tuple[str, int, int]
"""Topic, partition and offset of a record."""


class Lab:
    """The running lab of a topology, as drills need it."""

    def __init__(self, topology: str) -> None:
        self.topology = topology
        self.machines = hosts.machines(topology)
        self.start_load: Callable[[], None] = lambda: None
        """Have the producers send as fast as the drill wants it; hosts that are new do not."""
        self.sent: set[Place] = set()
        """Where the records are that were sent to become dead letters."""
        self.look()

    def look(self) -> None:
        """Find the hosts' containers. Raises LabError where one is missing."""
        self._containers = {
            container.name.removeprefix(f"iot-{self.topology}-"): container
            for container in hosts.containers()
            if container.is_ours() and container.topology == self.topology
        }
        missing = {machine.name for machine in self.machines} - set(self._containers)
        if missing:
            raise LabError(
                f"drills need a lab in containers, and {', '.join(sorted(missing))} is none of "
                f"this checkout's: TOPOLOGY={self.topology} make lab"
            )

    def container(self, machine: Machine) -> str:
        """Return the id of a host's container."""
        return self._containers[machine.name].id

    def named(self, names: Sequence[str]) -> list[Machine]:
        """Return the machines of these groups and names. Raises LabError when there are none."""
        found = [m for m in self.machines if {"all", m.name, *m.groups} & set(names)]
        if not found:
            raise LabError(f"no host is {' or '.join(names)}, or in such a group")
        return found


def on_host(machine: Machine, script: str, timeout: float = 120) -> str:
    """Run a shell script as root and return what it prints. Raises LabError when it fails."""
    done = remote.run(machine, "sudo bash -es", script=script, timeout=timeout)
    if done.returncode:
        raise LabError(f"{machine.name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def everywhere(machines: Sequence[Machine], script: str) -> None:
    """Run a shell script as root on several hosts at the same time. Raises LabError."""
    remote.everywhere(machines, lambda machine: on_host(machine, script))


def _undone_after(seconds: float, undo: str) -> str:
    """Return the shell line by which a host undoes it by itself."""
    timer = "iot-drill-undo"
    return (
        f"systemctl stop {timer}.timer 2>/dev/null || true\n"
        f"systemd-run --quiet --on-active={seconds + GRACE:.0f} --unit={timer} "
        f"bash -c {shlex.quote(undo)}\n"
    )


@contextmanager
def _for_a_while(machines: Sequence[Machine], do: str, undo: str, seconds: float) -> Iterator[None]:
    try:
        everywhere(machines, _undone_after(seconds, undo) + do)
        yield
    finally:
        everywhere(machines, f"systemctl stop iot-drill-undo.timer 2>/dev/null || true\n{undo}")


@contextmanager
def kill(lab: Lab, machines: Sequence[Machine], step: Step) -> Iterator[None]:
    """SIGKILL a service. systemd starts it again."""
    everywhere(machines, f"systemctl kill --signal=SIGKILL {step.argument}")
    yield


def stop(lab: Lab, machines: Sequence[Machine], step: Step) -> AbstractContextManager[None]:
    """Stop a service, and start it again."""
    unit = step.argument
    return _for_a_while(machines, f"systemctl stop {unit}", f"systemctl start {unit}", step.seconds)


def freeze(lab: Lab, machines: Sequence[Machine], step: Step) -> AbstractContextManager[None]:
    """SIGSTOP a service, and let it go on. systemd may have restarted it meanwhile."""
    signal = f"systemctl kill --signal=%s {step.argument}"
    return _for_a_while(machines, signal % "SIGSTOP", signal % "SIGCONT", step.seconds)


@contextmanager
def power_off(lab: Lab, machines: Sequence[Machine], step: Step) -> Iterator[None]:
    """Take a host's power, and give it back."""
    containers = [lab.container(machine) for machine in machines]
    try:
        for container in containers:
            engine("kill", "--signal=KILL", container)
        yield
    finally:
        for number, (machine, container) in enumerate(zip(machines, containers, strict=True)):
            if number:
                time.sleep(step.apart)
            # The engine takes a moment to notice that it is off.
            until = time.monotonic() + 20
            while engine("inspect", "--format={{.State.Running}}", container) == "true":
                if time.monotonic() > until:
                    raise LabError(f"{machine.name} does not go off")
                time.sleep(0.2)
            engine("start", container)
        # A host forgets at its end how fast it was told to send.
        producers = [machine for machine in machines if "producers" in machine.groups]
        for machine in producers:
            _until_reachable(machine)
        if producers:
            lab.start_load()


def _until_reachable(machine: Machine) -> None:
    """Wait until a host that was started answers. Raises LabError when it does not."""
    until = time.monotonic() + 60
    while remote.run(machine, "true").returncode:
        if time.monotonic() > until:
            raise LabError(f"{machine.name} does not come back")
        time.sleep(0.5)


def cut_off(lab: Lab, machines: Sequence[Machine], step: Step) -> AbstractContextManager[None]:
    """Let a host hear nobody of these groups, and nobody of them hear it."""
    others = [m.address for m in lab.named(step.argument)]
    table = "inet iot_drill"
    do = f"""
        nft add table {table}
        for way in input output; do
            nft add chain {table} $way "{{ type filter hook $way priority -300; }}"
        done
        here=$(hostname -I)
        for other in {" ".join(others)}; do
            case " $here " in *" $other "*) continue ;; esac
            nft add rule {table} input ip saddr $other drop
            nft add rule {table} output ip daddr $other drop
        done
    """
    undo = f"nft delete table {table} 2>/dev/null || true"
    return _for_a_while(machines, f"{undo}\n{do}", undo, step.seconds)


@contextmanager
def small_disk(lab: Lab, machines: Sequence[Machine], step: Step) -> Iterator[None]:
    """Move a service's data to a small volume, and back."""
    unit = step.argument
    data = DATA[unit]
    begin = f"""
        mkdir -p {VOLUME}
        mount -t tmpfs -o size=%dm iot-drill {VOLUME}
        cp -a --sparse=always {data}/. {VOLUME}/
        chown --reference={data} {VOLUME}; chmod --reference={data} {VOLUME}
        mount --bind {VOLUME} {data}
        systemctl start {unit}
    """
    end = f"""
        if mountpoint -q {data}; then
            rm -f {data}/.drill-filler
            systemctl stop {unit}
            umount {data}
            find {data} -mindepth 1 -delete
            cp -a --sparse=always {VOLUME}/. {data}/
        fi
        if mountpoint -q {VOLUME}; then umount {VOLUME}; rmdir {VOLUME}; fi
        systemctl start {unit}
    """
    try:
        for machine in machines:
            # Once it is stopped, since Kafka writes its archive of classes then. Not so small that
            # health calls it full before it is.
            used = on_host(machine, f"systemctl stop {unit}\ndu -sm {data} | cut -f1")
            size = int(used) * 4 // 3 + ROOM_MB
            # What the volume holds counts as the host's memory.
            _allow_memory(lab, machine, machine.memory_mb + size)
            on_host(machine, begin % size, timeout=300)
        yield
    finally:
        for machine in machines:
            on_host(machine, end, timeout=300)
            _allow_memory(lab, machine, machine.memory_mb)


def _allow_memory(lab: Lab, machine: Machine, megabytes: int) -> None:
    words = ("update", f"--memory={megabytes}m", f"--memory-swap={2 * megabytes}m")
    engine(*words, lab.container(machine))


def fill(lab: Lab, machines: Sequence[Machine], step: Step) -> AbstractContextManager[None]:
    """Fill the small volume of a service's data, and free it."""
    filler = f"{DATA[step.argument]}/.drill-filler"
    # Until nothing is left, also of what the service frees meanwhile.
    do = f"""
        cat /dev/zero > {filler} 2>/dev/null || true
        test "$(df --output=avail {DATA[step.argument]} | tail -n 1)" -eq 0
    """
    return _for_a_while(machines, do, f"rm -f {filler}", step.seconds)


@contextmanager
def play(lab: Lab, machines: Sequence[Machine], step: Step) -> Iterator[None]:
    """Run playbooks, with the variables and the additional inventory of the step."""
    argument: Mapping[str, Any] = step.argument
    extra = argument.get("inventory")
    _playbooks(
        lab,
        *(("--inventory", str(FOLDER / extra)) if extra else ()),
        *("--extra-vars", json.dumps(argument.get("variables", {}))),
        *(("--limit", argument["limit"]) if "limit" in argument else ()),
        *argument["playbooks"],
    )
    yield


def _playbooks(lab: Lab, *words: str) -> None:
    """Run playbooks, named from the repository's folder. Raises LabError when one fails."""
    inventory = str(paths.INVENTORY / lab.topology)
    files = (str(paths.ROOT / word) if word.endswith(".yml") else word for word in words)
    _logged([str(paths.TOOLS / "bin" / "ansible-playbook"), "--inventory", inventory, *files])


def _logged(command: Sequence[str]) -> None:
    """Run a program, with what it says in a log. Raises LabError with its end when it fails."""
    log = paths.LOGS / "drill.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(
            # A control host is elsewhere. Here it shares its cores with hosts that are all busy.
            ["nice", "-n", "-5", *command],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=paths.ROOT / "ansible",
            env=ansible.environment(),
        )
    if done.returncode:
        end = "\n".join(log.read_text().splitlines()[-30:])
        raise LabError(f"{shlex.join(command)} failed; at the end of {shown(log)}:\n{end}")


@contextmanager
def rebuild(lab: Lab, machines: Sequence[Machine], step: Step) -> Iterator[None]:
    """Back up, lose all hosts, build the lab anew, and restore.

    The producers stop before the backup: what the brokers alone have is lost with them.
    """
    everywhere(lab.named(["producers"]), "systemctl stop iot-producer")
    _until_all_is_stored(lab)
    backups = paths.STATE / "drill" / "backups" / lab.topology
    words = ("--extra-vars", json.dumps({"backup_dir": str(backups), "backup_keep": 1}))
    _playbooks(lab, *words, "ansible/playbooks/backup.yml")
    program = str(paths.ROOT / "lab" / "bin" / "lab")
    _logged([program, "destroy"])
    _logged([program, "up", "--topology", lab.topology])
    lab.look()
    newest = {"backup": str(max(backups.glob("*.zst"))), "restore_confirm": True}
    _playbooks(lab, "--extra-vars", json.dumps(newest), "ansible/playbooks/restore.yml")
    lab.start_load()
    yield


@contextmanager
def send(lab: Lab, machines: Sequence[Machine], step: Step) -> Iterator[None]:
    """Run a script of tests/drills/on_host with the apps' Python, as root.

    It prints where the records are that it has sent, as a list of topic, partition and offset.
    """
    script = (FOLDER / "on_host" / step.argument["script"]).read_text()
    words = ["sudo", report.RELEASE_PYTHON, "-", *map(str, step.argument.get("arguments", []))]
    for machine in machines:
        done = remote.run(machine, shlex.join(words), script=script, timeout=900)
        if done.returncode:
            raise LabError(f"{machine.name}: {done.stderr.strip()[-2000:]}")
        lab.sent |= {
            (topic, partition, offset) for topic, partition, offset in json.loads(done.stdout)
        }
    yield


def _until_all_is_stored(lab: Lab) -> None:
    """Wait until nothing is on its way. Raises LabError when that takes too long."""
    ends = time.monotonic() + PATIENCE
    while True:
        seen = report.audit(lab.machines)
        if not seen["pending"] and not seen["missing"]:
            return
        if time.monotonic() > ends:
            raise LabError(f"not all is stored and predicted within {PATIENCE:.0f} s: {seen}")
        time.sleep(1)


Fault = Callable[[Lab, Sequence[Machine], Step], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {
    "kill": kill,
    "stop": stop,
    "freeze": freeze,
    "power_off": power_off,
    "cut_off": cut_off,
    "fill": fill,
    "play": play,
    "send": send,
    "rebuild": rebuild,
}
AROUND: dict[str, Fault] = {"fill": small_disk}
"""What a fault needs to be there before it begins, and until the hosts work again."""


def undo_leftovers(lab: Lab) -> None:
    """Undo what a drill left that was cut off. Hosts that are off are started."""
    for machine in lab.machines:
        if engine("inspect", "--format={{.State.Running}}", lab.container(machine)) != "true":
            engine("start", lab.container(machine))
