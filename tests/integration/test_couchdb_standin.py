"""The stand-in's own gate: no odd request gets past it, and none ends the process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from iot_lab.processes import Database

OPEN, CLOSED = "gate-open", "gate-closed"


@pytest.fixture(scope="module")
def gate(database: Database) -> Iterator[Database]:
    database.create(OPEN)
    assert database.request("PUT", f"/{CLOSED}").status == 201
    assert database.request("PUT", f"/{CLOSED}/secret", {"n": 1}).status == 201
    yield database
    for name in (OPEN, CLOSED):
        assert database.request("DELETE", f"/{name}").status == 200


@pytest.mark.parametrize(
    "method, path, body, expected",
    [
        # express-pouchdb cleans names before it looks for them.
        ("GET", f"/{CLOSED}%2F/_all_docs", None, 404),
        ("GET", f"/{CLOSED}/_all_docs", None, 403),
        ("DELETE", f"/{OPEN}/", None, 401),
        ("PUT", f"/{OPEN}/_design/d", {"views": {}}, 401),
        ("PUT", f"/{OPEN}/_design%2Fd", {"views": {}}, 401),
        ("POST", f"/{OPEN}", {"_id": "_design/d"}, 401),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [{"_id": "_design/d"}]}, 401),
        ("POST", f"/{OPEN}/_index", {"index": {"fields": ["n"]}}, 401),
        ("PUT", f"/{OPEN}/_security", {}, 401),
        ("PUT", f"/{OPEN}/_local/_security", {"security": {}}, 403),
        ("PUT", f"/{OPEN}/_local%2F_security", {"security": {}}, 403),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [{"_id": "_local/_security"}]}, 403),
        ("COPY", f"/{OPEN}/a", None, 405),
        ("GET", "/_all_dbs", None, 401),
        ("GET", "/_users/_all_docs", None, 401),
    ],
)
def test_members_do_not_get_further_than_their_documents(
    gate: Database, method: str, path: str, body: Any, expected: int
) -> None:
    assert gate.request(method, path, body, gate.user).status == expected


@pytest.mark.parametrize(
    "method, path, body, expected",
    [
        ("POST", f"/{OPEN}/_bulk_docs", [], 400),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": 3}, 400),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [None, 4]}, 400),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [{"_id": "big", "x": "x" * 8_000_001}]}, 413),
        ("PUT", f"/{OPEN}/a", [1], 400),
        ("PUT", "/Capital", None, 400),
        ("GET", "/%E0%A4%A", None, 400),
        ("POST", "/", {}, 404),
        ("DELETE", "/nowhere", None, 404),
        ("PUT", "/nowhere/a", {}, 404),
    ],
)
def test_odd_requests_are_refused_and_end_nothing(
    gate: Database, method: str, path: str, body: Any, expected: int
) -> None:
    assert gate.request(method, path, body).status == expected
    assert gate.request("GET", f"/{OPEN}", user=gate.user).status == 200


def test_passwords_are_stored_hashed(gate: Database) -> None:
    user = f"/_users/org.couchdb.user:{gate.user[0]}"
    document = gate.request("GET", user).body
    assert "password" not in document
    assert gate.user[1] not in str(document)
    plain = {"name": "eve", "password": "plain", "roles": [], "type": "user"}
    assert gate.request("PUT", "/_users%2F/org.couchdb.user:eve", plain).status == 404
