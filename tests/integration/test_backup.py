"""Backup and restore against the real database: under traffic, twice, into what is there."""

from __future__ import annotations

import itertools
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest

from iot_lab.processes import CouchDB, Pipeline, free_port, wait_for
from iot_pipeline.backup import BackupFile, documents_of, new_backup
from iot_pipeline.progress import Progress
from iot_pipeline.restore import compare, merge_into
from iot_pipeline.schema import (
    Document,
    ImageMessage,
    PredictionMessage,
    content,
    document,
    first_uuid7,
    is_complete,
    now,
    uuid7,
)
from iot_pipeline.settings import StoreSettings, load
from iot_pipeline.stores import Store, open_store

_copies = (f"copy-{number}" for number in itertools.count())


def image(identifier: str, size: int = 2000) -> Document:
    return document(
        ImageMessage(
            id=identifier,
            ground_truth="cat",
            data=bytes(size),
            content_type="image/png",
            produced_at=datetime(2026, 1, 1, tzinfo=UTC),
            source="here",
        )
    )


def prediction(identifier: str) -> Document:
    return document(
        PredictionMessage(
            id=identifier,
            inferred_value="dog",
            confidence=0.5,
            model="m",
            inferred_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
    )


def old_ids(count: int) -> list[str]:
    """Ids of an hour ago: nobody expects news of those."""
    start = first_uuid7(now() - timedelta(hours=1))[:-12]
    return [f"{start}{number:012x}" for number in range(count)]


def write(store: Store, *documents: Document) -> None:
    for state in documents:
        store.merge_in({state["_id"]: state}, lambda: None)


def connect(pipeline: Pipeline, url: str = "") -> Store:
    flags = {"store_url": url} if url else {}
    return open_store(load(StoreSettings, flags, pipeline.database_environment))


def contents(store: Store) -> list[Document]:
    """All documents, without what each database makes of its own."""
    return [content(state) for state in store.scan()]


@pytest.fixture
def copy(pipeline: Pipeline) -> Iterator[str]:
    """The URL of an empty database beside the pipeline's own."""
    name = next(_copies)
    pipeline.database.create(name)
    yield pipeline.database.environment(name)["IOT_STORE_URL"]
    pipeline.database.drop(name)


@pytest.fixture
def copy_name(copy: str) -> str:
    """Its name."""
    return copy.rpartition("/")[2]


def backup(pipeline: Pipeline, path: Path, *flags: str) -> dict[str, Any]:
    done = pipeline.run("backup", str(path), "--json", *flags)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def restore(pipeline: Pipeline, path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    done = pipeline.run("restore", str(path), "--json", *flags)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_backup_becomes_an_equal_database_and_again_changes_nothing(
    pipeline: Pipeline, copy: str, tmp_path: Path
) -> None:
    # Several requests' worth, with photographs among them.
    store, file = connect(pipeline), tmp_path / "b"
    batch = {name: image(name) | prediction(name) for name in old_ids(1200)}
    for name in old_ids(1220)[1200:]:
        batch[name] = image(name, 900_000)
    batch["note"] = {"_id": "note", "Text": "by hand", "Serial": 10**20}
    store.merge_in(batch, lambda: None)
    made = backup(pipeline, file)
    assert (made["documents"], made["database"]) == (1221, pipeline.database_name)

    status, found = restore(pipeline, file, "--compare", "--store-url", copy)
    assert (status, found["missing"], found["identical"]) == (1, 1221, 0)
    status, found = restore(pipeline, file, "--store-url", copy)
    assert (status, found["restored"], found["refused"]) == (0, 1221, 0)
    status, found = restore(pipeline, file, "--compare", "--store-url", copy)
    assert (status, found["missing"], found["identical"]) == (0, 0, 1221)
    other = connect(pipeline, copy)
    assert contents(other) == contents(store)

    before = list(other.scan())
    assert restore(pipeline, file, "--store-url", copy)[0] == 0
    assert list(other.scan()) == before


def test_a_restore_completes_and_adds_and_takes_nothing_away(
    pipeline: Pipeline, copy: str, tmp_path: Path
) -> None:
    store, file = connect(pipeline), tmp_path / "b"
    whole, half, lost, since = old_ids(4)
    for name in (whole, half, lost):
        write(store, image(name), prediction(name))
    backup(pipeline, file)

    other = connect(pipeline, copy)
    write(other, image(whole) | {"Note": "mine"}, prediction(whole), prediction(half))
    write(other, image(since), prediction(since))
    status, found = restore(pipeline, file, "--compare", "--store-url", copy)
    # One lacks its image, and the other was completed later than the one in the backup.
    assert (status, found["missing"], found["different"]) == (1, 1, 2)
    assert restore(pipeline, file, "--store-url", copy)[0] == 0
    status, found = restore(pipeline, file, "--compare", "--store-url", copy)
    assert (status, found["identical"], found["newer"]) == (0, 2, 1)
    stored = {state["_id"]: state for state in contents(other)}
    assert list(stored) == [whole, half, lost, since]
    assert all(map(is_complete, stored.values()))
    assert stored[whole]["Note"] == "mine"


class Traffic:
    """Writes images, and a while later their predictions, until it is left."""

    def __init__(self, store: Store) -> None:
        self.done: list[str] = []
        self._store = store
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self._failure is None, self._failure

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more are written with their predictions."""
        enough = len(self.done) + count
        wait_for(lambda: len(self.done) >= enough, f"{count} documents")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                names = [uuid7() for _ in range(20)]
                self._store.merge_in({name: image(name) for name in names}, lambda: None)
                self._stop.wait(0.05)
                self._store.merge_in({name: prediction(name) for name in names}, lambda: None)
                self.done += names
        except BaseException as error:  # noqa: BLE001 - the test has to hear of it
            self._failure = error


def test_a_backup_under_traffic_has_all_of_before_and_no_halves(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    with Traffic(connect(pipeline)) as traffic:
        for number in range(5):
            traffic.wait_for_more(100)
            before = set(traffic.done)
            file = tmp_path / str(number)
            backup(pipeline, file)
            saved = list(BackupFile(file).documents())
            names = [state["_id"] for state in saved]
            assert len(names) == len(set(names))
            assert before <= set(names)
            assert all(map(is_complete, saved))


def test_a_restore_under_traffic_loses_and_doubles_nothing(
    pipeline: Pipeline, copy: str, tmp_path: Path
) -> None:
    store, file = connect(pipeline), tmp_path / "b"
    with Traffic(store) as before:
        before.wait_for_more(300)
    backup(pipeline, file)
    saved = contents(store)

    other = connect(pipeline, copy)
    lost_halves = {state["_id"]: image(state["_id"]) for state in saved[::3]}
    other.merge_in(lost_halves, lambda: None)
    with Traffic(connect(pipeline, copy)) as since:
        for _ in range(2):
            assert restore(pipeline, file, "--store-url", copy)[0] == 0
        since.wait_for_more(40)
    restored = {state["_id"]: state for state in contents(other)}
    assert set(restored) == {state["_id"] for state in saved} | set(since.done)
    assert all(map(is_complete, restored.values()))
    assert all(restored[state["_id"]] == state for state in saved)


def test_a_half_is_waited_for_while_it_is_young(pipeline: Pipeline) -> None:
    store = connect(pipeline)
    late, never = uuid7(), uuid7()
    [old] = old_ids(1)
    write(store, image(old), image(late), prediction(never))
    saved = list(documents_of(store, 2, lambda _: write(store, prediction(late))))
    assert {state["_id"]: is_complete(state) for state in saved} == {
        old: False,
        late: True,
        never: False,
    }
    waited: list[str] = []
    assert len(list(documents_of(store, 0, waited.append))) == 3
    assert waited == []


def test_a_file_that_is_not_whole_restores_nothing(
    pipeline: Pipeline, copy: str, tmp_path: Path
) -> None:
    file = tmp_path / "b"
    write(connect(pipeline), *(image(name) for name in old_ids(50)))
    backup(pipeline, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    done = pipeline.run("restore", str(file), "--store-url", copy)
    assert (done.returncode, str(file) in done.stderr) == (65, True), done.stderr
    assert contents(connect(pipeline, copy)) == []


def test_what_the_database_refuses_is_told(
    pipeline: Pipeline, database: CouchDB, copy: str, copy_name: str, tmp_path: Path
) -> None:
    store, file = connect(pipeline), tmp_path / "b"
    good, bad = old_ids(2)
    write(store, image(good), image(bad) | {"Note": "bad"})
    backup(pipeline, file)
    refuse = "function (doc) { if (doc.Note === 'bad') { throw({forbidden: 'not that one'}); } }"
    design = {"validate_doc_update": refuse}
    assert database.request("PUT", f"/{copy_name}/_design/refuse", design).status == 201
    done = pipeline.run("restore", str(file), "--store-url", copy)
    assert (done.returncode, f"1 documents of {file}" in done.stdout) == (1, True), done.stdout
    assert bad in done.stderr
    assert "not that one" in done.stderr
    assert [state["_id"] for state in contents(connect(pipeline, copy))] == [good]


def test_who_may_not_write_is_told_at_once(
    pipeline: Pipeline, database: CouchDB, copy: str, copy_name: str, tmp_path: Path
) -> None:
    store, file = connect(pipeline), tmp_path / "b"
    write(store, *(image(name, 900_000) for name in old_ids(20)))
    backup(pipeline, file)
    refuse = "function (doc) { throw({forbidden: 'you may read'}); }"
    database.request("PUT", f"/{copy_name}/_design/refuse", {"validate_doc_update": refuse})
    done = pipeline.run("restore", str(file), "--store-url", copy)
    assert (done.returncode, "you may read" in done.stderr) == (1, True), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_database_that_does_not_answer(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "b"
    nowhere = f"127.0.0.1:{free_port()}"
    url = ("--store-url", f"couchdb://{nowhere}/img_db")
    done = pipeline.run("backup", str(file), *url)
    assert (done.returncode, nowhere in done.stderr) == (69, True), done.stderr
    assert list(tmp_path.iterdir()) == []
    backup(pipeline, file)
    done = pipeline.run("restore", str(file), *url)
    # An empty backup has nothing to ask for.
    assert done.returncode == 0
    write(connect(pipeline), image(uuid7()))
    backup(pipeline, tmp_path / "c", "--grace", "0")
    done = pipeline.run("restore", str(tmp_path / "c"), *url)
    assert (done.returncode, nowhere in done.stderr) == (69, True), done.stderr


def test_memory_does_not_grow_with_the_database(
    pipeline: Pipeline, copy: str, tmp_path: Path
) -> None:
    store, other, size, names = connect(pipeline), connect(pipeline, copy), 370_000, old_ids(300)
    for start in range(0, len(names), 10):
        store.merge_in(
            {name: image(name, size) for name in names[start : start + 10]}, lambda: None
        )
    file = BackupFile(tmp_path / "b")
    tracemalloc.start()
    try:
        with new_backup(file.path, pipeline.database_name) as add:
            for state in documents_of(store, 0, lambda _: None):
                add(state)
        assert merge_into(other, file, Progress()) == {}
        assert compare(file, other, Progress()).identical == len(names)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size * len(names) / 2


def test_the_audit_of_a_rebuilt_pipeline_is_clean(
    make_pipeline: Callable[[], Pipeline], pipeline: Pipeline, tmp_path: Path
) -> None:
    store, file = connect(pipeline), tmp_path / "b"
    for name in old_ids(5):
        write(store, image(name), prediction(name))
    refused = old_ids(6)[-1]  # its dead letter is gone with the topics
    write(store, image(refused))
    backup(pipeline, file)
    with make_pipeline() as rebuilt:
        assert restore(rebuilt, file)[0] == 0
        status, audit = rebuilt.audit("--grace", "0")
        assert (status, audit["produced"], audit["stored"], audit["predicted"]) == (0, 6, 6, 5)
        assert (audit["missing"], audit["expired"], audit["duplicated"]) == (0, 1, 0)
        rebuilt.store().start().wait_ready()
        assert rebuilt.produce("--count", "3", "--interval", "0").start().wait(60) == 0
        wait_for(lambda: len(rebuilt.documents()) == 9, "new images")
        status, audit = rebuilt.audit("--grace", "0")
        # These have no prediction, since no inference runs.
        assert (status, audit["missing"], audit["expired"]) == (1, 3, 1)
