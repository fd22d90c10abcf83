"""What every store does, whichever server keeps its documents. Each test runs against each."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from iot_lab.processes import Database, free_port, wait_for
from iot_pipeline import stores
from iot_pipeline.audit import Ledger
from iot_pipeline.backup import BackupFile, documents_of, new_backup
from iot_pipeline.errors import Reason, SinkUnavailable
from iot_pipeline.progress import Progress
from iot_pipeline.restore import compare, merge_into
from iot_pipeline.schema import (
    REVISION,
    STORED_AT,
    Document,
    ImageMessage,
    PredictionMessage,
    content,
    document,
    is_complete,
    merge,
    uuid7,
)
from iot_pipeline.settings import StoreSettings, load
from iot_pipeline.stores import Outcome, Store, open_store

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
TOO_LARGE = 17_000_000  # characters, for any of them
SERVERS = ["database", "mongodb"]

Connect = Callable[..., Store]
_names = (f"stores-{number}" for number in itertools.count())


def image(identifier: str, data: bytes = b"image" * 20) -> Document:
    return document(
        ImageMessage(
            id=identifier,
            ground_truth="cat",
            data=data,
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


def merged(store: Store, *documents: Document) -> Outcome:
    return store.merge_in({state["_id"]: state for state in documents}, nothing)


def writes(state: Document) -> int:
    """How often a document was written."""
    return int(state[REVISION].partition("-")[0])


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Database:
    server: Database = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def make() -> Iterator[Callable[[Database], Connect]]:
    """Makes a database, and what opens it as often as one likes."""
    opened: list[Store] = []
    made: list[tuple[Database, str]] = []

    def make(server: Database) -> Connect:
        name = next(_names)
        server.create(name)
        made.append((server, name))

        def connect(**changes: str) -> Store:
            store = open_store(load(StoreSettings, changes, server.environment(name)))
            opened.append(store)
            return store

        return connect

    yield make
    for store in opened:
        store.close()
    for server, name in made:
        server.drop(name)


@pytest.fixture
def connect(make: Callable[[Database], Connect], server: Database) -> Connect:
    return make(server)


@pytest.mark.parametrize("halves", [(image, prediction), (prediction, image)])
def test_halves_become_one_document_in_any_order(
    connect: Connect, halves: tuple[Callable[[str], Document], ...]
) -> None:
    store, identifier = connect(), uuid7()
    first, second = (half(identifier) for half in halves)
    outcome = merged(store, first)
    assert not is_complete(outcome.stored[identifier])
    assert STORED_AT not in outcome.stored[identifier]
    outcome = merged(store, second)
    assert is_complete(outcome.stored[identifier])
    [found] = store.scan()
    assert content(found) == content(outcome.stored[identifier])
    assert first.items() | second.items() <= content(found).items()
    assert STORED_AT in found
    assert writes(found) == 2


ODD: list[Document] = [
    {"Data": None},
    {"Data": 7, "GroundTruth": ["cat"], "ProducedAt": {"at": True}, "Source": None},
    {"ID": 0.5, "InferredAt": [], "Confidence": "much", STORED_AT: None, "Data": {"length": 1}},
    {"InferredValue": {}, "Note": [None, {"a": [1.5, True]}], "ContentType": False},
]


@pytest.mark.parametrize("odd", ODD)
def test_whatever_stands_in_a_field_messages_go_on(connect: Connect, odd: Document) -> None:
    store, identifier = connect(), uuid7()
    # As who edits the database by hand leaves a document: what was there, changed.
    merged(store, image(identifier) | odd)
    for half in (prediction, image):
        assert identifier in merged(store, half(identifier)).stored
    [found] = store.scan()
    assert is_complete(found)
    assert [content(state) for state in documents_of(store, 0, lambda _: None)] == [content(found)]
    ledger = Ledger()
    ledger.saw_document(found)
    assert ledger.report(0, MOMENT).duplicated == 0


def test_what_comes_again_writes_nothing(connect: Connect) -> None:
    store, identifier = connect(), uuid7()
    for half in (image, prediction, image, prediction):
        assert identifier in merged(store, half(identifier)).stored
    [found] = store.scan()
    assert writes(found) == 2


def test_an_image_at_hand_with_its_prediction_is_written_once(connect: Connect) -> None:
    store, identifier = connect(), uuid7()
    merged(store, merge(image(identifier), prediction(identifier)))
    [found] = store.scan()
    assert (writes(found), STORED_AT in found) == (1, True)


def test_two_writers_at_once_lose_nothing(connect: Connect) -> None:
    identifiers = [uuid7() for _ in range(60)]

    def write(half: Callable[[str], Document], failures: list[BaseException]) -> None:
        try:
            merged(connect(), *(half(name) for name in identifiers))
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


def test_what_others_change_meanwhile_is_read_again(connect: Connect) -> None:
    """The write of the one who read before is refused, whatever it holds."""
    store, other, identifier = connect(), connect(), uuid7()
    merged(store, image(identifier))
    read = store.read

    def read_then_be_late(identifiers: list[str]) -> dict[str, Document]:
        store.read = read  # type: ignore[method-assign] # once
        found = read(identifiers)
        merged(other, {"_id": identifier, "Note": "first"})
        return found

    store.read = read_then_be_late  # type: ignore[method-assign,assignment]
    merged(store, prediction(identifier))
    [found] = store.scan()
    assert (found["Note"], is_complete(found), writes(found)) == ("first", True, 3)


def test_each_of_a_bulk_has_its_own_fate(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WRITE_BYTES", 10 * TOO_LARGE)
    store = connect()
    new, known, large, last = (uuid7() for _ in range(4))
    merged(store, prediction(known))
    states = [image(name) for name in (new, known, large, last)]
    states[2]["Data"] = "A" * TOO_LARGE
    outcome = merged(store, *states)
    assert list(outcome.refused) == [large]
    assert outcome.refused[large].reason is Reason.REFUSED_BY_DATABASE
    assert len(str(outcome.refused[large])) < 1000
    assert sorted(outcome.stored) == [new, known, last]
    found = {state["_id"]: is_complete(state) for state in store.scan()}
    assert found == {new: False, known: True, last: False}


@pytest.mark.parametrize(
    "added",
    [
        {"Note": "checked by hand", "Serial": 2**40, "Share": 0.1, "None": None, "Yes": True},
        {"Note": "é € 🦊 \x7f \n", "Empty": "", "Nothing": {}, "None": []},
        {"Nested": {"a": [1, {"b": [None, 2.5]}, "x"], "$b": 1, "c.d": {"$e": "f"}}},
    ],
)
def test_fields_of_others_are_kept(
    connect: Connect, server: Database, added: dict[str, object]
) -> None:
    identifier, store = uuid7(), connect()
    server.write(store.name.rpartition(".")[2], {"_id": identifier, **added})
    merged(store, image(identifier))
    merged(store, prediction(identifier))
    [found] = store.scan()
    assert content(found) == content(merge(merge(image(identifier), prediction(identifier)), found))
    assert {name: found[name] for name in added} == added


def test_documents_are_read_by_their_ids(connect: Connect) -> None:
    store, identifiers = connect(), [uuid7() for _ in range(5)]
    assert store.read(identifiers) == {}
    merged(store, *(image(name) for name in identifiers))
    found = store.read([*identifiers[3:], uuid7(), identifiers[0]])
    assert sorted(found) == [identifiers[0], *identifiers[3:]]
    assert all(content(state) == image(name) for name, state in found.items())


def test_a_scan_passes_every_page_once(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_PAGE_DOCUMENTS", 3)
    monkeypatch.setattr(stores, "PAGE_BYTES", 3000)
    store, identifiers = connect(), [uuid7() for _ in range(31)]
    assert list(store.scan()) == []
    merged(store, *(image(name) for name in identifiers))
    assert [state["_id"] for state in store.scan()] == identifiers
    assert [state["_id"] for state in store.scan(identifiers[20])] == identifiers[20:]
    assert [state["_id"] for state in store.scan(uuid7())] == []


def test_a_scan_goes_on_where_the_last_one_of_a_page_is_gone(
    make: Callable[[Database], Connect], server: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "FIRST_PAGE_DOCUMENTS", 3)
    store, identifiers = make(server)(), [uuid7() for _ in range(9)]
    merged(store, *(image(name) for name in identifiers[:4]))
    scan = store.scan()
    seen = [next(scan)["_id"] for _ in range(4)]
    merged(store, *(image(name) for name in identifiers[4:]))
    assert seen + [state["_id"] for state in scan] == identifiers


def test_large_documents_go_in_requests_of_bounded_size(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "WRITE_BYTES", 2000)
    monkeypatch.setattr(stores, "READ_DOCUMENTS", 4)
    store, identifiers = connect(), [uuid7() for _ in range(10)]
    requests = {image: 3, prediction: 3 + 3}  # predictions are looked up first
    fed: list[int] = []
    for half, least in requests.items():
        fed.clear()
        outcome = store.merge_in({name: half(name) for name in identifiers}, lambda: fed.append(1))
        assert sorted(outcome.stored) == identifiers
        assert len(fed) >= least
    assert all(map(is_complete, store.scan()))


def test_photographs_fit(connect: Connect) -> None:
    """More of them at once than a reply may hold."""
    store, names = connect(), [uuid7() for _ in range(90)]
    for name in names:
        merged(store, image(name, bytes(700_000)))
    merged(store, *(prediction(name) for name in names))
    assert [state["_id"] for state in store.scan() if is_complete(state)] == names


def test_an_outage_is_told_and_what_comes_after_it_is_written(
    connect: Connect, server: Database
) -> None:
    store, (before, after) = connect(store_timeout="3"), (uuid7(), uuid7())
    merged(store, image(before))
    server.stop()
    try:
        for half in (image(after), prediction(before)):
            with pytest.raises(SinkUnavailable, match=r"is not reachable.*IOT_STORE_URL"):
                merged(store, half)
    finally:
        server.start().wait_ready()

    def is_written() -> bool:
        try:
            return len(merged(store, image(after), prediction(before)).stored) == 2
        except SinkUnavailable:
            return False

    wait_for(is_written, "the same call to succeed")
    assert {state["_id"]: writes(state) for state in store.scan()} == {before: 2, after: 1}


def test_what_was_acknowledged_survives_a_kill(connect: Connect, server: Database) -> None:
    store = connect()
    acknowledged: list[str] = []
    for _ in range(30):
        names = [uuid7() for _ in range(7)]
        acknowledged += merged(store, *(image(name, b"x" * 2000) for name in names)).stored
        acknowledged += merged(store, *(prediction(name) for name in names[:3])).stored
    server.kill()
    server.start().wait_ready()
    found = {state["_id"]: state for state in connect().scan()}
    assert set(found) == set(acknowledged)
    assert sum(map(is_complete, found.values())) == 30 * 3
    # Nothing of what was being written is in the way of the same again.
    assert len(merged(connect(), *(prediction(name) for name in found)).stored) == 30 * 7


def test_a_server_that_is_not_there_is_told_by_its_address(
    connect: Connect, server: Database
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    url = server.environment("any")["IOT_STORE_URL"]
    url = url.replace(url.split("/")[2], nowhere)
    store = connect(store_url=url, store_timeout="2")
    for request in (lambda: store.read(["a"]), lambda: list(store.scan())):
        with pytest.raises(SinkUnavailable, match=rf"{nowhere} is not reachable.*refused"):
            request()


@pytest.mark.parametrize("source,target", list(itertools.permutations(SERVERS, 2)))
def test_a_backup_of_one_store_restores_into_another(
    source: str,
    target: str,
    make: Callable[[Database], Connect],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    old = make(request.getfixturevalue(source))()
    names = [uuid7() for _ in range(40)]
    merged(old, *(image(name) | {"Shelf": 7} for name in names))
    merged(old, *(prediction(name) for name in names[10:]))
    merged(old, {"_id": "note", "Text": "by hand", "Nested": {"a": [1, 2.5, None]}})
    file = BackupFile(tmp_path / "b")
    with new_backup(file.path, old.name) as add:
        for state in documents_of(old, 0, lambda _: None):
            add(state)
    assert (file.check().documents, file.check().database) == (41, old.name)

    new = make(request.getfixturevalue(target))()
    assert compare(file, new, Progress()).missing == 41
    for _ in range(2):
        assert merge_into(new, file, Progress()) == {}
        assert compare(file, new, Progress()).identical == 41
        assert list(map(content, new.scan())) == list(map(content, old.scan()))
        assert {writes(state) for state in new.scan()} == {1}
