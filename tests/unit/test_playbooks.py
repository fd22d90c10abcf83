"""Plays that decide over others: Ansible runs them, with hosts that are made up."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GROUPS = {
    "kafka_controllers": ["broker"],
    "kafka_brokers": ["broker"],
    "couchdb_servers": ["database"],
    "mongodb_servers": ["documents"],
    "storage_nodes": ["storage-1", "storage-2"],
}


def run(folder: Path, inventory: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a playbook on hosts that are made up."""
    (folder / "hosts.yml").write_text(json.dumps({"all": inventory}))
    command = shutil.which("ansible-playbook")
    assert command, "the tools are not on PATH"
    return subprocess.run(
        [command, "--inventory=hosts.yml", *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg")},
    )


@pytest.mark.parametrize(
    "failing,told",
    [
        ("none", True),
        ("storage-2", True),
        ("database", False),
        ("documents", False),
        ("broker", False),
    ],
)
def test_apps_keep_both_passwords_where_a_server_could_not_be_changed(
    tmp_path: Path, failing: str, told: bool
) -> None:
    guard = [
        play
        for play in yaml.safe_load((ROOT / "ansible/playbooks/apps.yml").read_text())
        if play["name"] == "Stop where a server could not be changed"
    ]
    assert guard
    before = {
        "hosts": "all",
        "gather_facts": False,
        "strategy": "ansible.builtin.free",
        "tasks": [{"ansible.builtin.fail": {}, "when": f"inventory_hostname == '{failing}'"}],
    }
    after = {
        "hosts": "storage_nodes",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.debug": {"msg": "told"}}],
    }
    (tmp_path / "play.yml").write_text(json.dumps([before, *guard, after]))
    hosts = {name: {"hosts": dict.fromkeys(members)} for name, members in GROUPS.items()}
    done = run(tmp_path, {"children": hosts}, "--connection=local", "play.yml")
    assert ("msg: told" in done.stdout) == told, done.stdout + done.stderr
    assert (f"{failing} failed before" in done.stdout) != told


@pytest.mark.parametrize("failing,preferred", [("storage-2", True), ("database", False)])
def test_a_new_password_comes_first_where_the_database_knows_it(
    tmp_path: Path, failing: str, preferred: bool
) -> None:
    before = {
        "hosts": "all",
        "gather_facts": False,
        "strategy": "ansible.builtin.free",
        "tasks": [{"ansible.builtin.fail": {}, "when": f"inventory_hostname == '{failing}'"}],
    }
    plays = yaml.safe_load((ROOT / "ansible/playbooks/install.yml").read_text())
    [play] = [play for play in plays if play["name"].startswith("Begin with the database's new")]
    [task] = play["tasks"]
    assert task["ansible.builtin.include_role"].pop("tasks_from") == "prefer"
    told = {"ansible.builtin.debug": {"msg": "preferred"}, "when": task["when"]}
    (tmp_path / "play.yml").write_text(
        json.dumps([before, {**play, "become": False, "tasks": [told]}])
    )
    hosts = {name: {"hosts": dict.fromkeys(members)} for name, members in GROUPS.items()}
    done = run(tmp_path, {"children": hosts}, "--connection=local", "play.yml")
    assert ("msg: preferred" in done.stdout) == preferred, done.stdout + done.stderr


def test_a_host_that_does_not_answer_is_asked_once_and_named(tmp_path: Path) -> None:
    lost = {
        "ansible_host": "127.0.0.1",
        "ansible_port": 9,  # nobody listens there
        "health_asks_kafka": True,
    }
    playbook = str(ROOT / "ansible/playbooks/health.yml")
    done = run(tmp_path, {"hosts": {"lost": lost}}, playbook)
    assert done.stdout.count("UNREACHABLE!") == 1, done.stdout + done.stderr
    assert "CRITICAL host-unreachable lost" in done.stdout
