"""What `ansible/health` says of the running topology. That it names faults, the drills see."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# What other tests leave, and what a host that works hard may show for a while.
PASSING = {"dead-letters", "consumer-lag", "audit-stale"}


@pytest.fixture(scope="module")
def answer(pytestconfig: pytest.Config) -> tuple[int, dict[str, Any]]:
    inventory = pytestconfig.getoption("ansible_inventory") or str(ROOT / "inventory/couchdb")
    done = subprocess.run(
        [
            *(str(ROOT / "ansible/health"), "--json", f"--inventory={inventory}"),
            *(f"--extra-vars={given}" for given in pytestconfig.getoption("extra_vars")),
        ],
        env=os.environ
        | {
            "ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def _found(report: dict[str, Any]) -> set[str]:
    """Names of what is wrong."""
    return {finding["name"] for finding in report["findings"]}


def test_nothing_is_wrong(answer: tuple[int, dict[str, Any]]) -> None:
    status, report = answer
    assert _found(report) <= PASSING, report["findings"]
    assert status == {"ok": 0, "warning": 1}[report["status"]]


def test_everybody_was_asked(answer: tuple[int, dict[str, Any]], topology: Any) -> None:
    _, report = answer
    for name, node in topology.nodes.items():
        units = {each["unit"] for each in report["hosts"][name]["services"]}
        assert units == {f"{unit}.service" for unit in node.units}
    groups = {group for node in topology.nodes.values() for group in node.groups}
    brokers = {n for n, node in topology.nodes.items() if "kafka_brokers" in node.groups}
    assert {broker["host"] for broker in report["kafka"]["brokers"]} == brokers
    readers = {"inference_nodes": "iot-inference", "storage_nodes": "iot-storage"}
    expected = {name for group, name in readers.items() if group in groups}
    assert {group["name"] for group in report["kafka"]["groups"]} == expected
    # A busy host may not have counted them in time, and then that is what health finds.
    counted = report["dead_letters"] is not None
    assert counted or "storage_nodes" not in groups or "dead-letters" in _found(report)
