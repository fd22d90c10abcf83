"""What the apps rely on in CouchDB: the lab's stand-in has to answer the same way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from iot_lab.processes import CouchDB

NAME = "contract"


@pytest.fixture
def store(database: CouchDB) -> Iterator[CouchDB]:
    database.create(NAME)
    yield database
    assert database.request("DELETE", f"/{NAME}").status == 200


def test_a_stale_revision_is_a_conflict(store: CouchDB) -> None:
    first = store.request("PUT", f"/{NAME}/a", {"n": 1}, store.user)
    assert (first.status, first.body["ok"], first.body["rev"][:2]) == (201, True, "1-")
    assert store.request("PUT", f"/{NAME}/a", {"n": 2}, store.user).status == 409
    newer = {"n": 2, "_rev": first.body["rev"]}
    assert store.request("PUT", f"/{NAME}/a", newer, store.user).status == 201
    answer = store.request("PUT", f"/{NAME}/a", newer, store.user)
    assert (answer.status, answer.body["error"]) == (409, "conflict")
    assert store.request("GET", f"/{NAME}/a", user=store.user).body["n"] == 2


def test_bulk_docs_answers_for_each_document(store: CouchDB) -> None:
    old = store.request("PUT", f"/{NAME}/old", {"n": 1}, store.user).body["rev"]
    docs = [{"_id": "new"}, {"_id": "old"}, {"_id": "old", "_rev": old, "n": 2}]
    answer = store.request("POST", f"/{NAME}/_bulk_docs", {"docs": docs[:2]}, store.user)
    assert answer.status == 201
    new, conflict = answer.body
    assert (new["id"], new["ok"]) == ("new", True)
    assert (conflict["id"], conflict["error"]) == ("old", "conflict")
    answer = store.request("POST", f"/{NAME}/_bulk_docs", {"docs": docs[2:]}, store.user)
    assert answer.body[0]["rev"][:2] == "2-"


def test_all_docs_by_keys_and_by_range(store: CouchDB) -> None:
    docs = [{"_id": name, "n": name} for name in ("a", "b", "c", "d")]
    assert store.request("POST", f"/{NAME}/_bulk_docs", {"docs": docs}, store.user).status == 201
    path = f"/{NAME}/_all_docs?include_docs=true"
    rows = store.request("POST", path, {"keys": ["c", "zz", "a"]}, store.user).body["rows"]
    assert [row.get("error") or row["doc"]["n"] for row in rows] == ["c", "not_found", "a"]
    path += "&startkey=%22b%22&limit=2"
    rows = store.request("GET", path, user=store.user).body["rows"]
    assert [row["id"] for row in rows] == ["b", "c"]


def test_nobody_comes_in_without_the_right_password(store: CouchDB) -> None:
    # One that no other test needs: who fails often is locked.
    name = "contract-person"
    person = {"name": name, "password": "right", "roles": [], "type": "user"}
    assert store.request("PUT", f"/_users/org.couchdb.user:{name}", person).status in (201, 409)
    wrong = [(name, "wrong"), (name, ""), ("admin", "admin"), ("stranger", "right")]
    for path in (f"/{NAME}", f"/{NAME}/_all_docs", "/_all_dbs", "/_users/_all_docs"):
        for user in (None, wrong.pop()):
            answer = store.request("GET", path, user=user)
            assert (answer.status, answer.body["error"]) == (401, "unauthorized"), (path, user)
    assert store.request("PUT", "/intruder", user=None).status == 401
    assert store.request("GET", "/_up", user=None).status == 200


def test_the_user_may_use_its_database_and_make_none(store: CouchDB) -> None:
    assert store.request("PUT", "/another", user=store.user).status in (401, 403)
    assert store.request("DELETE", f"/{NAME}", user=store.user).status in (401, 403)
    assert store.request("PUT", "/closed").status == 201
    try:
        assert store.request("GET", "/closed", user=store.user).status in (401, 403)
    finally:
        assert store.request("DELETE", "/closed").status == 200
    assert store.request("GET", "/nowhere", user=store.admin).status == 404


def test_what_was_acknowledged_survives_a_kill(store: CouchDB) -> None:
    docs = [{"_id": f"{n:04}", "data": "x" * 3000} for n in range(500)]
    rows = store.request("POST", f"/{NAME}/_bulk_docs", {"docs": docs}, store.user).body
    assert all(row.get("ok") for row in rows)
    store.kill()
    store.start().wait_ready()
    answer = store.request("GET", f"/{NAME}/_all_docs", user=store.user)
    assert [row["id"] for row in answer.body["rows"]] == [doc["_id"] for doc in docs]
