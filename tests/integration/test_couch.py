"""What is CouchDB's own in its store; `test_stores.py` has what every store does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iot_lab.processes import CouchDB
from iot_pipeline.errors import ConfigError, SinkUnavailable
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


def test_a_new_password_is_taken_up(connect: Connect, database: CouchDB, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    store = connect(store_password_file=str(file))
    with pytest.raises(SinkUnavailable, match="refuses user"):
        store.read(["a"])
    file.write_text(database.user[1] + "\n")
    assert store.read(["a"]) == {}
    # While it is changed the file holds both, and the server knows either.
    file.write_text(f"next\n{database.user[1]}\n")
    assert connect(store_password_file=str(file)).read(["a"]) == {}
    # The same for one that runs already, with what has become the old password.
    file.write_text("old\n")
    store = connect(store_password_file=str(file))
    file.write_text(f"{database.user[1]}\nold\n")
    assert store.read(["a"]) == {}


def test_a_password_file_must_be_there(connect: Connect) -> None:
    with pytest.raises(ConfigError, match="IOT_STORE_PASSWORD_FILE"):
        connect(store_password_file="/nowhere/password")
