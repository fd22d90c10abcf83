"""Images from one end to the other."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from testinfra.host import Host

PYTHON = "/opt/iot-pipeline/current/bin/python"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def produce(host: Host, count: int) -> None:
    """Sends images with the settings of the host's own service, beside it."""
    host.check_output(
        "runuser --user=iot-pipeline -- iot-pipeline produce --count %s --interval 0.2 "
        "--metrics-port 0 --source-name infra-tests",
        str(count),
    )


def test_every_image_is_stored_and_predicted_once(topology: Any, audit: Any) -> None:
    produce(topology.first("producers"), 20)
    seen = audit.wait(20)
    # The producer's own service may have sent a few more.
    assert seen["produced"] >= 20
    assert (seen["pending"], seen["missing"], seen["duplicated"]) == (0, 0, 0)
    assert seen["stored"] == seen["predicted"] == seen["produced"]
    assert seen["dead_lettered"] == 0
    assert 0 <= seen["accuracy"] <= 1


@dataclass(frozen=True)
class Backup:
    """A backup of the database on a storage host, and what `iot-pipeline backup` said of it."""

    storage: Host
    file: str
    said: dict[str, Any]


@pytest.fixture(scope="module")
def backup(topology: Any) -> Iterator[Backup]:
    storage = topology.first("storage_nodes")
    folder = storage.check_output("mktemp --directory /var/tmp/infra-tests.XXXXXX")
    file = f"{folder}/backup"
    # What other tests have had refused never gets its other half.
    command = "iot-pipeline backup %s --json --grace 5"
    try:
        yield Backup(storage, file, json.loads(storage.check_output(command, file)))
    finally:
        storage.check_output("rm -r %s", folder)


def test_documents_hold_image_and_prediction(
    backup: Backup, run_script: Callable[..., Any]
) -> None:
    # Ids sort by time, so these are the newest; the very last may still await its prediction.
    asked = {"file": backup.file, "newest": 30}
    newest = run_script(backup.storage, "read_backup.py", asked, PYTHON)
    images = [document for document in newest if "GroundTruth" in document]
    complete = [document for document in images if "InferredValue" in document]
    assert len(complete) >= 15
    for document in complete:
        assert document["ID"] == document["_id"]
        assert document["Data"]
        assert document["ContentType"] == "image/png"
        assert document["Source"]
        assert document["ProducedAt"]
        assert 0 < document["Confidence"] <= 1
        assert "@" in document["Model"]


# What who may only read hears when he writes.
REFUSALS = {"couchdb": "You may read this database", "mongodb": "may not use"}


def test_a_backup_is_whole(topology: Any, backup: Backup) -> None:
    made, storage = backup.said, backup.storage
    assert made["database"] == urlsplit(topology.variable("store_url")).path[1:]
    assert storage.file(backup.file).mode == 0o600
    # The database may have gained more by now, and lost nothing.
    found = storage.check_output("iot-pipeline restore %s --compare --json", backup.file)
    assert json.loads(found)["documents"] == made["documents"]


def test_who_makes_a_backup_may_not_restore_it(topology: Any, backup: Backup) -> None:
    if not topology.variable("store_has_users"):
        pytest.skip("the server that stands in for the database asks nobody who he is")
    # Were it let in, it would change nothing: all of it is there.
    refused = backup.storage.run(
        "iot-pipeline restore %s --env-file /etc/iot-pipeline/iot-audit.env", backup.file
    )
    assert refused.rc in {1, 69}, refused.stdout
    assert REFUSALS[urlsplit(topology.variable("store_url")).scheme] in refused.stderr


REASONS = {
    "invalid-base64",
    "invalid-json",
    "missing-field",
    "not-an-image",
    "too-many-pixels",
    "truncated-image",
}


def test_broken_records_are_set_aside_and_the_next_image_is_not(
    topology: Any, audit: Any, run_script: Callable[..., Any]
) -> None:
    producer, storage = topology.first("producers"), topology.first("storage_nodes")
    before = topology.services()
    read = "read_dead_letters.py"
    ends = run_script(storage, read, {"after": {}, "keys": []}, PYTHON)["ends"]
    sent = run_script(producer, "send_broken_records.py", {}, PYTHON)
    assert set(sent) == REASONS
    keys = [record["key"] for record in sent.values()]
    found = run_script(storage, read, {"after": ends, "keys": keys}, PYTHON)
    letters = {letter["key"]: letter for letter in found["letters"]}
    assert set(letters) == set(keys)
    for reason, record in sent.items():
        letter = letters[record["key"]]
        assert letter["value"] == record["value"]
        headers = letter["headers"]
        assert headers["error.class"] == reason
        assert headers["error.message"]
        assert headers["stage"] in {"iot-inference", "iot-storage"}
        assert headers["source.topic"] == topology.variable("pipeline_image_topic")
        assert headers["source.partition"].isdigit()
        assert headers["source.offset"].isdigit()

    produce(producer, 5)
    seen = audit.wait(5)
    assert seen["missing"] == 0
    assert seen["predicted"] >= 5
    assert topology.services() == before, "a service was started anew over a broken record"
