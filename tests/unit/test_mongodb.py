"""What a MongoDB server may answer, and what the store makes of it.

The lab's stand-in knows no users, replica sets or validation: here a server answers as it is told,
with what MongoDB would.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from hypothesis import given
from hypothesis import strategies as st

from iot_pipeline.errors import InvalidMessage, Reason, SinkUnavailable
from iot_pipeline.settings import StoreSettings, load
from iot_pipeline.stores import CONFLICT_ROUNDS, Store, open_store
from iot_pipeline.stores.mongodb import _operation

Answer = Mapping[str, Any] | None
"""A reply, or None to hang up."""

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013


class Server(socketserver.ThreadingTCPServer):
    """A primary of a replica set that does nothing but answer.

    What `answers` has for a command is given in order, and the last one again and again.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.place = f"127.0.0.1:{self.server_address[1]}"
        self.answers: dict[str, list[Answer]] = {
            "find": [{"cursor": {"firstBatch": [], "id": 0, "ns": "kafka_db.image"}}],
            "insert": [{"n": 1}],
            "update": [{"n": 1, "nModified": 1}],
            "ping": [{}],
            "endSessions": [{}],
        }
        self.passwords: tuple[str, ...] = ()
        self.wire_version = 25  # MongoDB 8.0
        self.seconds = 0.0  # that it takes for an answer
        self.seen: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def hello(self) -> dict[str, Any]:
        return {
            "helloOk": True,
            "isWritablePrimary": True,
            "ismaster": True,
            "setName": "rs0",
            "hosts": [self.place],
            "me": self.place,
            "maxBsonObjectSize": 16_777_216,
            "maxMessageSizeBytes": 48_000_000,
            "maxWriteBatchSize": 100_000,
            "logicalSessionTimeoutMinutes": 30,
            "minWireVersion": 0,
            "maxWireVersion": self.wire_version,
        }

    def answer(self, command: dict[str, Any]) -> Answer:
        name = next(iter(command))
        if name in ("hello", "ismaster"):
            return self.hello()
        self.seen[name].append(command)
        if name == "saslStart":
            # PLAIN: a zero byte, the user, a zero byte, the password.
            password = command["payload"].decode().split("\0")[2]
            if password in self.passwords:
                return {"conversationId": 1, "done": True, "payload": b""}
            return failure(18, "Authentication failed.")
        time.sleep(self.seconds)
        answers = self.answers[name]
        return answers.pop(0) if len(answers) > 1 else answers[0]


class _Connection(socketserver.BaseRequestHandler):
    """Speaks as much of MongoDB's protocol as PyMongo needs."""

    server: Server

    def handle(self) -> None:
        while header := self._take(16):
            length, request, _, operation = struct.unpack("<iiii", header)
            command = self._command(operation, self._take(length - 16))
            answer = self.server.answer(command)
            if answer is None:
                return
            body = bson.encode({"ok": 1.0} | dict(answer))
            if operation == OP_QUERY:
                self._send(request, OP_REPLY, struct.pack("<iqii", 8, 0, 0, 1) + body)
            else:
                self._send(request, OP_MSG, struct.pack("<iB", 0, 0) + body)

    def _take(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            try:
                more = self.request.recv(count - len(content))
            except OSError:
                return b""
            if not more:
                return b""
            content += more
        return content

    def _send(self, request: int, operation: int, content: bytes) -> None:
        self.request.sendall(
            struct.pack("<iiii", 16 + len(content), 1, request, operation) + content
        )

    @staticmethod
    def _command(operation: int, content: bytes) -> dict[str, Any]:
        if operation == OP_QUERY:
            body = content[content.index(b"\0", 4) + 9 :]
            return bson.decode(body)
        command: dict[str, Any] = {}
        rest = content[4:]
        while rest:
            (size,) = struct.unpack_from("<i", rest, 1)
            section = rest[1 : 1 + size]
            if rest[0] == 0:
                command |= bson.decode(section)
            else:
                name, _, documents = section[4:].partition(b"\0")
                command[name.decode()] = bson.decode_all(documents)
            rest = rest[1 + size :]
        return command


def failure(code: int, text: str, *labels: str) -> dict[str, Any]:
    return {"ok": 0.0, "code": code, "errmsg": text, "errorLabels": list(labels)}


def row(index: int, code: int, text: str, **more: Any) -> dict[str, Any]:
    return {"index": index, "code": code, "errmsg": text, **more}


def found(*documents: dict[str, Any]) -> dict[str, Any]:
    return {"cursor": {"firstBatch": list(documents), "id": 0, "ns": "kafka_db.image"}}


def nothing() -> None:
    """No watchdog to feed."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., Store]]:
    opened: list[Store] = []

    def make(options: str = "", **changes: str) -> Store:
        values = {"store_url": f"mongodb://{server.place}/kafka_db.image{options}"}
        values |= {"store_timeout": "2", **changes}
        opened.append(open_store(load(StoreSettings, values, {})))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(connect: Callable[..., Store]) -> Store:
    return connect()


def test_writes_are_confirmed_by_a_majority_and_each_stands_alone(
    server: Server, store: Store
) -> None:
    server.answers["find"] = [found({"_id": "b", "_rev": "3-x", "Note": 1})]
    outcome = store.merge_in({"a": {"_id": "a", "Data": ""}, "b": {"_id": "b", "N": 2}}, nothing)
    assert sorted(outcome.stored) == ["a", "b"]
    [insert], [update], [find] = (server.seen[name] for name in ("insert", "update", "find"))
    for command in (insert, update):
        assert command["writeConcern"] == {"w": "majority", "j": True}
        assert command["ordered"] is False
        assert command["txnNumber"] >= 1  # retryable
        assert 0 < command["maxTimeMS"] <= 2000
    assert find["readConcern"] == {"level": "majority"}
    [new] = insert["documents"]
    assert new["_rev"].startswith("1-")
    [change] = update["updates"]
    assert (change["q"], change["upsert"]) == ({"_id": "b", "_rev": "3-x"}, True)
    assert change["u"].pop("_rev").startswith("4-")
    assert change["u"] == {"_id": "b", "Note": 1, "N": 2}


def test_the_url_may_choose_otherwise(server: Server, connect: Callable[..., Store]) -> None:
    store = connect("?w=2&readConcernLevel=local&retryWrites=false&replicaSet=rs0")
    store.merge_in({"a": {"_id": "a"}}, nothing)
    assert server.seen["insert"][0]["writeConcern"] == {"w": 2, "j": True}
    assert "txnNumber" not in server.seen["insert"][0]
    assert server.seen["find"][0]["readConcern"] == {"level": "local"}


def test_each_row_has_its_own_fate(server: Server, store: Store) -> None:
    documents = {name: {"_id": name, "Data": name} for name in "abcde"}
    mine = {"keyPattern": {"_id": 1}, "keyValue": {"_id": "b"}}
    others = {"keyPattern": {"Serial": 1}, "keyValue": {"Serial": None}}
    server.answers["insert"] = [
        {
            "n": 2,
            "writeErrors": [
                row(1, 11000, "E11000 duplicate key error index: _id_", **mine),
                row(2, 121, "Document failed validation"),
                row(3, 11000, "E11000 duplicate key error index: Serial_1", **others),
            ],
        }
    ]
    server.answers["find"] = [found({"_id": "b", "_rev": "1-x", "Note": 1})]
    outcome = store.merge_in(documents, nothing)
    assert sorted(outcome.stored) == ["a", "b", "e"]
    assert {name: why.reason for name, why in outcome.refused.items()} == dict.fromkeys(
        "cd", Reason.REFUSED_BY_DATABASE
    )
    assert "failed validation" in str(outcome.refused["c"])
    assert "Serial_1" in str(outcome.refused["d"])
    # What was in the way is read, merged, and written over as it was read.
    [change] = server.seen["update"][0]["updates"]
    assert (change["q"]["_rev"], change["u"]["Note"], change["u"]["Data"]) == ("1-x", 1, "b")


def test_a_write_that_others_are_always_ahead_of_is_given_up(server: Server, store: Store) -> None:
    server.answers["find"] = [found({"_id": "a", "_rev": "1-x"})]
    server.answers["update"] = [{"n": 0, "nModified": 0, "writeErrors": [row(0, 11000, "E11000")]}]
    with pytest.raises(SinkUnavailable, match="1 documents were changed by others each time"):
        store.merge_in({"a": {"_id": "a", "Note": 1}}, nothing)
    assert len(server.seen["update"]) == CONFLICT_ROUNDS


def test_a_text_that_is_no_utf_8_is_read_and_not_written(server: Server, store: Store) -> None:
    """MongoDB stores what it is given."""
    raw = bson.encode(found({"_id": "a", "_rev": "1-x", "Note": "xxxx"})).replace(
        b"xxxx", b"\xffabc"
    )
    server.answers["find"] = [RawBSONDocument(raw)]
    assert store.read(["a"])["a"]["Note"] == "\udcffabc"
    assert [each["_id"] for each in store.scan()] == ["a"]
    outcome = store.merge_in({"a": {"_id": "a", "N": 1}}, nothing)
    assert outcome.refused["a"].reason is Reason.REFUSED_BY_DATABASE
    assert "update" not in server.seen


names = st.sampled_from(
    [
        *("$oid", "$date", "$binary", "$regularExpression", "$timestamp", "$code", "$ref", "$id"),
        *("$uuid", "$numberLong", "$numberDecimal", "$dbPointer", "$type", "base64", "subType"),
        *("t", "i", "pattern", "options"),
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(names | st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(values)
def test_what_looks_like_extended_json_is_written_or_refused(value: object) -> None:
    with suppress(InvalidMessage):
        _operation({"_id": "a", "Note": value})


@pytest.mark.parametrize("value", [{"$binary": {}}, {"$date": {"a": 1}}, {"$oid": 7}, {"$code": 1}])
def test_what_only_looks_like_it_is_written_as_it_was(
    server: Server, store: Store, value: object
) -> None:
    assert not store.merge_in({"a": {"_id": "a", "Note": value}}, nothing).refused
    [insert] = server.seen["insert"]
    assert insert["documents"][0]["Note"] == value


def test_a_write_whose_answer_was_lost_is_found_equal(server: Server, store: Store) -> None:
    """Without retryable writes nobody else can tell, either."""
    server.answers["find"] = [found({"_id": "a", "_rev": "1-x", "Data": "d"})]
    server.answers["insert"] = [{"n": 0, "writeErrors": [row(0, 11000, "E11000")]}]
    outcome = store.merge_in({"a": {"_id": "a", "Data": "d"}}, nothing)
    assert list(outcome.stored) == ["a"]
    assert "update" not in server.seen


def test_a_connection_that_breaks_is_no_outage(server: Server, store: Store) -> None:
    server.answers["insert"] = [None, {"n": 1}]
    server.answers["find"] = [None, found()]
    assert list(store.merge_in({"a": {"_id": "a"}}, nothing).stored) == ["a"]
    first, again = server.seen["insert"]
    assert first["txnNumber"] == again["txnNumber"]
    assert first["documents"] == again["documents"]


# PyMongo tries again until the time is over, and says what it was at then.
TIME_IS_OVER = "operation would exceed time limit"


@pytest.mark.parametrize(
    "answer,words",
    [
        (
            {
                "n": 1,
                "writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"},
            },
            "fails: waiting for replication timed out",
        ),
        (
            {"n": 0, "writeErrors": [row(0, 14031, "Not enough disk space")]},
            "fails: Not enough disk space",
        ),
        (failure(10107, "not primary", "RetryableWriteError"), f"not primary|{TIME_IS_OVER}"),
        (failure(11600, "interrupted at shutdown"), "interrupted at shutdown"),
        (failure(50, "operation exceeded time limit"), "fails: operation exceeded time limit"),
        (failure(1, "no idea"), "fails: no idea"),
        ({"writeErrors": [{}]}, "answers unlike MongoDB"),
        (None, f"(not reachable.*(connection closed|timed out)|{TIME_IS_OVER})"),
    ],
)
def test_what_is_not_confirmed_is_an_outage(
    server: Server, store: Store, answer: Answer, words: str
) -> None:
    server.answers["insert"] = [answer]
    documents = {"a": {"_id": "a", "Data": "d"}}
    with pytest.raises(SinkUnavailable, match=f"MongoDB at {server.place}.*{words}"):
        store.merge_in(documents, nothing)
    server.answers["insert"] = [{"n": 1}]
    assert list(store.merge_in(documents, nothing).stored) == ["a"]


def test_no_answer_is_waited_for_as_long_as_is_set(
    server: Server, connect: Callable[..., Store]
) -> None:
    store = connect(store_timeout="0.5")
    store.read(["a"])
    server.seconds = 3
    with pytest.raises(SinkUnavailable, match="timed out"):
        store.read(["a"])


def test_a_server_of_long_ago_is_told(server: Server, store: Store) -> None:
    server.wire_version = 6
    with pytest.raises(SinkUnavailable, match="wire version 6"):
        store.read(["a"])


@pytest.fixture
def login(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "password").write_text("wrong\n")
    return {"store_user": "iot-storage", "store_password_file": str(tmp_path / "password")}


def test_a_refused_user_is_told_what_to_set(
    connect: Callable[..., Store], login: dict[str, str]
) -> None:
    store = connect("?authMechanism=PLAIN", **login)
    words = "refuses user 'iot-storage': check IOT_STORE_USER and IOT_STORE_PASSWORD_FILE"
    for request in (
        lambda: store.read(["a"]),
        lambda: store.merge_in({"a": {"_id": "a"}}, nothing),
    ):
        with pytest.raises(SinkUnavailable, match=words) as caught:
            request()
        assert "wrong" not in str(caught.value)


def test_users_are_those_of_the_database_unless_told(
    server: Server, connect: Callable[..., Store], login: dict[str, str]
) -> None:
    server.passwords = ("wrong",)
    connect("?authMechanism=PLAIN", **login).read(["a"])
    connect("?authMechanism=PLAIN&authSource=admin", **login).read(["a"])
    assert [command["$db"] for command in server.seen["saslStart"]] == ["kafka_db", "admin"]


def test_a_new_password_is_taken_up(
    server: Server, connect: Callable[..., Store], login: dict[str, str]
) -> None:
    file = Path(login["store_password_file"])
    server.passwords = ("right",)
    store = connect("?authMechanism=PLAIN", **login)
    with pytest.raises(SinkUnavailable, match="refuses user"):
        store.read(["a"])
    file.write_text("right\n")
    assert store.read(["a"]) == {}
    # While it is changed the file holds both, and the server knows either.
    file.write_text("next\nright\n")
    assert connect("?authMechanism=PLAIN", **login).read(["a"]) == {}
    # The same for one that runs already, with what has become the old password.
    server.passwords = ("next",)
    server.answers["insert"] = [None, {"n": 1}]
    assert list(store.merge_in({"a": {"_id": "a", "Data": ""}}, nothing).stored) == ["a"]


def test_who_lacks_a_right_is_told_which_database(
    server: Server, connect: Callable[..., Store], login: dict[str, str]
) -> None:
    server.passwords = ("wrong",)
    server.answers["find"] = [failure(13, "not authorized on kafka_db to execute command")]
    with pytest.raises(SinkUnavailable, match="'iot-storage' may not use kafka_db"):
        connect("?authMechanism=PLAIN", **login).read(["a"])
    with pytest.raises(SinkUnavailable, match="wants a user: IOT_STORE_USER"):
        connect().read(["a"])


def test_a_host_that_has_no_address_is_told() -> None:
    settings = load(
        StoreSettings, {"store_url": "mongodb://db.invalid/a.b", "store_timeout": "0.5"}, {}
    )
    with open_store(settings) as store, pytest.raises(SinkUnavailable, match=r"db\.invalid"):
        store.read(["a"])


def test_the_first_of_many_hosts_that_is_the_primary_is_asked(server: Server) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
        url = f"mongodb://{nobody},{server.place}/kafka_db.image?replicaSet=rs0"
        settings = load(StoreSettings, {"store_url": url, "store_timeout": "5"}, {})
        with open_store(settings) as store:
            assert store.read(["a"]) == {}
