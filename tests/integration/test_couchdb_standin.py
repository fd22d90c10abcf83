"""The stand-in's own gate: no odd request gets past it, and none ends the process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
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
    gate: CouchDB, method: str, path: str, body: Any, expected: int
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
    gate: CouchDB, method: str, path: str, body: Any, expected: int
) -> None:
    assert gate.request(method, path, body).status == expected
    assert gate.request("GET", f"/{OPEN}", user=gate.user).status == 200


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
        # express-pouchdb prefers the id of the body to that of the path.
        ("PUT", "/_local%2Fmine", {"_id": "new"}),
        ("PUT", "/_local/mine", {"_id": "new"}),
    ],
)
def test_readers_do_not_write(readable: CouchDB, method: str, path: str, body: Any) -> None:
    kept = f"/{READABLE}/kept"
    readable.request("PUT", kept, {"n": 1}, readable.user)
    before = readable.request("GET", f"/{READABLE}").body
    path = f"/{READABLE}{path}".format(rev=readable.request("GET", kept).body["_rev"])
    assert readable.request(method, path, body, READER).status == 403
    assert readable.request("GET", f"/{READABLE}").body == before


def test_bulks_of_readers_are_refused_by_document(readable: CouchDB) -> None:
    documents = {"docs": [{"_id": "a"}, {"n": 1}, None]}
    refused = readable.request("POST", f"/{READABLE}/_bulk_docs", documents, READER)
    assert refused.status == 201
    assert [row["error"] for row in refused.body] == ["forbidden"] * 3
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
