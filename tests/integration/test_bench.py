"""The programs that `make bench` runs on hosts, against a real broker and a real database."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from iot_lab.paths import ROOT
from iot_lab.processes import APPS, PARTITIONS, Pipeline, wait_for
from iot_pipeline.schema import STORED_AT, PredictionMessage

SCRIPTS = ROOT / "tests" / "bench"
IMAGES = 40


def run(pipeline: Pipeline, script: str, *words: str, request: Any = None, **more: str) -> Any:
    environment = {**os.environ, **pipeline.database_environment, "IOT_THREADS": "2", **more}
    done = subprocess.run(
        [str(APPS / "python"), str(SCRIPTS / f"{script}.py"), *words],
        check=False,
        capture_output=True,
        text=True,
        input=json.dumps(request),
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def produce(pipeline: Pipeline) -> None:
    done = pipeline.run("produce", "--interval", "0", "--count", str(IMAGES))
    assert done.returncode == 0, done.stderr


def test_the_plain_consumer_does_the_same_work(pipeline: Pipeline) -> None:
    produce(pipeline)
    # The first message only starts the clock.
    done = run(pipeline, "baseline", "infer", "60", IOT_GROUP_ID=f"{pipeline.prefix}plain-infer")
    assert done["messages"] == IMAGES - 1
    records = pipeline.broker.records(pipeline.prediction_topic)
    predictions = [PredictionMessage.decode(record.value) for record in records]
    assert len(predictions) == IMAGES
    done = run(pipeline, "baseline", "store", "60", IOT_GROUP_ID=f"{pipeline.prefix}plain-store")
    assert done["messages"] == 2 * IMAGES - 1
    documents = pipeline.documents().values()
    assert len(documents) == IMAGES
    assert all(
        {"Data", "GroundTruth", "InferredValue"} <= document.keys() for document in documents
    )


def test_bulk_docs_writes_complete_documents(pipeline: Pipeline) -> None:
    produce(pipeline)
    with pipeline.infer() as worker:
        assert worker.running
        ends = pipeline.broker.ends
        wait_for(lambda: sum(ends(pipeline.prediction_topic).values()) == IMAGES, "predictions")
    done = run(pipeline, "bulk_docs", str(IMAGES), "16")
    assert done["documents"] == IMAGES
    documents = pipeline.documents().values()
    assert len(documents) == IMAGES
    assert all(STORED_AT in document for document in documents)


def test_topics_are_made_like_others_and_removed(pipeline: Pipeline) -> None:
    servers = pipeline.broker.bootstrap_servers.split(",")
    name = "iot-bench-images-1."
    topic = {"name": name, "partitions": PARTITIONS, "like": pipeline.image_topic}
    request: dict[str, Any] = {"action": "create", "servers": servers, "topics": [topic]}
    run(pipeline, "topics", request=request)
    produce(pipeline)
    pipeline.broker.send(name, b"value")
    run(pipeline, "topics", request={**request, "action": "records", "topic": name})
    request = {"action": "values", "servers": servers, "topic": name, "count": 1}
    assert run(pipeline, "topics", request=request) == ["value"]
    group = "iot-bench-group"
    consume = pipeline.infer("--group-id", group, "--image-topic", name)
    with consume:
        pass
    run(pipeline, "topics", request={"action": "remove", "servers": servers, "prefix": name})
    run(pipeline, "topics", request={"action": "remove", "servers": servers, "prefix": group})
    with pipeline.broker.admin() as admin:
        assert name not in admin.list_topics()
        assert group not in [found["group_id"] for found in admin.list_groups()]
        assert pipeline.image_topic in admin.list_topics()
