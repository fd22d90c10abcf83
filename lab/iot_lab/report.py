"""What `lab status` and `lab report` print. Everything is asked of the hosts, nothing assumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iot_lab import remote
from iot_lab.console import Colour, duration, paint, table
from iot_lab.hosts import Machine
from iot_lab.shell import LabError

HERE = Path(__file__).parent
RELEASE_PYTHON = "/opt/iot-pipeline/current/bin/python"


@dataclass(frozen=True)
class Service:
    """A unit as systemd describes it."""

    name: str
    state: str  # ActiveState, or "activating (auto-restart)" where the sub-state says more
    since: float | None  # seconds
    restarts: int

    @property
    def is_running(self) -> bool:
        """Whether it does its work."""
        return self.state == "active"


@dataclass(frozen=True)
class Host:
    """A host, and how it answered."""

    machine: Machine
    error: str = ""
    system: str = ""
    up: float = 0.0  # seconds
    memory_mb: int = 0
    services: Sequence[Service] = ()


@dataclass(frozen=True)
class Pipeline:
    """What went through the pipeline: the topics, and the audit's figures."""

    topics: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    errors: Sequence[str] = ()


def look_at_hosts(machines: Sequence[Machine]) -> list[Host]:
    """Ask every host how it is, all at once."""
    return list(remote.everywhere(machines, _look_at).values())


def look_at_pipeline(machines: Sequence[Machine]) -> Pipeline:
    """Ask a storage host for the topics and the audit."""
    errors = []
    found: list[Mapping[str, Any]] = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for asked in [pool.submit(look, machines) for look in (_topics, audit)]:
            try:
                found.append(asked.result())
            except LabError as error:
                errors.append(str(error))
                found.append({})
    return Pipeline(topics=found[0], audit=found[1], errors=errors)


def audit(machines: Sequence[Machine]) -> dict[str, Any]:
    """Return what the audit finds. Raises LabError when it does not answer."""
    return _ask_storage(machines, "audit", "sudo iot-pipeline audit --json")


def _topics(machines: Sequence[Machine]) -> dict[str, Any]:
    script = (HERE / "probe_topics.py").read_text()
    return _ask_storage(machines, "topics", f"sudo {RELEASE_PYTHON} -", script)


def _ask_storage(
    machines: Sequence[Machine], what: str, words: str, script: str | None = None
) -> dict[str, Any]:
    storage = auditor(machines)
    if storage is None:
        raise LabError("no host is in the group storage_nodes")
    done = remote.run(storage, words, script=script, timeout=300)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.strip().splitlines() or ["no answer"]
        raise LabError(f"{what}: {said[-1]}") from error
    return answer


def auditor(machines: Sequence[Machine]) -> Machine | None:
    """Return the machine that the audit runs on: of those that store, the first that answers.

    It is the first one where none does, whose silence then tells why.
    """
    storage = [machine for machine in machines if "storage_nodes" in machine.groups]
    if len(storage) < 2:
        return next(iter(storage), None)
    answers = remote.everywhere(storage, lambda machine: remote.run(machine, "true", timeout=10))
    answering = [machine for machine in storage if answers[machine.name].returncode == 0]
    return (answering or storage)[0]


def parse_host(machine: Machine, text: str) -> Host:
    """Read what probe_host.sh printed. Raises ValueError when that is no such text."""
    head, found, units = text.partition("\nunits\n")
    if not found:
        raise ValueError("unexpected answer")
    facts = dict(line.split(" ", 1) for line in head.splitlines())
    return Host(
        machine=machine,
        system=facts["system"].replace(" GNU/Linux", ""),
        up=float(facts["up"]),
        memory_mb=int(facts["memory"]) // 2**20,
        services=_parse_units(units, int(facts["now"])),
    )


def is_healthy(hosts: Sequence[Host]) -> bool:
    """Tell whether every host answers and every service on it runs."""
    return all(
        not host.error and all(service.is_running for service in host.services) for host in hosts
    )


def render_hosts(topology: str, hosts: Sequence[Host], *, coloured: bool) -> str:
    """Return the tables of hosts and services."""
    services = [(host, service) for host in hosts for service in host.services]
    down = sum(bool(host.error) for host in hosts)
    stopped = sum(not service.is_running for _, service in services)
    verdict = (
        f"{len(hosts)} hosts and {len(services)} services, all running"
        if not down and not stopped
        else f"{down} of {len(hosts)} hosts down, {stopped} of {len(services)} services not running"
    )
    healthy = is_healthy(hosts)
    colour = Colour.GOOD if healthy else Colour.BAD
    title = paint(f"Lab {topology}", Colour.TITLE, coloured=coloured)
    parts = [
        f"{title}: {paint(verdict, colour, coloured=coloured)}",
        table(
            ["HOST", "ADDRESS", "SYSTEM", "CPUS", "MEMORY", "UP"],
            [_host_row(host) for host in hosts],
            right=[3, 4],
        ),
    ]
    parts += [
        paint(f"  {host.machine.name}: {host.error}", Colour.BAD, coloured=coloured)
        for host in hosts
        if host.error
    ]
    if services:
        rows = [_service_row(host, service) for host, service in services]
        parts.append(table(["SERVICE", "HOST", "STATE", "FOR", "RESTARTS"], rows, right=[4]))
    return "\n\n".join(parts)


def render_pipeline(pipeline: Pipeline, *, coloured: bool) -> str:
    """Return the table of topics and what became of the images."""
    parts = []
    if pipeline.topics:
        rows = [
            [name, str(topic["partitions"]), f"{topic['records']:,}"]
            for name, topic in pipeline.topics.items()
        ]
        parts.append(table(["TOPIC", "PARTITIONS", "RECORDS"], rows, right=[1, 2]))
    if pipeline.audit:
        parts.append(_images(pipeline.audit, coloured=coloured))
    parts += [paint(f"  {error}", Colour.BAD, coloured=coloured) for error in pipeline.errors]
    return "\n\n".join(parts)


def render_hints() -> str:
    """Return what a person can do next."""
    hints = [
        ("make audit", "is every image stored and predicted, once?"),
        ("make lab-status", "hosts and services"),
        ("make lab-ssh HOST=inference", "a shell there; then: journalctl -fu iot-inference"),
        ("make lab-destroy", "remove the hosts and their network"),
    ]
    width = max(len(command) for command, _ in hints)
    return "Look further\n" + "\n".join(
        f"  {command.ljust(width)}   {meaning}" for command, meaning in hints
    )


def _look_at(machine: Machine) -> Host:
    script = (HERE / "probe_host.sh").read_text()
    done = remote.run(machine, "sudo sh", script=script, timeout=30)
    try:
        return parse_host(machine, done.stdout)
    except (ValueError, KeyError):
        said = done.stderr.strip().splitlines() or ["unexpected answer"]
        return Host(machine=machine, error=said[-1])


def _parse_units(text: str, now: int) -> list[Service]:
    services = []
    for block in text.strip().split("\n\n"):
        unit = dict(line.split("=", 1) for line in block.splitlines())
        if unit["LoadState"] != "loaded":
            continue
        since = unit["ActiveEnterTimestamp"].removeprefix("@")
        state = unit["ActiveState"]
        services.append(
            Service(
                name=unit["Id"].removesuffix(".service"),
                state=state if state == "active" else f"{state} ({unit['SubState']})",
                since=now - int(since) if since and state == "active" else None,
                restarts=int(unit["NRestarts"]),
            )
        )
    return services


def _host_row(host: Host) -> list[str]:
    machine = host.machine
    if host.error:
        return [machine.name, machine.address, "down", "", "", ""]
    memory = f"{host.memory_mb} of {machine.memory_mb} MB"
    up = duration(host.up)
    return [machine.name, machine.address, host.system, str(machine.cpus), memory, up]


def _service_row(host: Host, service: Service) -> list[str]:
    since = "" if service.since is None else duration(service.since)
    state = "running" if service.is_running else service.state
    return [service.name, host.machine.name, state, since, str(service.restarts)]


def _images(audit: Mapping[str, Any], *, coloured: bool) -> str:
    # A release from before they were counted knows none that Kafka deleted unread.
    lost = audit["missing"] + audit.get("lost", 0) + audit["duplicated"]
    verdict = "none missing, none twice" if not lost else "see make audit"
    counts = [
        ("produced", audit["produced"]),
        ("stored", audit["stored"]),
        ("predicted", audit["predicted"]),
        ("on their way", audit["pending"]),
        ("missing", audit["missing"]),
        ("duplicated", audit["duplicated"]),
        # A release from before they could be handled knows all of them alone.
        ("dead letters", audit.get("open_dead_letters", audit["dead_lettered"])),
    ]
    lines = [table(["IMAGES", ""], [[name, f"{number:,}"] for name, number in counts], right=[1])]
    lines.append(f"  {paint(verdict, Colour.BAD if lost else Colour.GOOD, coloured=coloured)}")
    if audit["accuracy"] is not None:
        lines.append(f"  Accuracy so far: {audit['accuracy']:.1%}")
    if audit.get("latency_p95") is not None:
        p50, p95 = audit["latency_p50"], audit["latency_p95"]
        lines.append(
            f"  From produced to stored with its prediction: half within {p50:.2f} s, "
            f"95 % within {p95:.2f} s"
        )
    return "\n".join(lines)
