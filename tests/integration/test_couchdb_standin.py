"""The stand-in's own gate: no odd request gets past it, and none ends the process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from iot_lab.processes import LOOPBACK, CouchDB, wait_for

OPEN, CLOSED, READABLE = "gate-open", "gate-closed", "gate-readable"
READER = ("reader", "may-not-write-anything")
WRITERS = """function (doc, old, user) {
  if (user.roles.indexOf('_admin') < 0 && %s.indexOf(user.name) < 0) {
    throw({forbidden: 'You may read this database, and not write to it.'});
  }
}"""


@pytest.fixture(scope="module")
def gate(database: CouchDB) -> Iterator[CouchDB]:
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
        ("PUT", f"/{OPEN}/_design/d", {"views": {}}, 403),
        ("PUT", f"/{OPEN}/_design%2Fd", {"views": {}}, 403),
        ("POST", f"/{OPEN}", {"_id": "_design/d"}, 403),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [{"_id": "_design/d"}]}, 403),
        ("POST", f"/{OPEN}/_index", {"index": {"fields": ["n"]}}, 403),
        ("PUT", f"/{OPEN}/_security", {}, 403),
        ("PUT", f"/{OPEN}/_local/_security", {"security": {}}, 403),
        ("PUT", f"/{OPEN}/_local%2F_security", {"security": {}}, 403),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [{"_id": "_local/_security"}]}, 403),
        ("COPY", f"/{OPEN}/a", None, 400),
        ("GET", "/_all_dbs", None, 401),
        ("GET", "/_users/_all_docs", None, 401),
    ],
)
def test_members_do_not_get_further_than_their_documents(
    gate: CouchDB, method: str, path: str, body: Any, expected: int
) -> None:
    assert gate.request(method, path, body, gate.user).status == expected


@pytest.mark.parametrize(
    "method, path, body, expected",
    [
        ("POST", f"/{OPEN}/_bulk_docs", [], 400),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": 3}, 400),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [None, 4]}, 400),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [{"_id": "beside-null"}, None]}, 400),
        ("POST", f"/{OPEN}/_bulk_docs", {"docs": [{"_id": "big", "x": "x" * 8_000_001}]}, 413),
        ("PUT", f"/{OPEN}/a", [1], 400),
        ("PUT", "/Capital", None, 400),
        ("GET", "/%E0%A4%A", None, 400),
        ("POST", "/", {}, 405),
        ("DELETE", "/nowhere", None, 404),
        ("PUT", "/nowhere/a", {}, 404),
    ],
)
def test_odd_requests_are_refused_and_end_nothing(
    gate: CouchDB, method: str, path: str, body: Any, expected: int
) -> None:
    assert gate.request(method, path, body).status == expected
    assert gate.request("GET", f"/{OPEN}", user=gate.user).status == 200
    assert gate.request("GET", f"/{OPEN}/beside-null", user=gate.user).status == 404


def test_a_plus_in_a_path_stands_for_a_blank(gate: CouchDB) -> None:
    assert gate.request("PUT", "/gate+plus").status == 400
    assert gate.request("PUT", "/gate%2Bplus").status == 201
    assert gate.request("GET", "/gate+plus").status == 404
    assert gate.request("GET", "/gate%2Bplus/_all_docs").status == 200
    assert gate.request("DELETE", "/gate%2Bplus").status == 200


def test_the_path_names_the_document(gate: CouchDB) -> None:
    assert gate.request("PUT", f"/{OPEN}/named", {"_id": "other"}, gate.user).body["id"] == "named"
    assert gate.request("GET", f"/{OPEN}/other", user=gate.user).status == 404


LOCKED = "Account is temporarily locked due to multiple authentication failures"


def make_person(database: CouchDB, name: str, password: str) -> tuple[str, str]:
    """A user, or a new password for it."""
    path = f"/_users/org.couchdb.user:{name}"
    known = database.request("GET", path)
    rev = {"_rev": known.body["_rev"]} if known.status == 200 else {}
    person = {"name": name, "password": password, "roles": [], "type": "user", **rev}
    assert database.request("PUT", path, person).status == 201
    return name, password


def test_five_failed_logins_lock_a_user_until_its_password_is_changed(gate: CouchDB) -> None:
    right = make_person(gate, "forgetful", "the right one")
    statuses = []
    for number in range(5):
        statuses.append(gate.request("GET", "/_session", user=("forgetful", f"{number}")).status)
        # What succeeds between them takes none of them back.
        statuses.append(gate.request("GET", "/_session", user=right).status)
    assert statuses == [401, 200, 401, 200, 401, 200, 401, 200, 401, 403]
    answer = gate.request("GET", "/_session", user=right)
    assert (answer.status, answer.body) == (403, {"error": "forbidden", "reason": LOCKED})
    assert gate.request("GET", "/_session", user=gate.user).status == 200
    assert gate.request("GET", "/_session", user=make_person(gate, *right)).status == 200


def test_who_is_unknown_is_not_locked(gate: CouchDB) -> None:
    asked = [gate.request("GET", "/_session", user=("unknown", "any")).status for _ in range(7)]
    assert asked == [401] * 7


class QuickCouchDB(CouchDB):
    """A stand-in that forgets failed logins after two seconds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._environment["COUCHDB_LOCKOUT_SECONDS"] = "2"


def test_a_locked_admin_is_let_in_again_after_a_while(tmp_path: Path) -> None:
    with QuickCouchDB(tmp_path) as server:
        for _ in range(5):
            server.request("GET", "/_all_dbs", user=("admin", "wrong"))
        assert server.request("GET", "/_all_dbs").status == 403
        wait_for(lambda: server.request("GET", "/_all_dbs").status == 200, "the lock to end", 20)


def test_what_the_disk_does_not_take_is_told_for_each_document(tmp_path: Path) -> None:
    with CouchDB(tmp_path) as server:
        server.create(OPEN)
        documents = [{"_id": str(number), "x": "x" * 10_000} for number in range(40)]
        resource.prlimit(server.pid or 0, resource.RLIMIT_FSIZE, (100_000, 100_000))
        answer = server.request("POST", f"/{OPEN}/_bulk_docs", {"docs": documents}, server.user)
        assert answer.status == 500
        assert [row["id"] for row in answer.body] == [document["_id"] for document in documents]
        assert {row["error"] for row in answer.body} == {"internal_server_error"}


def test_passwords_are_stored_hashed(gate: CouchDB) -> None:
    user = f"/_users/org.couchdb.user:{gate.user[0]}"
    document = gate.request("GET", user).body
    assert "password" not in document
    assert gate.user[1] not in str(document)
    plain = {"name": "eve", "password": "plain", "roles": [], "type": "user"}
    assert gate.request("PUT", "/_users%2F/org.couchdb.user:eve", plain).status == 404


@pytest.fixture(scope="module")
def readable(database: CouchDB) -> Iterator[CouchDB]:
    """A database that one member may write to and another may not."""
    database.create(READABLE)
    name, password = READER
    person = {"name": name, "password": password, "roles": [], "type": "user"}
    assert database.request("PUT", f"/_users/org.couchdb.user:{name}", person).status == 201
    members = {"names": [database.USER, name], "roles": []}
    assert database.request("PUT", f"/{READABLE}/_security", {"members": members}).status == 200
    let_write(database, database.USER)
    yield database
    assert database.request("DELETE", f"/{READABLE}").status == 200


def let_write(database: CouchDB, *names: str) -> None:
    path = f"/{READABLE}/_design/writers"
    known = database.request("GET", path)
    rev = {"_rev": known.body["_rev"]} if known.status == 200 else {}
    function = WRITERS % json.dumps(names)
    assert database.request("PUT", path, {"validate_doc_update": function, **rev}).status == 201


def test_readers_read(readable: CouchDB) -> None:
    assert readable.request("PUT", f"/{READABLE}/read", {"n": 1}, readable.user).status == 201
    assert readable.request("GET", f"/{READABLE}/read", user=READER).body["n"] == 1
    query = {"selector": {"n": 1}}
    assert readable.request("POST", f"/{READABLE}/_find", query, READER).status == 200
    keys = {"keys": ["read"]}
    found = readable.request("POST", f"/{READABLE}/_all_docs", keys, READER)
    assert found.body["rows"][0]["id"] == "read"


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("PUT", "/new", {"n": 1}),
        ("PUT", "/kept?rev={rev}", {"n": 2}),
        ("POST", "", {"n": 1}),
        ("POST", "", {"_id": "new"}),
        ("DELETE", "/kept?rev={rev}", None),
        ("PUT", "/kept/file?rev={rev}", {"n": 1}),
        ("PUT", "/new/file", {"n": 1}),
        # The path names the document.
        ("PUT", "/new", {"_id": "_local/mine"}),
    ],
)
def test_readers_do_not_write(readable: CouchDB, method: str, path: str, body: Any) -> None:
    kept = f"/{READABLE}/kept"
    readable.request("PUT", kept, {"n": 1}, readable.user)
    before = readable.request("GET", f"/{READABLE}").body
    path = f"/{READABLE}{path}".format(rev=readable.request("GET", kept).body["_rev"])
    assert readable.request(method, path, body, READER).status == 403
    assert readable.request("GET", f"/{READABLE}").body == before


@pytest.mark.parametrize("path", ["_local/mine", "_local%2Fmine"])
def test_readers_write_local_documents_which_nobody_lists(readable: CouchDB, path: str) -> None:
    """No validation function sees them."""
    listed = readable.request("GET", f"/{READABLE}/_all_docs").body
    kept = f"/{READABLE}/{path}"
    assert readable.request("PUT", kept, {"n": 1}, READER).status == 201
    found = readable.request("GET", kept, user=READER).body
    assert (found["_id"], found["n"]) == ("_local/mine", 1)
    assert readable.request("GET", f"/{READABLE}/_all_docs").body == listed
    assert readable.request("DELETE", f"{kept}?rev={found['_rev']}", user=READER).status == 200


def test_bulks_of_readers_are_refused_by_document(readable: CouchDB) -> None:
    documents = {"docs": [{"_id": "a"}, {"n": 1}]}
    refused = readable.request("POST", f"/{READABLE}/_bulk_docs", documents, READER)
    assert refused.status == 201
    assert [row["error"] for row in refused.body] == ["forbidden"] * 2
    assert readable.request("GET", f"/{READABLE}/a").status == 404


def test_validation_sees_what_is_stored(readable: CouchDB) -> None:
    once = "function (doc, old) { if (old && old.n !== doc.n) throw({forbidden: 'n stays.'}); }"
    path = f"/{READABLE}/_design/once"
    made = readable.request("PUT", path, {"validate_doc_update": once})
    assert made.status == 201
    url, bulk = f"/{READABLE}/fixed", f"/{READABLE}/_bulk_docs"
    rev = readable.request("PUT", url, {"n": 1}, readable.user).body["rev"]
    assert readable.request("PUT", url, {"n": 2, "_rev": rev}, readable.user).status == 403
    # The others of a bulk are written.
    documents = [{"_id": "fixed", "n": 2, "_rev": rev}, {"_id": "free", "n": 2}]
    rows = readable.request("POST", bulk, {"docs": documents}, readable.user).body
    assert [row.get("error") for row in rows] == ["forbidden", None]
    assert [row["id"] for row in rows] == ["fixed", "free"]
    assert readable.request("GET", f"/{READABLE}/free").body["n"] == 2
    # A function that is gone holds nobody any more.
    assert readable.request("DELETE", f"{path}?rev={made.body['rev']}").status == 200
    assert readable.request("PUT", url, {"n": 2, "_rev": rev}, readable.user).status == 201


def test_new_writers_may_write_at_once(readable: CouchDB) -> None:
    let_write(readable, readable.USER, READER[0])
    assert readable.request("PUT", f"/{READABLE}/let-in", {}, READER).status == 201
    let_write(readable, readable.USER)
    assert readable.request("PUT", f"/{READABLE}/let-out", {}, READER).status == 403


def make_certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for loopback, with its key beside it."""
    path = folder / f"{name}.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-noenc", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(path.with_suffix(".key")), "-out", str(path)),
        ],
        check=True,
        capture_output=True,
    )
    return path


class TlsCouchDB(CouchDB):
    """A stand-in that speaks https."""

    def __init__(self, folder: Path, certificate: Path) -> None:
        super().__init__(folder)
        self._environment |= {
            "COUCHDB_TLS_CERTIFICATE_FILE": str(certificate),
            "COUCHDB_TLS_KEY_FILE": str(certificate.with_suffix(".key")),
        }

    def is_ready(self) -> bool:
        return "listens on https://" in self.output()

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def certificate(self) -> str:
        """What it presents to a new connection."""
        return ssl.get_server_certificate((LOOPBACK, self.port))

    def is_up(self, trust: ssl.SSLContext) -> bool:
        connection = http.client.HTTPSConnection(LOOPBACK, self.port, context=trust, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/_up")
            return connection.getresponse().status == 200


def test_https_takes_up_new_certificates(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "host")
    first = certificate.read_text()
    with TlsCouchDB(tmp_path, certificate) as server:
        trusting = ssl.create_default_context(cafile=certificate)
        assert server.is_up(trusting)
        with pytest.raises(ssl.SSLCertVerificationError):
            server.is_up(ssl.create_default_context())
        with pytest.raises(OSError, match=r"GET /_up|reset"):
            server.request("GET", "/_up", user=None)

        second = make_certificate(tmp_path, "second")
        # In halves, as a host's certificate may be replaced.
        second.with_suffix(".key").replace(certificate.with_suffix(".key"))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGHUP)
        wait_for(lambda: "keep the certificate before" in server.output(), "the half")
        assert server.certificate() == first
        second.replace(certificate)
        wait_for(lambda: server.certificate() == certificate.read_text(), "the new one")
        assert certificate.read_text() != first

        third = make_certificate(tmp_path, "third")
        third.with_suffix(".key").replace(certificate.with_suffix(".key"))
        third.replace(certificate)
        os.kill(server.pid, signal.SIGHUP)
        wait_for(lambda: server.certificate() == certificate.read_text(), "a signal", 3)
        with pytest.raises(ssl.SSLCertVerificationError):
            server.is_up(trusting)
