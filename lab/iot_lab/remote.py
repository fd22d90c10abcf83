"""Reaching the hosts: ssh with the lab's key, to the inventory's addresses."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from iot_lab import paths
from iot_lab.hosts import Machine

USER = "vagrant"
# Hosts are made anew under the same addresses, so their host keys change.
OPTIONS = (
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", "-o", "IdentitiesOnly=yes"),
)

Answer = TypeVar("Answer")


def command(machine: Machine, *words: str, terminal: bool = False) -> list[str]:
    """Return the ssh command that runs words on a machine, or a shell without any."""
    options = [*OPTIONS, "-i", str(paths.SSH_KEY), *(["-t"] if terminal else [])]
    return ["ssh", *options, f"{USER}@{machine.address}", *words]


def run(
    machine: Machine, *words: str, script: str | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run words on a machine, with a script on their standard input if one is given.

    `timeout` is in seconds; a machine that takes longer ends with status 255, as ssh's own
    failures do.
    """
    try:
        return subprocess.run(
            command(machine, *words),
            check=False,
            capture_output=True,
            text=True,
            input=script or "",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        said = f"no answer within {timeout:.0f} s"
        return subprocess.CompletedProcess(error.cmd, 255, stdout="", stderr=said)


def everywhere(machines: Sequence[Machine], ask: Callable[[Machine], Answer]) -> dict[str, Answer]:
    """Ask all machines at once. Returns the answers by the machines' names, in their order."""
    with ThreadPoolExecutor(max_workers=max(1, len(machines))) as pool:
        answers = pool.map(ask, machines)
        return {machine.name: got for machine, got in zip(machines, answers, strict=True)}
