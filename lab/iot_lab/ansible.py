"""How the lab runs Ansible: with mitogen's strategies, in half the processor's time.

Hosts and control host share the cores of one machine here. What is proved of the roles is proved
with Ansible's own strategies as well, which are what operators have: tests/run says where.
"""

from __future__ import annotations

import os

from iot_lab import paths
from iot_lab.shell import LabError


def settings() -> dict[str, str]:
    """Return the environment variables, beside what the caller's own environment says.

    Raises LabError where the tools are not installed.
    """
    found = sorted(paths.TOOLS.glob("lib/python3*/site-packages/ansible_mitogen/plugins/strategy"))
    if not found:
        raise LabError("the tools are not installed; run: lab/bin/lab setup")
    return {
        "ANSIBLE_CONFIG": str(paths.ROOT / "ansible" / "ansible.cfg"),
        "ANSIBLE_STRATEGY": "mitogen_linear",
        "ANSIBLE_FREE_STRATEGY": "mitogen_free",
        "ANSIBLE_STRATEGY_PLUGINS": str(found[-1]),
        # Mitogen asks for no host keys, and the lab's change with its hosts.
        "ANSIBLE_HOST_KEY_CHECKING": "false",
        # Ansible says of each play that it will load no other strategies than its own one day.
        "ANSIBLE_DEPRECATION_WARNINGS": "false",
    }


def environment() -> dict[str, str]:
    """Return the whole environment of an Ansible of the lab: what the caller's says, wins."""
    found = settings()
    return {**found, **os.environ, "ANSIBLE_CONFIG": found["ANSIBLE_CONFIG"]}
