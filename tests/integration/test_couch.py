"""`iot_pipeline.couch` against the real database: merging under contention, paging, refusals."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from iot_lab.processes import Database
from iot_pipeline import couch
from iot_pipeline.couch import CouchDatabase
from iot_pipeline.errors import ConfigError, Reason, SinkUnavailable
from iot_pipeline.schema import (
    STORED_AT,
    Document,
    ImageMessage,
    PredictionMessage,
    document,
    is_complete,
    merge,
    uuid7,
)
from iot_pipeline.settings import StoreSettings

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
_names = (f"couch-{number}" for number in itertools.count())


def image(identifier: str) -> Document:
    return document(
        ImageMessage(
            id=identifier,
            ground_truth="cat",
            data=b"image" * 20,
            content_type="image/png",
            produced_at=MOMENT,
            source="here",
        )
    )


def prediction(identifier: str) -> Document:
    return document(
        PredictionMessage(
            id=identifier, inferred_value="dog", confidence=0.5, model="m", inferred_at=MOMENT
        )
    )


def nothing() -> None:
    """No watchdog to feed."""


@pytest.fixture
def name(database: Database) -> Iterator[str]:
    name = next(_names)
    database.create(name)
    yield name
    assert database.request("DELETE", f"/{name}").status == 200


@pytest.fixture
def connect(database: Database, name: str) -> Callable[..., CouchDatabase]:
    def make(**changes: str) -> CouchDatabase:
        values = {
            "couchdb_url": database.url,
            "couchdb_user": database.user[0],
            "couchdb_password_file": str(database.password_file),
            "couchdb_database": name,
        }
        return CouchDatabase(StoreSettings(**(values | changes)))  # type: ignore[arg-type] # texts

    return make


def test_halves_become_one_document(connect: Callable[..., CouchDatabase]) -> None:
    store, identifier = connect(), uuid7()
    first = store.merge_in({identifier: prediction(identifier)}, nothing)
    assert not is_complete(first.stored[identifier])
    assert STORED_AT not in first.stored[identifier]
    second = store.merge_in({identifier: image(identifier)}, nothing)
    assert is_complete(second.stored[identifier])
    [found] = store.scan()
    assert found == second.stored[identifier] | {"_rev": found["_rev"]}
    assert found["_rev"].startswith("2-")
    assert STORED_AT in found


def test_a_message_that_comes_again_writes_nothing(connect: Callable[..., CouchDatabase]) -> None:
    store, identifier = connect(), uuid7()
    for half in (image, prediction, image, prediction):
        outcome = store.merge_in({identifier: half(identifier)}, nothing)
        assert identifier in outcome.stored
    [found] = store.scan()
    assert found["_rev"].startswith("2-")


def test_two_writers_at_once_lose_nothing(connect: Callable[..., CouchDatabase]) -> None:
    identifiers = [uuid7() for _ in range(60)]

    def write(half: Callable[[str], Document], failures: list[BaseException]) -> None:
        try:
            connect().merge_in({name: half(name) for name in identifiers}, nothing)
        except BaseException as error:  # noqa: BLE001 - the test's own thread has to hear of it
            failures.append(error)

    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=write, args=(half, failures)) for half in (image, prediction) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = list(connect().scan())
    assert [state["_id"] for state in found] == identifiers
    assert all(map(is_complete, found))


def test_fields_of_the_database_s_users_are_kept(
    connect: Callable[..., CouchDatabase], database: Database, name: str
) -> None:
    identifier = uuid7()
    body = {"Note": "checked by hand", "Serial": 10**20}
    assert database.request("PUT", f"/{name}/{identifier}", body).status == 201
    connect().merge_in({identifier: image(identifier)}, nothing)
    [found] = connect().scan()
    assert (found["Note"], found["Serial"], found["GroundTruth"]) == (
        "checked by hand",
        10**20,
        "cat",
    )


def test_a_scan_passes_every_page_once_and_no_design_document(
    connect: Callable[..., CouchDatabase],
    database: Database,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(couch, "FIRST_PAGE_DOCUMENTS", 3)
    monkeypatch.setattr(couch, "PAGE_BYTES", 3000)
    identifiers = [uuid7() for _ in range(31)]
    connect().merge_in({name: image(name) for name in identifiers}, nothing)
    views = {"views": {"all": {"map": "function (doc) { emit(doc._id); }"}}}
    assert database.request("PUT", f"/{name}/_design/ours", views).status == 201
    assert [state["_id"] for state in connect().scan()] == identifiers
    assert [state["_id"] for state in connect().scan(identifiers[20])] == identifiers[20:]


def test_large_documents_go_in_requests_of_bounded_size(
    connect: Callable[..., CouchDatabase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(couch, "WRITE_BYTES", 2000)
    monkeypatch.setattr(couch, "READ_DOCUMENTS", 4)
    identifiers = [uuid7() for _ in range(10)]
    store = connect()
    requests = {image: 3, prediction: 3 + 3}  # predictions are looked up first
    fed: list[int] = []
    for half, least in requests.items():
        fed.clear()
        outcome = store.merge_in({name: half(name) for name in identifiers}, lambda: fed.append(1))
        assert sorted(outcome.stored) == identifiers
        assert len(fed) >= least
    assert all(map(is_complete, store.scan()))


def test_a_document_the_database_will_never_take_is_refused_and_the_rest_stored(
    connect: Callable[..., CouchDatabase],
) -> None:
    documents = {name: image(name) for name in (uuid7() for _ in range(5))}
    too_large = sorted(documents)[3]
    documents[too_large]["Data"] = "A" * 8_000_000  # CouchDB's max_document_size
    outcome = connect().merge_in(documents, nothing)
    assert list(outcome.refused) == [too_large]
    assert outcome.refused[too_large].reason is Reason.REFUSED_BY_DATABASE
    assert sorted([*outcome.stored, too_large]) == sorted(documents)


def test_an_image_at_hand_with_its_prediction_is_written_once(
    connect: Callable[..., CouchDatabase],
) -> None:
    store, identifier = connect(), uuid7()
    store.merge_in({identifier: merge(image(identifier), prediction(identifier))}, nothing)
    [found] = store.scan()
    assert found["_rev"].startswith("1-")
    assert STORED_AT in found


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"couchdb_database": "none"}, "IOT_COUCHDB_DATABASE"),
        ({"couchdb_user": "nobody"}, "IOT_COUCHDB_PASSWORD_FILE"),
        ({"couchdb_url": "http://127.0.0.1:1"}, "IOT_COUCHDB_URL"),
    ],
)
def test_what_keeps_the_database_away_is_an_outage_that_says_what_to_set(
    connect: Callable[..., CouchDatabase], changes: dict[str, str], words: str
) -> None:
    with pytest.raises(SinkUnavailable, match=words):
        connect(**changes).merge_in({"a": {"_id": "a"}}, nothing)


def test_a_new_password_is_taken_up(
    connect: Callable[..., CouchDatabase], database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    store = connect(couchdb_password_file=str(file))
    with pytest.raises(SinkUnavailable, match="refuses user"):
        store.read(["a"])
    file.write_text(database.user[1] + "\n")
    assert store.read(["a"]) == {}
    # While it is changed the file holds both, and the server knows either.
    file.write_text(f"next\n{database.user[1]}\n")
    assert connect(couchdb_password_file=str(file)).read(["a"]) == {}
    # The same for one that runs already, with what has become the old password.
    file.write_text("old\n")
    store = connect(couchdb_password_file=str(file))
    file.write_text(f"{database.user[1]}\nold\n")
    assert store.read(["a"]) == {}


def test_a_password_file_must_be_there(connect: Callable[..., CouchDatabase]) -> None:
    with pytest.raises(ConfigError, match="IOT_COUCHDB_PASSWORD_FILE"):
        connect(couchdb_password_file="/nowhere/password")
