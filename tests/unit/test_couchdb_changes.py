"""What the role couchdb sends, from what is there and what should be."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "roles/couchdb/filter_plugins/couchdb_changes.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("couchdb_changes", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plugin = load()

USERS: list[dict[str, Any]] = [{"name": "w+r", "password": "password", "roles": ["b", "a"]}]
DATABASES = [
    {
        "name": "img+db",
        "members": ["w+r"],
        "readers": ["reader"],
        "indexes": [{"name": "by-n", "fields": ["n", "m"]}],
    }
]
SYSTEM = ["_users", "_replicator"]
USER, DATABASE = "_users/org.couchdb.user:w%2Br", "img%2Bdb"
# RFC 6070: PBKDF2 with HMAC-SHA-1.
ACCOUNT = {
    "_rev": "1-a",
    "roles": ["a", "b"],
    "password_scheme": "pbkdf2",
    "salt": "salt",
    "iterations": 2,
    "derived_key": "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957",
}


def changes(*, enforce: bool = True, names: list[str] | None = None, **found: Any) -> list[Any]:
    known = SYSTEM if names is None else names
    result: list[Any] = plugin.couchdb_changes(DATABASES, USERS, known, found, enforce)
    return result


@pytest.mark.parametrize(
    "account,is_right",
    [
        # RFC 6070: SHA-1 has no name in documents of old.
        ({"iterations": 1, "derived_key": "0c60c80f961f0e71f3a9b524af6012062fe037a6"}, True),
        ({"iterations": 2, "derived_key": "0c60c80f961f0e71f3a9b524af6012062fe037a6"}, False),
        ({"iterations": 1, "pbkdf2_prf": "sha256", "derived_key": "00" * 32}, False),
        ({"derived_key": ""}, False),
        ({}, False),
        # sha1("passwordsalt"), as CouchDB 1.2 and earlier kept it.
        (
            {
                "password_scheme": "simple",
                "password_sha": "c88e9c67041a74e0357befdff93f87dde0904214",
            },
            True,
        ),
        ({"password_scheme": "simple", "password_sha": "c88e"}, False),
    ],
)
def test_a_password_is_compared_with_its_hash(account: dict[str, Any], is_right: bool) -> None:
    assert plugin.couchdb_password_is({"salt": "salt", **account}, "password") is is_right


def test_sha256_is_that_of_rfc_7914() -> None:
    """Section 11."""
    key = (
        "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
        "49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
    )
    account = {"salt": "salt", "iterations": 1, "pbkdf2_prf": "sha256", "derived_key": key}
    assert plugin.couchdb_password_is(account, "passwd")
    assert not plugin.couchdb_password_is(account, "password")


def test_an_empty_server_gets_all_in_order() -> None:
    sent = [(each["method"], each["path"]) for each in changes(names=[])]
    assert sent == [
        ("PUT", "_users"),
        ("PUT", "_replicator"),
        ("PUT", DATABASE),
        ("PUT", USER),
        # Before the readers are let in.
        ("PUT", f"{DATABASE}/_design/writers"),
        ("PUT", f"{DATABASE}/_security"),
        ("POST", f"{DATABASE}/_index"),
    ]


def test_what_is_right_is_not_sent_again() -> None:
    made = {each["path"]: each["body"] for each in changes(names=[])}
    fields = [{"n": "asc"}, {"m": "asc"}]
    found: dict[str, Any] = {
        USER: {
            **ACCOUNT,
            "iterations": 1,
            "derived_key": "0c60c80f961f0e71f3a9b524af6012062fe037a6",
        },
        f"{DATABASE}/_design/writers": {**made[f"{DATABASE}/_design/writers"], "_rev": "1-b"},
        f"{DATABASE}/_security": made[f"{DATABASE}/_security"],
        f"{DATABASE}/_index": {"indexes": [{"name": "by-n", "def": {"fields": fields}}]},
    }
    names = [*SYSTEM, "img+db"]
    assert changes(names=names, **found) == []
    [removed] = changes(names=names, enforce=False, **found)
    assert (removed["method"], removed["path"]) == (
        "DELETE",
        f"{DATABASE}/_design/writers?rev=1-b",
    )
    # Another password, or other roles.
    for account in ({**ACCOUNT, "iterations": 3}, {**ACCOUNT, "roles": []}):
        [written] = changes(names=names, **{**found, USER: account})
        assert (written["path"], written["body"]["_rev"]) == (USER, "1-a")


def test_what_is_read_is_what_is_asked_for() -> None:
    assert plugin.couchdb_paths(DATABASES, USERS) == [
        USER,
        *(f"{DATABASE}/{name}" for name in ("_design/writers", "_security", "_index")),
    ]
