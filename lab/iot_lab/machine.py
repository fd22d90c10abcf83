"""Can this machine run the lab's hosts? Gathers facts, and judges them with pure functions."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from iot_lab import paths

# Bits of the capabilities that containers with systemd in them take, see capabilities(7).
NEEDED_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_CHROOT": 18, "CAP_SYS_ADMIN": 21}
NEEDED_CONTROLLERS = frozenset({"cpu", "memory", "pids"})

DISK_MB = 6000  # images, archives, tools and what four hosts install
# A host's limit is more than its services take, and not all of them reach it at once.
MEMORY_SHARE = 0.75


@dataclass(frozen=True)
class Facts:
    """What the judgement needs to know of a machine."""

    is_root: bool
    has_sudo: bool
    has_apt: bool
    capabilities: int  # bounding set, as /proc/self/status shows it
    controllers: frozenset[str]  # of cgroups, that containers can get
    cgroups_writable: bool
    can_mount: bool | None  # None: not tried, since that takes root
    memory_free_mb: int
    disk_free_mb: int


@dataclass(frozen=True)
class Problem:
    """One thing that the machine lacks, and what helps."""

    what: str
    help: str


def judge(facts: Facts, hosts_memory_mb: int) -> list[Problem]:
    """Return what keeps a machine from running hosts of that much memory together; best none."""
    problems = []
    if not facts.is_root and not facts.has_sudo:
        problems.append(Problem("you are not root, and sudo is not installed", "run this as root"))
    if not facts.has_apt:
        problems.append(
            Problem(
                "this is no Debian or Ubuntu: apt-get is missing",
                "the lab installs its tools and builds its hosts with Debian's; use Debian 12 or "
                "later",
            )
        )
    lacking = [
        name for name, bit in NEEDED_CAPABILITIES.items() if not facts.capabilities >> bit & 1
    ]
    if lacking:
        problems.append(
            Problem(
                f"root here lacks {', '.join(lacking)}",
                "this looks like a container; give it those capabilities (or run it privileged), "
                "or use the machine below it",
            )
        )
    elif facts.can_mount is False:
        problems.append(
            Problem(
                "root here cannot make mount and network namespaces",
                "this looks like a container whose seccomp or AppArmor profile forbids it; run it "
                "privileged, or use the machine below it",
            )
        )
    controllers = NEEDED_CONTROLLERS - facts.controllers
    if controllers:
        problems.append(
            Problem(
                f"no cgroup controller for {', '.join(sorted(controllers))}",
                "mount /sys/fs/cgroup with these controllers; a container gets them with "
                "--cgroupns=host and the folder mounted",
            )
        )
    elif not facts.cgroups_writable:
        problems.append(
            Problem(
                "/sys/fs/cgroup is read-only",
                "this looks like a container; mount that folder writable, or use the machine "
                "below it",
            )
        )
    needed = round(hosts_memory_mb * MEMORY_SHARE)
    if facts.memory_free_mb < needed:
        problems.append(
            Problem(
                f"{facts.memory_free_mb} MB of memory are free, the hosts need {needed} MB",
                "end what else uses memory, or lower vm_memory_mb in the inventory",
            )
        )
    if facts.disk_free_mb < DISK_MB:
        problems.append(
            Problem(
                f"{facts.disk_free_mb} MB of disk are free, the lab needs {DISK_MB} MB",
                "free some space",
            )
        )
    return problems


def gather() -> Facts:
    """Return this machine's facts, from /proc, /sys and short trials."""
    is_root = os.geteuid() == 0
    mounts = Path("/proc/self/mounts").read_text()
    controllers, writable = cgroups(mounts, _controllers_of_version_2())
    return Facts(
        is_root=is_root,
        has_sudo=shutil.which("sudo") is not None,
        has_apt=shutil.which("apt-get") is not None,
        capabilities=capabilities(Path("/proc/self/status").read_text()),
        controllers=controllers,
        cgroups_writable=writable,
        can_mount=_can_mount() if is_root else None,
        memory_free_mb=available_memory_mb(Path("/proc/meminfo").read_text()),
        disk_free_mb=min(
            shutil.disk_usage(folder).free // 2**20 for folder in (paths.ROOT, Path("/var/lib"))
        ),
    )


def capabilities(status: str) -> int:
    """Return the bounding set from the text of /proc/self/status."""
    line = next(line for line in status.splitlines() if line.startswith("CapBnd:"))
    return int(line.split()[1], 16)


def available_memory_mb(meminfo: str) -> int:
    """Return what a new program may use, in MB, from the text of /proc/meminfo."""
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) // 1024


def cgroups(mounts: str, of_version_2: str) -> tuple[frozenset[str], bool]:
    """Return the controllers that containers can get, and whether their trees are writable.

    `mounts` is the text of /proc/self/mounts, `of_version_2` that of the unified tree's
    cgroup.controllers. On a hybrid machine each controller is in a tree of version 1 or in the
    unified one.
    """
    found: set[str] = set()
    writable = True
    for line in mounts.splitlines():
        _, _, kind, options, *_ = line.split()
        names = set(options.split(","))
        if kind == "cgroup":
            here = names & NEEDED_CONTROLLERS
        elif kind == "cgroup2":
            here = set(of_version_2.split()) & NEEDED_CONTROLLERS
        else:
            continue
        found |= here
        if here and "ro" in names:
            writable = False
    return frozenset(found), writable


def _controllers_of_version_2() -> str:
    for file in ("/sys/fs/cgroup/cgroup.controllers", "/sys/fs/cgroup/unified/cgroup.controllers"):
        if Path(file).exists():
            return Path(file).read_text()
    return ""


def _can_mount() -> bool:
    done = subprocess.run(
        ["unshare", "--mount", "--net", "mount", "-t", "tmpfs", "none", "/mnt"],
        check=False,
        capture_output=True,
    )
    return done.returncode == 0
