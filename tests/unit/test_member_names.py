"""Hosts are told apart by the inventory's names: their own may all be the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from iot_pipeline.settings import InferSettings, ProduceSettings, Settings, StoreSettings, load

ROLES = Path(__file__).parents[2] / "roles"
KINDS: dict[str, type[Settings]] = {
    "producer": ProduceSettings,
    "inference_node": InferSettings,
    "storage_node": StoreSettings,
}
HOSTS: dict[str, dict[str, Any]] = {
    "left": {},
    "right": {},
    "other": {f"{role}_name": "given" for role in KINDS},
}


@pytest.fixture(scope="module")
def settings(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Settings]]:
    """What each role's service is set to on each host, as Ansible renders it."""
    folder = tmp_path_factory.mktemp("names")
    defaults: dict[str, Any] = {}
    for role in KINDS:
        defaults |= yaml.safe_load((ROLES / role / "defaults/main.yml").read_text())
    known = {f"{role}_bootstrap_servers": "broker:9092" for role in KINDS} | {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "inference_node_threads": 2,
        "storage_node_store_url": "couchdb://localhost:5984/img_db",
    }
    load_them = [
        {"ansible.builtin.include_vars": str(ROLES / role / "vars/main.yml")} for role in KINDS
    ]
    texts = ", ".join(f"'{role}': _{role}_settings" for role in KINDS)
    write = {
        "ansible.builtin.copy": {
            "content": f"{{{{ {{{texts}}} | to_json }}}}",
            "dest": f"{folder}/{{{{ inventory_hostname }}}}.json",
        }
    }
    play = {"hosts": "all", "gather_facts": False, "tasks": [*load_them, write]}
    (folder / "play.yml").write_text(json.dumps([play]))
    done = run_playbook(folder, {"hosts": HOSTS, "vars": defaults | known}, "play.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, Settings]] = {}
    for host in HOSTS:
        environments = json.loads((folder / f"{host}.json").read_text())
        found[host] = {
            role: load(kind, environment={n: str(v) for n, v in environments[role].items()})
            for role, kind in KINDS.items()
        }
    return found


@pytest.mark.parametrize("role", KINDS)
def test_each_host_has_the_inventory_s_name(
    settings: dict[str, dict[str, Settings]], role: str
) -> None:
    names = {host: settings[host][role].instance for host in HOSTS}
    assert names == {"left": "left", "right": "right", "other": "given"}
    service = KINDS[role].SERVICE
    assert settings["left"][role].client_id == f"{service}-left"
