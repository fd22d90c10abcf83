"""The audit's verdicts and exit statuses."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kafka import KafkaProducer

from iot_lab.processes import Pipeline, free_port, wait_for
from iot_pipeline.schema import (
    LOG_APPEND_TIME,
    DeadLetter,
    ImageMessage,
    PredictionMessage,
    document,
    first_uuid7,
    now,
    uuid7,
)
from iot_pipeline.settings import StoreSettings, load
from iot_pipeline.stores import open_store

FAR_AHEAD = "f1234567-89ab-7cde-8f01-23456789abcd"
LONG_AGO = datetime(1970, 1, 2, tzinfo=UTC)


def image(identifier: str) -> ImageMessage:
    return ImageMessage(
        id=identifier,
        ground_truth="cat",
        data=b"image",
        content_type="image/png",
        produced_at=LONG_AGO,
        source="camera-1",
    )


def prediction(identifier: str) -> PredictionMessage:
    return PredictionMessage(
        id=identifier, inferred_value="cat", confidence=1, model="m", inferred_at=LONG_AGO
    )


def delete_all(pipeline: Pipeline) -> None:
    """Delete the images' records, as the broker does once their time is over."""
    with pipeline.broker.admin() as admin:
        admin.delete_records(pipeline.broker.ends(pipeline.image_topic))


def test_nothing_produced_is_clean(pipeline: Pipeline) -> None:
    status, audit = pipeline.audit()
    assert (status, audit["produced"], audit["missing"]) == (0, 0, 0)
    assert set(audit) >= {
        "produced",
        "stored",
        "predicted",
        "missing",
        "duplicated",
        "dead_lettered",
        "accuracy",
    }


def test_young_images_are_pending_and_old_ones_missing(pipeline: Pipeline) -> None:
    assert pipeline.produce("--count", "5", "--interval", "0").start().wait(60) == 0
    status, audit = pipeline.audit("--grace", "600")
    assert (status, audit["pending"], audit["missing"]) == (0, 5, 0)
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["pending"], audit["missing"]) == (1, 0, 5)
    assert (audit["produced"], audit["stored"], audit["predicted"]) == (5, 0, 0)


def test_a_result_is_left_for_those_who_look_later(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    file.write_text("of before")
    status, audit = pipeline.audit("--record", str(file))
    left = json.loads(file.read_text())
    assert (status, left.pop("at")[-1]) == (0, "Z")
    assert left == audit
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]


def test_stored_without_prediction_is_missing(pipeline: Pipeline) -> None:
    pipeline.store().start().wait_ready()
    assert pipeline.produce("--count", "5", "--interval", "0").start().wait(60) == 0
    wait_for(lambda: len(pipeline.documents()) == 5, "the documents")
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["stored"], audit["predicted"], audit["missing"]) == (1, 5, 0, 5)


def test_an_image_sent_twice_is_one_image(pipeline: Pipeline) -> None:
    assert pipeline.produce("--count", "3", "--interval", "0").start().wait(60) == 0
    record = pipeline.broker.records(pipeline.image_topic)[0]
    pipeline.broker.send(pipeline.image_topic, record.value, record.key)
    _status, audit = pipeline.audit()
    assert (audit["produced"], audit["redelivered"], audit["duplicated"]) == (3, 1, 0)


def test_no_broker_and_no_database_are_told_apart_from_missing_images(pipeline: Pipeline) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    done = pipeline.run("audit", "--bootstrap-servers", nowhere)
    assert (done.returncode, nowhere in done.stderr) == (69, True), done.stderr
    done = pipeline.run("audit", "--store-url", f"couchdb://{nowhere}/img_db")
    assert (done.returncode, nowhere in done.stderr) == (69, True), done.stderr


def test_a_record_bears_the_time_of_its_arrival(pipeline: Pipeline) -> None:
    """So that Kafka keeps it for as long as it keeps others, whatever its sender's clock says."""
    began = time.time()
    producer = KafkaProducer(**pipeline.broker.client(), acks="all")
    ten_days_ago = int((began - 10 * 86400) * 1000)
    for moment in (1, ten_days_ago, int((began + 10 * 86400) * 1000)):
        producer.send(pipeline.image_topic, b"{}", timestamp_ms=moment).get(30)
    producer.close()
    records = pipeline.broker.records(pipeline.image_topic)
    assert {record.timestamp_type for record in records} == {LOG_APPEND_TIME}
    assert len(records) == 3
    assert all(record.timestamp / 1000 > began - 1 for record in records)


@pytest.mark.parametrize("since", [(), ("--since", "1h")])
def test_devices_with_wrong_clocks_are_audited_like_others(
    pipeline: Pipeline, since: tuple[str, ...]
) -> None:
    whole, lost = (first_uuid7(LONG_AGO + timedelta(days=day)) for day in (0, 1))
    ahead = first_uuid7(now() + timedelta(hours=20))
    for identifier in (whole, lost, ahead):
        message = image(identifier)
        pipeline.broker.send(pipeline.image_topic, message.encode(), message.key)
    predicted = prediction(whole)
    pipeline.broker.send(pipeline.prediction_topic, predicted.encode(), predicted.key)
    status, audit = pipeline.audit("--grace", "600", *since)
    assert (status, audit["produced"], audit["pending"]) == (0, 3, 3)
    pipeline.store().start().wait_ready()
    wait_for(lambda: pipeline.complete() == 1, "the document")
    wait_for(lambda: len(pipeline.documents()) == 3, "the documents")
    status, audit = pipeline.audit("--grace", "0", *since)
    assert (status, audit["produced"], audit["stored"], audit["missing"]) == (1, 3, 3, 2), audit
    assert set(audit["missing_examples"]) == {lost, ahead}


def test_an_id_from_far_ahead_is_a_dead_letter(pipeline: Pipeline) -> None:
    workers = [pipeline.store().start(), pipeline.infer().start()]
    for worker in workers:
        worker.wait_ready()
    message = image(FAR_AHEAD)
    pipeline.broker.send(pipeline.image_topic, message.encode(), message.key)
    wait_for(lambda: len(pipeline.broker.records(pipeline.dead_letter_topic)) == 2, "both letters")
    letters = [
        DeadLetter.from_headers(record.headers)
        for record in pipeline.broker.records(pipeline.dead_letter_topic)
    ]
    assert {letter.reason for letter in letters} == {"invalid-field"}
    assert {letter.stage for letter in letters} == {"iot-storage", "iot-inference"}
    assert pipeline.documents() == {}
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["missing"], audit["dead_lettered"]) == (0, 0, 1), audit


def test_what_is_stored_from_far_ahead_is_survived(pipeline: Pipeline, tmp_path: Path) -> None:
    settings = load(StoreSettings, {}, pipeline.tool_environment("iot-storage"))
    with open_store(settings) as store:
        store.merge_in({FAR_AHEAD: document(image(FAR_AHEAD))}, lambda: None)
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["expired"], audit["missing"]) == (0, 1, 0), audit
    done = pipeline.run("backup", str(tmp_path / "b"), "--grace", "1", "--json")
    assert (done.returncode, json.loads(done.stdout)["documents"]) == (0, 1), done.stderr


def test_what_kafka_deleted_before_it_was_read_is_lost(pipeline: Pipeline) -> None:
    assert pipeline.produce("--count", "12", "--interval", "0").start().wait(60) == 0
    status, audit = pipeline.audit()
    assert (status, audit["lost"]) == (0, 0)
    delete_all(pipeline)
    status, audit = pipeline.audit()
    assert (status, audit["produced"], audit["lost"]) == (1, 0, 12), audit
    groups = {f"{pipeline.prefix}iot-{stage}": 12 for stage in ("inference", "storage")}
    assert audit["lost_by_group"] == groups
    # A stage that has read what follows has lost it all the same, but stands behind it.
    app = pipeline.store().start()
    app.wait_ready()
    assert pipeline.produce("--count", "40", "--interval", "0").start().wait(60) == 0
    wait_for(lambda: len(pipeline.documents()) == 40, "the documents")
    assert app.stop() == 0
    delete_all(pipeline)
    groups = {f"{pipeline.prefix}iot-inference": 52}
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["lost"], audit["lost_by_group"]) == (1, 52, groups), audit


def test_two_images_under_one_id_are_told(pipeline: Pipeline) -> None:
    identifier = uuid7()
    for data in (b"one", b"two"):
        message = replace(image(identifier), data=data)
        pipeline.broker.send(pipeline.image_topic, message.encode(), message.key)
    _status, audit = pipeline.audit()
    assert (audit["produced"], audit["redelivered"], audit["conflicting"]) == (1, 1, 1)
