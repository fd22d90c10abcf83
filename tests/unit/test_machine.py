"""Whether a machine can run the lab's hosts is judged from its facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from iot_lab import up
from iot_lab.machine import Facts, available_memory_mb, capabilities, cgroups, gather, judge
from iot_lab.shell import LabError

GOOD = Facts(
    is_root=True,
    has_sudo=False,
    has_apt=True,
    capabilities=0x1FFFFFFFFFF,
    controllers=frozenset({"cpu", "memory", "pids"}),
    cgroups_writable=True,
    can_mount=True,
    memory_free_mb=8000,
    disk_free_mb=20000,
)

HYBRID = """\
tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
/dev/vda / ext4 rw 0 0
"""
UNIFIED = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n"
IN_A_CONTAINER = "cgroup2 /sys/fs/cgroup cgroup2 ro,nosuid,nodev,noexec,relatime 0 0\n"


def test_a_good_machine_has_no_problems() -> None:
    assert judge(GOOD, 4000) == []


def test_sudo_is_as_good_as_root() -> None:
    assert judge(replace(GOOD, is_root=False, has_sudo=True, can_mount=None), 4000) == []


@pytest.mark.parametrize(
    "change,expected",
    [
        ({"is_root": False}, "you are not root, and sudo is not installed"),
        ({"has_apt": False}, "apt-get is missing"),
        ({"capabilities": 0xA80425FB}, "root here lacks CAP_NET_ADMIN, CAP_SYS_ADMIN"),
        ({"can_mount": False}, "cannot make mount and network namespaces"),
        ({"controllers": frozenset({"cpu", "pids"})}, "no cgroup controller for memory"),
        ({"controllers": frozenset()}, "no cgroup controller for cpu, memory, pids"),
        ({"cgroups_writable": False}, "/sys/fs/cgroup is read-only"),
        ({"memory_free_mb": 2999}, "2999 MB of memory are free, the hosts need 3000 MB"),
        ({"disk_free_mb": 5999}, "5999 MB of disk are free, the lab needs 6000 MB"),
    ],
)
def test_each_problem_is_named_with_what_helps(change: dict[str, object], expected: str) -> None:
    (problem,) = judge(replace(GOOD, **change), 4000)  # type: ignore[arg-type] # by field

    assert expected in problem.what
    assert problem.help


def test_a_nested_container_hears_of_everything_it_lacks() -> None:
    facts = replace(
        GOOD, capabilities=0xA80425FB, can_mount=False, cgroups_writable=False, memory_free_mb=100
    )

    assert len(judge(facts, 4000)) == 3


def test_check_points_to_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAGRANT_DEFAULT_PROVIDER", raising=False)
    monkeypatch.setattr("iot_lab.machine.gather", lambda: replace(GOOD, controllers=frozenset()))

    with pytest.raises(LabError, match="make demo") as raised:
        up.check("couchdb")

    assert "no cgroup controller for cpu, memory, pids" in str(raised.value)


def test_controllers_of_a_hybrid_machine() -> None:
    assert cgroups(HYBRID, "") == (GOOD.controllers, True)


def test_controllers_of_a_unified_machine() -> None:
    assert cgroups(UNIFIED, "cpuset cpu io memory pids") == (GOOD.controllers, True)


def test_a_tree_without_the_needed_controllers_does_not_count() -> None:
    mounts = HYBRID.replace("unified cgroup2 rw", "unified cgroup2 ro")

    assert cgroups(mounts, "") == (GOOD.controllers, True)


def test_a_read_only_tree_is_seen() -> None:
    assert cgroups(IN_A_CONTAINER, "cpu memory pids") == (GOOD.controllers, False)


def test_facts_are_read_from_the_kernels_texts() -> None:
    assert capabilities("Name:\tsh\nCapBnd:\t000001fffeffffff\n") == 0x1FFFEFFFFFF
    assert available_memory_mb("MemTotal: 9 kB\nMemAvailable:    2097152 kB\n") == 2048


def test_this_machines_own_facts_can_be_gathered() -> None:
    facts = gather()

    assert facts.memory_free_mb > 0
    assert facts.disk_free_mb > 0
