"""What the role couchdb makes in a running server, by its own tasks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from iot_lab.paths import ROOT
from iot_lab.processes import CouchDB

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the role writes a file as root"),
    pytest.mark.timeout(400),
]

DATABASE = "role+db"
PATH = "/role%2Bdb"
WRITER, READER = ("role-writer", "password-of-writer"), ("role-reader", "password-of-reader")
INDEX = {"name": "by-n", "fields": ["n", "m"]}
PLAY = """
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: couchdb
        tasks_from: resources
"""


def person(user: tuple[str, str], *roles: str) -> dict[str, Any]:
    return {"name": user[0], "password": user[1], "roles": list(roles)}


class Role:
    """Runs the tasks that make databases, users and indexes."""

    def __init__(self, folder: Path, server: CouchDB) -> None:
        self._folder = folder
        self._server = server
        self.netrc = folder / "netrc"
        self.changed = 0
        (folder / "play.yml").write_text(PLAY)

    def __call__(self, *arguments: str, fails: bool = False, **variables: Any) -> str:
        """What Ansible says of it. `changed` is then how many tasks have changed something."""
        given = {
            "couchdb_admin_password": self._server.admin[1],
            "couchdb_users": [person(WRITER, "some-role"), person(READER)],
            "couchdb_databases": [
                {
                    "name": DATABASE,
                    "members": [WRITER[0]],
                    "readers": [READER[0]],
                    "indexes": [INDEX],
                }
            ],
            "_couchdb_url": self._server.url,
            "_couchdb_netrc": str(self.netrc),
            **variables,
        }
        file = self._folder / "variables.json"
        file.write_text(json.dumps(given))
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                *("--connection=local", "-i", "localhost,", f"--extra-vars=@{file}", "-vvv"),
                *(*arguments, str(self._folder / "play.yml")),
            ],
            env=os.environ
            | {
                "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
                "ANSIBLE_NOCOLOR": "true",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, output
        for password in (given["couchdb_admin_password"], WRITER[1], READER[1]):
            assert password not in output, "a password is shown"
        [changed] = re.findall(r"changed=(\d+)", output)
        self.changed = int(changed)
        # Ansible breaks long lines.
        return re.sub(r"\s+", " ", output)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CouchDB]:
    with CouchDB(tmp_path_factory.mktemp("role")) as server:
        yield server


@pytest.fixture
def role(tmp_path: Path, server: CouchDB) -> Role:
    return Role(tmp_path, server)


def test_check_mode_on_an_empty_server_announces_all(role: Role, server: CouchDB) -> None:
    said = role("--check")
    assert role.changed > 0
    for what in (
        "create database _users",
        f"create database {DATABASE}",
        f"write user {READER[0]}",
        f"set who may write to {DATABASE}",
        f"set who may use {DATABASE}",
        f"create index {INDEX['name']} of {DATABASE}",
    ):
        assert what in said
    assert server.request("GET", "/_all_dbs").body == []


def test_it_makes_all_once(role: Role, server: CouchDB) -> None:
    role()
    assert server.request("GET", "/_session", user=WRITER).body["userCtx"]["roles"] == ["some-role"]
    assert server.request("PUT", f"{PATH}/a", {"n": 1}, WRITER).status == 201
    assert server.request("GET", f"{PATH}/a", user=READER).body["n"] == 1
    assert server.request("PUT", f"{PATH}/b", {"n": 1}, READER).status == 403
    names = [each["name"] for each in server.request("GET", f"{PATH}/_index").body["indexes"]]
    assert INDEX["name"] in names
    assert "machine 127.0.0.1 login admin" in role.netrc.read_text()
    role()
    assert role.changed == 0


def test_readers_may_write_where_it_says_so(role: Role, server: CouchDB) -> None:
    role(couchdb_enforce_readers=False)
    assert server.request("GET", f"{PATH}/_design/writers").status == 404
    assert server.request("PUT", f"{PATH}/by-reader", {}, READER).status == 201
    role()
    assert server.request("PUT", f"{PATH}/by-reader-too", {}, READER).status == 403


def test_a_change_of_password_tries_none(role: Role, server: CouchDB) -> None:
    """Each failed login would count for the service that runs."""
    role()
    users = [person((WRITER[0], "another-password"), "some-role"), person(READER)]
    assert f"write user {WRITER[0]}" in role("--check", couchdb_users=users)
    for _ in range(4):
        assert server.request("GET", "/_session", user=(WRITER[0], "wrong")).status == 401
    assert server.request("GET", "/_session", user=WRITER).status == 200
    role(couchdb_users=users)
    assert server.request("GET", "/_session", user=(WRITER[0], "another-password")).status == 200
    assert server.request("GET", "/_session", user=WRITER).status == 401


def test_what_the_server_refuses_is_said(role: Role, server: CouchDB) -> None:
    said = role(fails=True, couchdb_databases=[{"name": "Capital"}])
    assert "CouchDB did not create database Capital" in said
    assert "'Capital' is no name for a database" in said
    assert "refuses the admin's password" in role(fails=True, couchdb_admin_password="wrong-" * 3)
    assert not role.netrc.exists() or "wrong-" not in role.netrc.read_text()
    for _ in range(5):
        server.request("GET", "/_all_dbs", user=("admin", "wrong"))
    assert "Account is temporarily locked" in role(fails=True)
