"""Images from one end to the other."""

import datetime as dt
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

PYTHON = "/opt/iot-pipeline/current/bin/python"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")


def produce(host: Host, count: int) -> None:
    """Sends images with the settings of the host's own service, beside it."""
    host.check_output(
        "runuser --user=iot-pipeline -- iot-pipeline produce --count %s --interval 0.2 "
        "--metrics-port 0 --source-name infra-tests",
        count,
    )


def audit(host: Host, since: str) -> dict[str, Any]:
    """The audit of what was produced since then."""
    found: dict[str, Any] = json.loads(
        host.run("iot-pipeline audit --json --since %s", since).stdout
    )
    return found


def wait_for(
    look: Callable[[], dict[str, Any]], good: Callable[[dict[str, Any]], bool], seconds: float = 60
) -> dict[str, Any]:
    """Looks until it is good or the time is up, and returns what was seen last."""
    deadline = time.monotonic() + seconds
    while not good(seen := look()) and time.monotonic() < deadline:
        time.sleep(1)
    return seen


def test_every_image_is_stored_and_predicted_once(topology: Any) -> None:
    producer, storage = topology.first("producers"), topology.first("storage_nodes")
    since = now()
    produce(producer, 20)
    seen = wait_for(
        lambda: audit(storage, since),
        lambda a: a["produced"] >= 20 and not a["pending"] and not a["missing"],
    )
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
        "curl --silent --fail --netrc-file /root/.netrc-couchdb %s",
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


# Runs on a host of the pipeline: sends what must not be handled, and waits for it to come back.
BREAK = r"""
import base64, io, json, sys, time, uuid
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

servers, images, letters = sys.argv[1:4]
good = {
    "ID": "", "GroundTruth": "cat", "Data": base64.b64encode(b"no image").decode(),
    "ContentType": "image/png", "ProducedAt": "2026-01-01T00:00:00.000000Z",
    "Source": "infra-tests",
}
cases = {
    "not-json": b"{not json",
    "missing-field": json.dumps({k: v for k, v in good.items() if k != "GroundTruth"}).encode(),
    "wrong-base64": json.dumps(good | {"Data": "!!!"}).encode(),
    "not-an-image": json.dumps(good).encode(),
}
consumer = KafkaConsumer(bootstrap_servers=servers.split(","))
partitions = [TopicPartition(letters, p) for p in consumer.partitions_for_topic(letters)]
consumer.assign(partitions)
for partition, offset in consumer.end_offsets(partitions).items():
    consumer.seek(partition, offset)

producer = KafkaProducer(bootstrap_servers=servers.split(","), acks="all")
sent = {}
for case, value in cases.items():
    key = str(uuid.uuid4())
    sent[key] = case
    value = value.replace(b'"ID": ""', f'"ID": "{key}"'.encode())
    producer.send(images, key=key.encode(), value=value)
producer.flush(30)

found, deadline = {}, time.monotonic() + 60
while set(found) != set(cases) and time.monotonic() < deadline:
    for records in consumer.poll(timeout_ms=1000).values():
        for record in records:
            case = sent.get((record.key or b"").decode())
            if case:
                found[case] = {name: value.decode() for name, value in record.headers}
print(json.dumps(found))
"""


def test_broken_records_are_set_aside_and_the_next_image_is_not(topology: Any) -> None:
    producer, storage = topology.first("producers"), topology.first("storage_nodes")
    before = topology.services()
    since = now()
    images = topology.variable("pipeline_image_topic")
    letters = json.loads(
        producer.check_output(
            f"{PYTHON} -c %s %s %s %s",
            BREAK,
            topology.variable("kafka_bootstrap_servers"),
            images,
            topology.variable("pipeline_dead_letter_topic"),
        )
    )
    assert set(letters) == {"not-json", "missing-field", "wrong-base64", "not-an-image"}
    for reason in letters.values():
        assert reason["error.class"]
        assert reason["error.message"]
        assert reason["stage"] in {"iot-inference", "iot-storage"}
        assert reason["source.topic"] == images
        assert reason["source.partition"].isdigit()
        assert reason["source.offset"].isdigit()

    produce(producer, 5)
    seen = wait_for(
        lambda: audit(storage, since),
        lambda a: a["produced"] >= 5 and not a["pending"] and not a["missing"],
    )
    assert seen["missing"] == 0
    assert seen["predicted"] >= 5
    assert topology.services() == before, "a service was started anew over a broken record"
