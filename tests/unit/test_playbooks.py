"""Plays that decide over others: Ansible runs them, with hosts that are made up."""

import json
import subprocess
from collections.abc import Callable
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


Run = Callable[..., subprocess.CompletedProcess[str]]


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
    run_playbook: Run, tmp_path: Path, failing: str, told: bool
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
    done = run_playbook(tmp_path, {"children": hosts}, "--connection=local", "play.yml")
    assert ("msg: told" in done.stdout) == told, done.stdout + done.stderr
    assert (f"{failing} failed before" in done.stdout) != told


@pytest.mark.parametrize("failing,preferred", [("storage-2", True), ("database", False)])
def test_a_new_password_comes_first_where_the_database_knows_it(
    run_playbook: Run, tmp_path: Path, failing: str, preferred: bool
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
    done = run_playbook(tmp_path, {"children": hosts}, "--connection=local", "play.yml")
    assert ("msg: preferred" in done.stdout) == preferred, done.stdout + done.stderr


def test_a_host_that_does_not_answer_is_asked_once_and_named(
    run_playbook: Run, tmp_path: Path
) -> None:
    lost = {
        "ansible_host": "127.0.0.1",
        "ansible_port": 9,  # nobody listens there
        "health_asks_kafka": True,
    }
    playbook = str(ROOT / "ansible/playbooks/health.yml")
    done = run_playbook(tmp_path, {"hosts": {"lost": lost}}, playbook)
    assert done.stdout.count("UNREACHABLE!") == 1, done.stdout + done.stderr
    assert "CRITICAL host-unreachable lost" in done.stdout


RULE = "tcp dport 9093 accept"


def preflights(run_playbook: Run, folder: Path, names: list[str], **variables: Any) -> str:
    """Run what checks an inventory of these hosts, and render the first one's firewall."""
    firewall = ROOT / "roles/firewall"
    template = firewall / "templates/firewall.nft.j2"
    tasks = [
        {"ansible.builtin.include_role": {"name": "base", "tasks_from": "preflight"}},
        {
            "ansible.builtin.include_role": {
                "name": "firewall",
                "tasks_from": "preflight",
                "public": True,
            }
        },
        {
            "ansible.builtin.template": {"src": str(template), "dest": str(folder / "rules")},
            "vars": {"role_path": str(firewall)},
            "run_once": True,
        },
        {
            "ansible.builtin.debug": {
                "msg": "on [{{ kafka_broker_bind_address }}], hosts [{{ base_hosts_entries }}]"
            },
            "run_once": True,
        },
    ]
    play = {"hosts": "all", "gather_subset": ["!all", "min"], "tasks": tasks}
    (folder / "play.yml").write_text(json.dumps([play]))
    (folder / "group_vars").mkdir()
    (folder / "group_vars/all.yml").symlink_to(
        ROOT / "inventory/couchdb/group_vars/all/topology.yml"
    )
    groups = {
        name: {"hosts": dict.fromkeys(names)}
        for name in ("kafka_controllers", "kafka_brokers", "storage_nodes", "couchdb_servers")
    }
    empty: dict[str, Any] = {name: {} for name in ("producers", "inference_nodes")}
    more = f"--extra-vars={json.dumps(variables)}"
    done = run_playbook(
        folder, {"children": groups | empty}, "--connection=local", more, "play.yml"
    )
    return done.stdout + done.stderr


def test_hosts_may_be_named_by_their_addresses(run_playbook: Run, tmp_path: Path) -> None:
    said = preflights(run_playbook, tmp_path, ["192.0.2.11", "192.0.2.12"])
    assert "on [192.0.2.11], hosts [{}]" in said, said
    rules = (tmp_path / "rules").read_text()
    assert "elements = { 192.0.2.11, 192.0.2.12 }" in rules
    assert RULE in rules


def test_names_are_taken_as_they_are_where_dns_is_said_to_know_them(
    run_playbook: Run, tmp_path: Path
) -> None:
    # The one name that every host knows.
    said = preflights(run_playbook, tmp_path, ["localhost"], base_hosts_entries={})
    assert "on [], hosts [{}]" in said, said
    rules = (tmp_path / "rules").read_text()
    assert "127.0.0.1" in rules or "::1" in rules
    assert "localhost" not in rules
    assert RULE in rules


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({}, "base_hosts_entries needs host names with the address of each, and has a.invalid"),
        ({"base_hosts_entries": {}}, "name a.invalid, of which a.invalid does not find the"),
    ],
)
def test_names_that_nobody_knows_are_told(
    run_playbook: Run, tmp_path: Path, variables: dict[str, Any], reason: str
) -> None:
    said = preflights(run_playbook, tmp_path, ["a.invalid"], **variables)
    assert reason in " ".join(said.split()), said
    assert "Set ansible_host of these hosts in the inventory" in " ".join(said.split())
    assert "has no attribute" not in said
    assert not (tmp_path / "rules").exists()


# Each with a password that YAML takes for a number, and what is said of it.
NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "kafka_broker": (
        {
            "kafka_broker_admin_password": 12345678,
            "kafka_broker_users": [{"name": "a", "password": 12345678}, {"name": "b"}],
        },
        "kafka_broker_admin_password, kafka_broker_users, a: YAML",
    ),
    "kafka_resources": (
        {
            "kafka_resources_client": {"username": "a", "password": 123456789012},
            "kafka_resources_users": [{"name": "b", "password": True}],
        },
        "kafka_resources_client, password, kafka_resources_users, b: YAML",
    ),
    "couchdb": (
        {
            "couchdb_admin_password": 123456789012,
            "couchdb_users": [{"name": "a", "password": 1.5}],
        },
        "couchdb_admin_password, couchdb_users, a: YAML",
    ),
    "mongodb": (
        {
            "mongodb_admin_password": 123456789012,
            "mongodb_replica_set_key": 123456789012,
            "mongodb_users": [{"name": "a", "password": 123456789012}],
        },
        "mongodb_admin_password, mongodb_replica_set_key, mongodb_users, a: YAML",
    ),
    "storage_node": (
        {"storage_node_store_password": 123456789012, "storage_node_audit_store_password": "text"},
        "storage_node_store_password: YAML",
    ),
    "pipeline_app": (
        {
            "pipeline_app_service": "iot-x",
            "pipeline_app_kafka_client": {"security_protocol": "SASL_SSL", "password": 12345678},
        },
        "the Kafka password of iot-x: YAML",
    ),
    "pki": (
        {"pki_authority_key_passphrase": 12345678, "pki_key_passphrase": 12345678},
        "pki_key_passphrase, pki_authority_key_passphrase: YAML",
    ),
}


# Each with what would mean something else in a unit.
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "couchdb": (
        {"couchdb_data_dir": "/srv/100%/couchdb", "couchdb_bind_address": "a b"},
        "couchdb_bind_address, couchdb_server_name, couchdb_data_dir cannot be written",
    ),
    "mongodb": (
        {"mongodb_tls_key": "/srv/$x/key", "mongodb_server_name": "a'b"},
        "mongodb_server_name, mongodb_tls_key cannot be written",
    ),
    "storage_node": (
        {"storage_node_audit_record": '/srv/"/audit'},
        "storage_node_audit_record cannot be written",
    ),
}


def said_of(
    run_playbook: Run, folder: Path, check: str, given: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Run one check of each role, with its defaults and what is given. Returns what was said."""
    tasks: list[dict[str, Any]] = []
    for name, values in given.items():
        role = ROOT / "roles" / name
        known: dict[str, Any] = {}
        for part in ("defaults", "vars"):
            known |= yaml.safe_load((role / part / "main.yml").read_text())
        preflight = yaml.safe_load((role / "tasks/preflight.yml").read_text())
        file = {"dest": str(folder / name)}
        passed = {"ansible.builtin.copy": file | {"content": "well"}}
        failed = {"ansible.builtin.copy": file | {"content": "{{ ansible_failed_result.msg }}"}}
        checks = [task for task in preflight if task["name"] == check]
        assert checks
        tasks.append({"vars": known | values, "block": [*checks, passed], "rescue": [failed]})
    play = {"hosts": "all", "gather_facts": False, "tasks": tasks}
    (folder / "play.yml").write_text(json.dumps([play]))
    done = run_playbook(folder, {"hosts": {"one": None}}, "--connection=local", "play.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (folder / name).read_text() for name in given}


def test_a_password_that_yaml_takes_for_a_number_is_told_by_its_name(
    run_playbook: Run, tmp_path: Path
) -> None:
    check = "Check that passwords are text"
    wrong = {name: values for name, (values, _) in NUMBERS.items()}
    said = said_of(run_playbook, tmp_path, check, wrong)
    for name, (_, reason) in NUMBERS.items():
        assert said[name].startswith(reason)
    right = {name: texts(values) for name, values in wrong.items()}
    assert set(said_of(run_playbook, tmp_path, check, right).values()) == {"well"}


def test_what_a_unit_cannot_carry_is_told_by_its_name(run_playbook: Run, tmp_path: Path) -> None:
    check = "Check what is written into a unit"
    said = said_of(
        run_playbook, tmp_path, check, {name: values for name, (values, _) in UNFIT.items()}
    )
    for name, (_, reason) in UNFIT.items():
        assert said[name].startswith(reason)
    right = {"couchdb": {"couchdb_bind_address": "::1"}, "mongodb": {}, "storage_node": {}}
    assert set(said_of(run_playbook, tmp_path, check, right).values()) == {"well"}


def texts(value: Any) -> Any:
    """Return the same with each number in quotes."""
    if isinstance(value, dict):
        return {key: texts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [texts(each) for each in value]
    return str(value) if isinstance(value, (int, float)) else value
