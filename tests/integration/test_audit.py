"""The audit's verdicts and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

from iot_lab.processes import Pipeline, free_port, wait_for


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
