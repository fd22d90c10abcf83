"""Images from one end to the other."""

import json
from collections.abc import Callable
from typing import Any

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


def test_documents_hold_image_and_prediction(topology: Any) -> None:
    server = topology.first("couchdb_servers")
    url = f"{topology.variable('couchdb_url')}/{topology.variable('couchdb_database')}"
    # Ids sort by time, so these are the newest; the very last may still await its prediction.
    answer = server.check_output(
        "curl --silent --show-error --fail --netrc-file /root/.netrc-couchdb --cacert %s %s",
        f"{topology.variable('pki_dir')}/ca.pem",
        f"{url}/_all_docs?include_docs=true&descending=true&limit=30",
    )
    documents = [row["doc"] for row in json.loads(answer)["rows"] if "GroundTruth" in row["doc"]]
    complete = [document for document in documents if "InferredValue" in document]
    assert len(complete) >= 15
    for document in complete:
        assert document["ID"] == document["_id"]
        assert document["Data"]
        assert 0 < document["Confidence"] <= 1
        assert "@" in document["Model"]


def test_a_backup_is_whole_and_who_makes_it_may_not_restore(topology: Any) -> None:
    storage = topology.first("storage_nodes")
    folder = storage.check_output("mktemp --directory /var/tmp/infra-tests.XXXXXX")
    file = f"{folder}/backup"
    try:
        made = json.loads(storage.check_output("iot-pipeline backup %s --json", file))
        assert made["database"] == topology.variable("couchdb_database")
        assert storage.file(file).mode == 0o600
        # The database may have gained more by now, and lost nothing.
        found = storage.check_output("iot-pipeline restore %s --compare --json", file)
        assert json.loads(found)["documents"] == made["documents"]
        # Were it let in, it would change nothing: all of it is there.
        refused = storage.run(
            "iot-pipeline restore %s --env-file /etc/iot-pipeline/iot-audit.env", file
        )
        assert refused.rc == 1, refused.stdout
        assert "You may read this database" in refused.stderr
    finally:
        storage.check_output("rm -r %s", folder)


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
