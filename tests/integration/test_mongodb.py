"""What is MongoDB's own in its store; `test_stores.py` has what every store does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import Binary, Decimal128, Int64, ObjectId

from iot_lab.processes import MongoDB
from iot_lab.secure_broker import Authority
from iot_pipeline.backup import BackupFile, new_backup
from iot_pipeline.errors import ConfigError, Reason, SinkUnavailable
from iot_pipeline.progress import Progress
from iot_pipeline.restore import compare, merge_into
from iot_pipeline.schema import uuid7
from iot_pipeline.settings import StoreSettings, load
from iot_pipeline.stores import Store, open_store

Connect = Callable[..., Store]
_names = (f"mongodb-{number}" for number in itertools.count())

OF_MONGODB = {
    "At": datetime(2026, 1, 1, 12, 30, 1, 250_000, tzinfo=UTC),
    "Before": datetime(1890, 1, 1, tzinfo=UTC),
    "Of": ObjectId("0123456789abcdef01234567"),
    "Raw": b"bytes",
    "Uuid": Binary(bytes(range(16)), 4),
    "Price": Decimal128("1.10"),
    "Nested": [{"At": datetime(2026, 1, 1, tzinfo=UTC)}, Int64(2**62)],
}


@pytest.fixture
def name(mongodb: MongoDB) -> Iterator[str]:
    name = next(_names)
    yield name
    mongodb.drop(name)


@pytest.fixture
def connect(mongodb: MongoDB, name: str) -> Iterator[Connect]:
    opened: list[Store] = []

    def make(**changes: str) -> Store:
        opened.append(open_store(load(StoreSettings, changes, mongodb.environment(name))))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def written_by_hand(mongodb: MongoDB, name: str, **fields: Any) -> str:
    identifier = uuid7()
    mongodb.write(name, {"_id": identifier, **fields})
    return identifier


def test_types_that_json_lacks_are_read_as_json_and_written_back_as_they_were(
    connect: Connect, mongodb: MongoDB, name: str
) -> None:
    identifier, store = written_by_hand(mongodb, name, **OF_MONGODB), connect()
    read = store.read([identifier])[identifier]
    assert read["At"] == {"$date": "2026-01-01T12:30:01.250Z"}
    assert read["Of"] == {"$oid": "0123456789abcdef01234567"}
    assert read["Nested"][1] == 2**62
    store.merge_in({identifier: {"_id": identifier, "Note": "new"}}, lambda: None)
    found = mongodb.documents(name)[identifier]
    assert found.pop("_rev").startswith("1-")
    assert found == {"_id": identifier, "Note": "new", **OF_MONGODB}


def test_a_backup_holds_them_too(
    connect: Connect, mongodb: MongoDB, name: str, tmp_path: Path
) -> None:
    identifier, store = written_by_hand(mongodb, name, **OF_MONGODB), connect()
    file, other = BackupFile(tmp_path / "b"), f"{name}-restored"
    with new_backup(file.path, store.name) as add:
        for state in store.scan():
            add(state)
    url = mongodb.environment(other)["IOT_STORE_URL"]
    assert merge_into(connect(store_url=url), file, Progress()) == {}
    assert compare(file, connect(store_url=url), Progress()).identical == 1
    found = mongodb.documents(other)[identifier]
    mongodb.drop(other)
    assert found.items() >= OF_MONGODB.items()


@pytest.mark.parametrize(
    "field,words",
    [
        ({"Serial": 10**20}, "8-byte ints"),
        ({"Text": "\ud800"}, "surrogates not allowed"),
        ({"zero\0byte": 1}, "NULL byte|null byte|embedded null"),
        ({"Data": "A" * 17_000_000}, "17000.*16777216"),
    ],
)
def test_what_mongodb_cannot_hold_is_refused_by_itself(
    connect: Connect, field: dict[str, Any], words: str
) -> None:
    store, good, bad = connect(), uuid7(), uuid7()
    documents = {good: {"_id": good}, bad: {"_id": bad, **field}}
    outcome = store.merge_in(documents, lambda: None)
    assert (list(outcome.stored), list(outcome.refused)) == ([good], [bad])
    refusal = outcome.refused[bad]
    assert refusal.reason is Reason.REFUSED_BY_DATABASE
    assert re.search(words, str(refusal)), refusal
    assert len(str(refusal)) < 1000


def test_what_only_looks_like_a_type_of_mongodb_s_comes_back_as_it_was(connect: Connect) -> None:
    store, identifier, odd = connect(), uuid7(), {"$date": "yesterday"}
    assert not store.merge_in({identifier: {"_id": identifier, "At": odd}}, lambda: None).refused
    assert store.read([identifier])[identifier]["At"] == odd


@pytest.mark.parametrize("revision", [{}, {"_rev": None}, {"_rev": 7}, {"_rev": ObjectId()}])
def test_documents_of_others_need_no_revision_of_ours(
    connect: Connect, mongodb: MongoDB, name: str, revision: dict[str, Any]
) -> None:
    identifier, store = written_by_hand(mongodb, name, Note="mine", **revision), connect()
    outcome = store.merge_in({identifier: {"_id": identifier, "More": 1}}, lambda: None)
    assert list(outcome.stored) == [identifier]
    [found] = store.scan()
    assert (found["Note"], found["More"]) == ("mine", 1)
    assert isinstance(found["_rev"], str)


def test_ids_that_are_no_texts_are_not_ours(connect: Connect, mongodb: MongoDB, name: str) -> None:
    for identifier in (ObjectId(), 7, uuid7()):
        mongodb.write(name, {"_id": identifier})
    [found] = connect().scan()
    assert isinstance(found["_id"], str)


@pytest.mark.parametrize(
    "option,words",
    [
        ("w=0", "w=0 confirms nothing"),
        ("retryWrites=perhaps", "IOT_STORE_URL: .*retry_?[wW]rites"),
        ("replicaSet=rs0&directConnection=maybe", "IOT_STORE_URL: .*direct_?[cC]onnection"),
        ("authMechanism=NONE", "IOT_STORE_URL: .*auth_?[mM]echanism"),
    ],
)
def test_options_that_cannot_be_used_are_told_before_anything_is_sent(
    connect: Connect, mongodb: MongoDB, name: str, option: str, words: str
) -> None:
    url = mongodb.environment(name)["IOT_STORE_URL"]
    with pytest.raises(ConfigError, match=words):
        connect(store_url=f"{url}?{option}")


def test_a_replica_set_that_it_is_not_in_is_an_outage(
    connect: Connect, mongodb: MongoDB, name: str
) -> None:
    url = mongodb.environment(name)["IOT_STORE_URL"]
    store = connect(store_url=f"{url}?replicaSet=rs0", store_timeout="1")
    with pytest.raises(SinkUnavailable, match=r"rs0.*IOT_STORE_URL"):
        store.read(["a"])


def test_the_stand_in_speaks_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    identity = authority.issue("database")
    tls = {
        "MONGODB_TLS_CERTIFICATE_FILE": str(identity.certificate),
        "MONGODB_TLS_KEY_FILE": str(identity.key),
    }
    with MongoDB(tmp_path, tls) as server:
        url = f"mongodb://{server.place}/kafka_db.image"
        settings = {"store_ca_file": str(authority.certificate), "store_timeout": "5"}
        with open_store(
            load(StoreSettings, settings | {"store_url": f"{url}?tls=true"}, {})
        ) as store:
            assert list(store.merge_in({"a": {"_id": "a"}}, lambda: None).stored) == ["a"]
        plain = {"store_url": url, "store_timeout": "2"}
        with (
            open_store(load(StoreSettings, plain, {})) as store,
            pytest.raises(
                SinkUnavailable, match=r"is not reachable, with TLS off: .*IOT_STORE_URL"
            ),
        ):
            store.read(["a"])
        # Without it: `tls=true` at a port in the clear.
    with MongoDB(tmp_path) as server:
        url = f"mongodb://{server.place}/kafka_db.image?tls=true"
        with (
            open_store(load(StoreSettings, {"store_url": url, "store_timeout": "2"}, {})) as store,
            pytest.raises(SinkUnavailable, match=r"is not reachable, with TLS on: "),
        ):
            store.read(["a"])
