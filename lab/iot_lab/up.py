"""`lab up`: from whatever state the machine is in to hosts that classify images."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from iot_lab import (
    ansible,
    artifacts,
    hosts,
    images,
    machine,
    package_cache,
    paths,
    report,
    setup,
)
from iot_lab.console import Colour, duration, is_coloured, paint, say, step
from iot_lab.shell import LabError, answer, locked

LITTER = (".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ansible", ".cache")
STANDINS = {
    "couchdb_servers": artifacts.couchdb_archive,
    "mongodb_servers": artifacts.mongodb_archive,
}
FIRST_IMAGES = 3
FIRST_IMAGES_TIMEOUT = 180  # seconds; the producer sends one image each 10 s


@dataclass(frozen=True)
class Options:
    """What a lab is made of."""

    topology: str
    official: bool = False  # production's sources of software instead of the lab's
    dataset: Path | None = None  # images that the producer sends instead of its drawings
    profile: bool = False  # Ansible tells how long each task took


def check(topology: str) -> None:
    """Raise LabError, naming every problem, when this machine cannot run the hosts."""
    if not hosts.in_containers():
        return
    memory = 0
    with suppress(LabError):  # Ruby, which reads the inventory, may not be installed yet.
        if not _is_up(topology):
            memory = sum(host.memory_mb for host in hosts.machines(topology))
    problems = machine.judge(machine.gather(), memory)
    if problems:
        listed = "\n".join(f"  - {problem.what}:\n    {problem.help}" for problem in problems)
        raise LabError(
            f"this machine cannot run the lab's hosts:\n{listed}\n"
            "'make demo' runs the same pipeline here as plain processes, without hosts."
        )


def prepare(options: Options, *, with_hosts: bool = True) -> None:
    """Make what the hosts are booted and converged from. Quick when there is nothing to do.

    Without hosts only what Ansible installs is made, for providers whose machines are downloaded.
    """
    with locked("hosts"):
        setup.ssh_key()
        setup.passwords()
        with ThreadPoolExecutor(max_workers=2) as pool:
            archives = None if options.official else pool.submit(_archives, options.topology)
            if with_hosts:
                images.ensure(host.os for host in hosts.machines(options.topology))
            if archives:
                archives.result()
        if with_hosts:
            hosts.prepare(options.topology)


def package_cache_for(options: Options) -> None:
    """Run the package cache for hosts in containers. It needs Ansible and, once, the network."""
    if hosts.in_containers():
        package_cache.ensure(hosts.derived(options.topology)[0])
    else:
        package_cache.stop()


def up(options: Options) -> int:
    """Run the whole way. Returns 0 when the hosts were verified."""
    started = time.monotonic()
    with step("Check this machine"):
        check(options.topology)
    setup.packages("lab")
    check(options.topology)
    with (
        step("Prepare Ansible, the base images, the archives and the network"),
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        tools = pool.submit(setup.environments, "lab")
        prepare(options, with_hosts=hosts.in_containers())
        tools.result()
        package_cache_for(options)
    paths.MOLECULE_HOSTS.unlink(missing_ok=True)
    with step("Boot the hosts (vagrant up)"):
        _run(hosts.vagrant("up", "--no-provision"), options, "vagrant up")
    with step("Converge the hosts (ansible/site.yml)"):
        _playbook(options, "site.yml", *_variables(options))
    machines = hosts.machines(options.topology)
    with step(f"Wait until the first {FIRST_IMAGES} images are through"):
        _first_images(machines)
    with step("Verify (ansible/playbooks/verify.yml)"):
        _playbook(options, "playbooks/verify.yml", *_variables(options))
    say()
    print_report(options.topology)
    say()
    total = duration(time.monotonic() - started)
    say(paint(f"The lab is up after {total}.", Colour.TITLE))
    return 0


def print_report(topology: str) -> bool:
    """Print all there is to know, and return whether all hosts and services run."""
    machines = hosts.machines(topology)
    with ThreadPoolExecutor(max_workers=1) as pool:
        pipeline = pool.submit(report.look_at_pipeline, machines)
        found = report.look_at_hosts(machines)
    coloured = is_coloured()
    say(report.render_hosts(topology, found, coloured=coloured))
    say()
    say(report.render_pipeline(pipeline.result(), coloured=coloured))
    say()
    say(report.render_hints())
    return report.is_healthy(found)


def print_status(topology: str) -> bool:
    """Print hosts and services, and return whether all of them run."""
    found = report.look_at_hosts(hosts.machines(topology))
    say(report.render_hosts(topology, found, coloured=is_coloured()))
    return report.is_healthy(found)


def destroy() -> None:
    """Remove the hosts of this checkout, their network and their secrets. The cache stays.

    The secrets are the hosts' own and worth nothing without them; the next lab makes up new ones.
    """
    with locked("hosts"):
        if hosts.has_other_machines():
            answer(*hosts.vagrant("destroy", "--force"))
        if shutil.which("podman"):
            hosts.destroy()
        package_cache.stop()
        shutil.rmtree(paths.SECRETS, ignore_errors=True)
        paths.MOLECULE_HOSTS.unlink(missing_ok=True)


def clean() -> None:
    """Remove everything that was made in this checkout: hosts, images, tools and downloads."""
    destroy()
    if shutil.which("podman"):
        images.remove()
    for folder in (paths.STATE, paths.VAGRANT_MACHINES.parent, *map(paths.ROOT.joinpath, LITTER)):
        shutil.rmtree(folder, ignore_errors=True)


def _archives(topology: str) -> None:
    groups = {group for host in hosts.machines(topology) for group in host.groups}
    try:
        artifacts.kafka_archive()
        for group in groups & STANDINS.keys():
            STANDINS[group]()
    except artifacts.ArtifactError as error:
        raise LabError(str(error)) from error


def _is_up(topology: str) -> bool:
    running = [entry for entry in hosts.containers() if entry.is_ours() and entry.is_alive()]
    return len(running) == len(hosts.machines(topology))


def _variables(options: Options) -> list[str]:
    extra: list[str] = []
    if options.official:
        extra += ["--extra-vars", f"@{paths.ROOT / 'lab' / 'official.yml'}"]
    if options.dataset:
        extra += ["--extra-vars", json.dumps({"producer_dataset": str(options.dataset)})]
    return extra


def _playbook(options: Options, playbook: str, *extra: str) -> None:
    command = [
        *(str(paths.TOOLS / "bin" / "ansible-playbook"), "--inventory"),
        *(str(paths.INVENTORY / options.topology), *extra, playbook),
    ]
    _run(command, options, f"ansible-playbook {playbook}", folder=paths.ROOT / "ansible")


def _run(command: list[str], options: Options, name: str, folder: Path = paths.ROOT) -> None:
    environment = {**ansible.environment(), "TOPOLOGY": options.topology}
    if options.profile:
        environment["ANSIBLE_CALLBACKS_ENABLED"] = "ansible.posix.profile_tasks"
    if is_coloured():
        environment["ANSIBLE_FORCE_COLOR"] = "true"
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, cwd=folder, env=environment
    )
    if done.returncode != 0:
        raise LabError(f"{name} failed with status {done.returncode}; see above")


def _first_images(machines: list[hosts.Machine]) -> None:
    """Wait until images are stored with their predictions. The verification judges the rest."""
    if not any("storage_nodes" in machine.groups for machine in machines):
        return
    ends = time.monotonic() + FIRST_IMAGES_TIMEOUT
    shown = None
    while time.monotonic() < ends:
        with suppress(LabError):
            audit = report.audit(machines)
            counts = f"{audit['produced']} produced, {audit['stored']} stored, "
            counts += f"{audit['predicted']} predicted"
            if counts != shown:
                say(f"    {counts}")
                shown = counts
            if min(audit["stored"], audit["predicted"]) >= FIRST_IMAGES:
                return
        time.sleep(2)
    raise LabError(
        f"no {FIRST_IMAGES} images came through within {FIRST_IMAGES_TIMEOUT} s "
        f"({shown or 'the audit does not answer'}); look with: make lab-status, make audit"
    )
