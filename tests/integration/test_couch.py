"""What is CouchDB's own in its store; `test_stores.py` has what every store does."""

from __future__ import annotations

import itertools
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iot_lab.processes import LOOPBACK, CouchDB, wait_for
from iot_pipeline.errors import ConfigError, Reason, SinkUnavailable
from iot_pipeline.schema import uuid7
from iot_pipeline.settings import StoreSettings, load
from iot_pipeline.stores import Store, open_store

Connect = Callable[..., Store]
_names = (f"couch-{number}" for number in itertools.count())


@pytest.fixture
def name(database: CouchDB) -> Iterator[str]:
    name = next(_names)
    database.create(name)
    yield name
    database.drop(name)


@pytest.fixture
def connect(database: CouchDB, name: str) -> Iterator[Connect]:
    opened: list[Store] = []

    def make(**changes: str) -> Store:
        opened.append(open_store(load(StoreSettings, changes, database.environment(name))))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


class Person:
    """A user of the database whom no other test needs: who fails often is locked."""

    def __init__(self, database: CouchDB, name: str, file: Path) -> None:
        self._database = database
        self._user = f"person-of-{name}"
        self._file = file
        members = {"members": {"names": [database.USER, self._user], "roles": []}}
        assert database.request("PUT", f"/{name}/_security", members).status == 200

    def become(self, password: str) -> None:
        """Have this password."""
        path = f"/_users/org.couchdb.user:{self._user}"
        known = self._database.request("GET", path).body
        rev = {"_rev": known["_rev"]} if "_rev" in known else {}
        person = {"name": self._user, "password": password, "roles": [], "type": "user", **rev}
        assert self._database.request("PUT", path, person).status == 201

    def keep(self, *passwords: str) -> dict[str, str]:
        """Settings with a file that holds these."""
        self._file.write_text("".join(f"{password}\n" for password in passwords))
        return {"store_user": self._user, "store_password_file": str(self._file)}

    def try_out(self, password: str) -> int:
        """The status that a login with it ends with."""
        return self._database.request("GET", "/_session", user=(self._user, password)).status


@pytest.fixture
def person(database: CouchDB, name: str, tmp_path: Path) -> Person:
    person = Person(database, name, tmp_path / "password")
    person.become("right")
    return person


def test_its_numbers_are_those_of_json(connect: Connect, database: CouchDB, name: str) -> None:
    identifier = uuid7()
    body = {"Note": "checked by hand", "Serial": 10**20}
    assert database.request("PUT", f"/{name}/{identifier}", body).status == 201
    connect().merge_in({identifier: {"_id": identifier, "More": 1}}, lambda: None)
    [found] = connect().scan()
    assert (found["Note"], found["Serial"], found["More"]) == ("checked by hand", 10**20, 1)


def test_a_scan_leaves_out_design_documents(
    connect: Connect, database: CouchDB, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iot_pipeline.stores.FIRST_PAGE_DOCUMENTS", 1)
    identifiers = [uuid7() for _ in range(3)]
    connect().merge_in({name: {"_id": name} for name in identifiers}, lambda: None)
    views = {"views": {"all": {"map": "function (doc) { emit(doc._id); }"}}}
    assert database.request("PUT", f"/{name}/_design/ours", views).status == 201
    assert [state["_id"] for state in connect().scan()] == identifiers


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"store_url": "couchdb://{place}/none"}, "has no database none: .*IOT_STORE_URL"),
        ({"store_user": "nobody"}, "IOT_STORE_USER and IOT_STORE_PASSWORD_FILE"),
    ],
)
def test_what_keeps_the_database_away_is_an_outage_that_says_what_to_set(
    connect: Connect, database: CouchDB, changes: dict[str, str], words: str
) -> None:
    place = database.url.removeprefix("http://")
    store = connect(**{name: value.format(place=place) for name, value in changes.items()})
    with pytest.raises(SinkUnavailable, match=words):
        store.merge_in({"a": {"_id": "a"}}, lambda: None)


def test_a_new_password_is_taken_up(connect: Connect, person: Person) -> None:
    store = connect(**person.keep("wrong"))
    with pytest.raises(SinkUnavailable, match="refuses user"):
        store.read(["a"])
    person.keep("right")
    assert store.read(["a"]) == {}
    # While it is changed the file holds both, and the server knows either.
    assert connect(**person.keep("next", "right")).read(["a"]) == {}
    # The same for one that runs already, with what has become the old password.
    store = connect(**person.keep("old"))
    person.keep("old", "right")
    assert store.read(["a"]) == {}


def test_who_goes_on_with_a_wrong_password_locks_nobody(connect: Connect, person: Person) -> None:
    store = connect(**person.keep("wrong", "wrong too"))
    for _ in range(10):
        with pytest.raises(SinkUnavailable, match="refuses user"):
            store.read(["a"])
    assert person.try_out("right") == 200
    person.keep("right")
    assert store.read(["a"]) == {}


def test_a_password_that_is_refused_is_tried_again_later(
    connect: Connect, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iot_pipeline.stores.couchdb.CouchStore.refusal_pause", 0.2)
    store = connect(**person.keep("next"))
    with pytest.raises(SinkUnavailable, match="refuses user"):
        store.read(["a"])
    person.become("next")

    def reads() -> bool:
        try:
            return store.read(["a"]) == {}
        except SinkUnavailable:
            return False

    wait_for(reads, "the next attempt", 30)


def test_a_password_that_was_taken_before_is_tried_again_sooner(
    connect: Connect, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has just started may not know its users yet."""
    monkeypatch.setattr("iot_pipeline.stores.couchdb.CouchStore.refusal_pause", 1000)
    store = connect(**person.keep("right"))
    assert store.read(["a"]) == {}
    person.become("forgotten")
    with pytest.raises(SinkUnavailable, match="refuses user"):
        store.read(["a"])
    person.become("right")
    with pytest.raises(SinkUnavailable, match="refuses user"):
        store.read(["a"])
    monkeypatch.setattr("time.monotonic", lambda after=time.monotonic: after() + 101)
    assert store.read(["a"]) == {}


def test_a_change_of_password_locks_nobody(connect: Connect, person: Person) -> None:
    """Whoever starts meanwhile begins with the file's first: the one that the server knows."""
    running = connect(**person.keep("right"))
    running.read(["a"])
    settings = person.keep("right", "next")
    for _ in range(10):
        assert connect(**settings).read(["a"]) == {}
    person.become("next")
    assert running.read(["a"]) == {}
    person.keep("next", "right")
    for _ in range(10):
        assert running.read(["a"]) == connect(**settings).read(["a"]) == {}
    person.keep("next")
    assert running.read(["a"]) == {}
    # No more than the one that did not know yet has failed.
    assert [person.try_out("wrong") for _ in range(4)] == [401] * 4
    assert person.try_out("next") == 403


def test_what_let_us_in_last_is_tried_first(connect: Connect, person: Person) -> None:
    store = connect(**person.keep("next", "right"))
    for _ in range(10):
        assert store.read(["a"]) == {}
    assert person.try_out("right") == 200


def test_a_locked_user_is_told_and_let_in_again(connect: Connect, person: Person) -> None:
    store = connect(**person.keep("right"))
    for _ in range(5):
        person.try_out("wrong")
    words = "has locked user 'person-of-.*' for up to 5 minutes.*IOT_STORE_PASSWORD_FILE"
    for request in (
        lambda: store.read(["a"]),
        lambda: store.merge_in({"a": {"_id": "a"}}, lambda: None),
    ):
        with pytest.raises(SinkUnavailable, match=words):
            request()
    # A password that is set anew unlocks, even if it is the same.
    person.become("right")
    assert store.read(["a"]) == {}


def test_a_server_that_wants_a_user_says_so(connect: Connect) -> None:
    with pytest.raises(SinkUnavailable, match="wants a user: IOT_STORE_USER"):
        connect(store_user="", store_password_file="").read(["a"])


def test_a_password_file_must_be_there(connect: Connect) -> None:
    with pytest.raises(ConfigError, match="IOT_STORE_PASSWORD_FILE"):
        connect(store_password_file="/nowhere/password")


def merge_all(store: Store, identifiers: list[str], **more: object) -> int:
    """Merge documents in, and return how often life was signalled."""
    signs: list[None] = []
    store.merge_in(
        {each: {"_id": each, "Data": "", **more} for each in identifiers},
        lambda: signs.append(None),
    )
    return len(signs)


@pytest.mark.parametrize("error", ["forbidden", "unauthorized"])
def test_what_a_validation_function_refuses_is_refused_for_good(
    connect: Connect, database: CouchDB, name: str, error: str
) -> None:
    function = f"function (doc) {{ if (doc.Note === 'bad') throw({{{error}: 'not this'}}); }}"
    rules = {"validate_doc_update": function}
    assert database.request("PUT", f"/{name}/_design/rules", rules).status == 201
    good, bad = uuid7(), uuid7()
    states = {good: {"_id": good}, bad: {"_id": bad, "Note": "bad"}}
    outcome = connect().merge_in(states, lambda: None)
    assert list(outcome.stored) == [good]
    assert outcome.refused[bad].reason is Reason.REFUSED_BY_DATABASE
    assert f"{error}: not this" in str(outcome.refused[bad])


def test_a_bulk_that_is_refused_as_a_whole_is_halved_with_signs_of_life(connect: Connect) -> None:
    identifiers = [uuid7() for _ in range(64)]
    states = {each: {"_id": each, "Data": ""} for each in identifiers}
    states[identifiers[40]]["_odd"] = "a name that CouchDB keeps for itself"
    signs: list[None] = []
    outcome = connect().merge_in(states, lambda: signs.append(None))
    assert list(outcome.refused) == [identifiers[40]]
    assert len(outcome.stored) == 63
    # One for each of the halves: both of 64, of 32 and so on.
    assert len(signs) >= 13


def test_a_bulk_that_takes_too_long_is_halved(
    connect: Connect, database: CouchDB, name: str
) -> None:
    """Each document costs the server 20 ms, so all at once are never done in time."""
    function = "function () { const end = Date.now() + 20; while (Date.now() < end) {} }"
    rules = {"validate_doc_update": function}
    assert database.request("PUT", f"/{name}/_design/slow", rules).status == 201
    store, identifiers = connect(store_timeout="1"), [uuid7() for _ in range(100)]
    told: list[str] = []

    def stored() -> bool:
        try:
            return merge_all(store, identifiers) > 1
        except SinkUnavailable as error:
            told.append(str(error))
            return False

    wait_for(stored, "the halves to be stored", 60)
    assert len(store.read(identifiers)) == 100
    assert all("is slow: no answer within 1 s (IOT_STORE_TIMEOUT)" in text for text in told)


def test_a_name_with_a_plus_can_be_used(connect: Connect, database: CouchDB) -> None:
    assert database.request("PUT", "/couch%2Bplus").status == 201
    members = {"members": {"names": [database.USER], "roles": []}}
    try:
        assert database.request("PUT", "/couch%2Bplus/_security", members).status == 200
        url = f"couchdb://{database.url.removeprefix('http://')}/couch+plus"
        store, identifier = connect(store_url=url), uuid7()
        store.merge_in({identifier: {"_id": identifier}}, lambda: None)
        assert list(store.read([identifier])) == [identifier]
        assert [state["_id"] for state in store.scan()] == [identifier]
    finally:
        assert database.request("DELETE", "/couch%2Bplus").status == 200


def test_a_full_disk_is_an_outage_that_says_so(tmp_path: Path) -> None:
    """The answer has a row for each document, which is more than the client library reads."""
    with CouchDB(tmp_path) as server:
        server.create("full")
        with open_store(load(StoreSettings, {}, server.environment("full"))) as store:
            identifiers = [uuid7() for _ in range(100)]
            resource.prlimit(server.pid or 0, resource.RLIMIT_FSIZE, (100_000, 100_000))
            words = r"fails: 500 internal_server_error: .*File too large.* \(100 documents\)"
            with pytest.raises(SinkUnavailable, match=words):
                merge_all(store, identifiers, Note="x" * 5000)


class Answering:
    """A server that answers whatever it hears with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._socket = socket.create_server((LOOPBACK, 0))
        self.url = f"couchdb://{LOOPBACK}:{self._socket.getsockname()[1]}/any"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self._answer)

    def close(self) -> None:
        self._socket.close()


def answer_of(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


ROWS = [{"id": str(number), "error": "enospc", "reason": "no space"} for number in range(2000)]


@pytest.mark.parametrize(
    "answer,words",
    [
        # What CouchDB's runtime says to one who does not speak TLS.
        (b"\x15\x03\x03\x00\x02\x02\x0a", r"with TLS off: it speaks TLS alone; add \?tls=true"),
        (answer_of("500 Error", json.dumps(ROWS).encode()), r"500 enospc: no space \(2000 doc"),
        (answer_of("500 Error", json.dumps(ROWS[:1]).encode()), r"fails: 500 enospc: no space$"),
        (answer_of("502 Bad Gateway", b"<html>" * 5000), r"fails: 502 <html><html>"),
        (answer_of("500 Error", b"[1, null]"), r"fails: 500 \[1, None\]"),
        (answer_of("403 No", b'{"error": "forbidden", "reason": "not you"}'), "a member.*not you"),
        (answer_of("201 Created", b"[1]"), "did not answer for each document"),
    ],
)  # fmt: skip
def test_odd_answers_are_outages_that_say_what_came(
    connect: Connect, answer: bytes, words: str
) -> None:
    server = Answering(answer)
    try:
        with pytest.raises(SinkUnavailable, match=words) as caught:
            merge_all(connect(store_url=server.url, store_timeout="5"), [uuid7()])
    finally:
        server.close()
    assert len(str(caught.value)) < 500


def test_tls_to_a_port_without_is_told(connect: Connect, database: CouchDB, name: str) -> None:
    url = f"couchdb://{database.url.removeprefix('http://')}/{name}?tls=true"
    with pytest.raises(SinkUnavailable, match="with TLS on: it does not speak TLS at this port"):
        connect(store_url=url).read(["a"])
