"""Storage between a real broker and a real database, of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kafka import KafkaProducer

from iot_lab.processes import Database, Pipeline, wait_for
from iot_pipeline.schema import ImageMessage, PredictionMessage, now, uuid7


@pytest.fixture(params=["database", "mongodb"])
def pipeline(
    request: pytest.FixtureRequest, make_pipeline: Callable[[Database], Pipeline]
) -> Iterator[Pipeline]:
    with make_pipeline(request.getfixturevalue(request.param)) as pipeline:
        yield pipeline


def make_messages(data: bytes = b"bytes of an image") -> tuple[ImageMessage, PredictionMessage]:
    identifier = uuid7()
    image = ImageMessage(
        id=identifier,
        ground_truth="cat",
        data=data,
        content_type="image/png",
        produced_at=now(),
        source="test",
    )
    prediction = PredictionMessage(
        id=identifier, inferred_value="dog", confidence=0.5, model="m@0123", inferred_at=now()
    )
    return image, prediction


def done_with(pipeline: Pipeline) -> bool:
    """Whether storage has committed everything in both topics."""
    committed = pipeline.broker.committed(f"{pipeline.prefix}iot-storage")
    ends = pipeline.broker.ends(pipeline.image_topic)
    ends |= pipeline.broker.ends(pipeline.prediction_topic)
    return all(committed.get(partition, 0) == end for partition, end in ends.items())


@pytest.mark.parametrize("order", ["prediction first", "image first"])
def test_image_and_prediction_merge_in_any_order(pipeline: Pipeline, order: str) -> None:
    image, prediction = make_messages()
    records = [
        (pipeline.image_topic, image.encode(), set(image.fields()) - {"ID"}),
        (pipeline.prediction_topic, prediction.encode(), set(prediction.fields()) - {"ID"}),
    ]
    if order == "prediction first":
        records.reverse()
    pipeline.store().start().wait_ready()
    expected: set[str] = set()
    for topic, value, fields in records:
        expected |= fields
        pipeline.broker.send(topic, value, image.key)

        def arrived(expected: set[str] = expected) -> bool:
            return expected <= pipeline.documents().get(image.id, {}).keys()

        wait_for(arrived, f"the document with {expected}")
    document = pipeline.documents()[image.id]
    assert image.fields().items() <= (document | {"ID": image.id}).items()
    assert prediction.fields().items() <= (document | {"ID": image.id}).items()
    assert "StoredAt" in document


def test_sigterm_commits_what_is_stored(pipeline: Pipeline) -> None:
    store = pipeline.store().start().wait_ready()
    assert pipeline.produce("--count", "60", "--interval", "0.01").start().wait(60) == 0
    wait_for(lambda: len(pipeline.documents()) >= 30, "half of the documents")
    assert store.stop() == 0
    stored = len(pipeline.documents())
    committed = pipeline.broker.committed(f"{pipeline.prefix}iot-storage")
    assert sum(committed.values()) == stored
    store.start().wait_ready()
    wait_for(lambda: done_with(pipeline), "the rest")
    assert len(pipeline.documents()) == 60
    revisions = [document["_rev"].split("-")[0] for document in pipeline.documents().values()]
    assert set(revisions) == {"1"}, "an image was written twice"


def test_a_database_outage_pauses_storage_and_loses_nothing(pipeline: Pipeline) -> None:
    group = f"{pipeline.prefix}iot-storage"
    store = pipeline.store().start().wait_ready()
    assert pipeline.produce("--count", "10", "--interval", "0.01").start().wait(60) == 0
    wait_for(lambda: done_with(pipeline), "the first images")
    members, committed = pipeline.broker.members(group), pipeline.broker.committed(group)
    assert len(members) == 1

    pipeline.database.stop()
    assert pipeline.produce("--count", "30", "--interval", "0.01").start().wait(60) == 0
    wait_for(lambda: store.output().count("sink down") >= 3, "three attempts")
    assert pipeline.broker.committed(group) == committed
    assert pipeline.broker.members(group) == members

    pipeline.database.start().wait_ready()
    wait_for(lambda: done_with(pipeline), "the others")
    assert len(pipeline.documents()) == 40
    assert pipeline.broker.members(group) == members
    assert "sink up" in store.output()


def test_other_commands_find_the_store_by_its_url(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.store().start().wait_ready()
    messages = [make_messages() for _ in range(10)]
    for message in (each for pair in messages for each in pair):
        is_image = isinstance(message, ImageMessage)
        topic = pipeline.image_topic if is_image else pipeline.prediction_topic
        pipeline.broker.send(topic, message.encode(), message.key)
    wait_for(lambda: pipeline.complete() == 10, "the documents")
    status, audit = pipeline.audit("--grace", "0", "--expect", "10")
    assert (status, audit["stored"], audit["predicted"], audit["missing"]) == (0, 10, 10, 0)

    done = pipeline.run("backup", str(tmp_path / "b"), "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    url = pipeline.database_environment["IOT_STORE_URL"]
    assert (made["documents"], made["database"]) == (10, url.rpartition("/")[2])
    copy = f"{pipeline.database_name}-copy"
    pipeline.database.create(copy)
    other = pipeline.database.environment(copy)["IOT_STORE_URL"]
    done = pipeline.run("restore", str(tmp_path / "b"), "--store-url", other)
    assert (done.returncode, other.rpartition("/")[2] in done.stdout) == (0, True), done
    done = pipeline.run("restore", str(tmp_path / "b"), "--compare", "--json", "--store-url", other)
    assert json.loads(done.stdout)["identical"] == 10
    assert pipeline.database.documents(copy).keys() == pipeline.documents().keys()


@pytest.mark.parametrize("stop_while", ["down", "up"])
def test_sigterm_during_an_outage_commits_nothing_that_is_not_stored(
    pipeline: Pipeline, stop_while: str, assert_stored: Callable[[Pipeline, int], None]
) -> None:
    store = pipeline.store().start().wait_ready()
    pipeline.database.stop()
    try:
        assert pipeline.produce("--count", "20", "--interval", "0.01").start().wait(60) == 0
        wait_for(lambda: "sink down" in store.output(), "the outage to be noticed")
        if stop_while == "down":
            assert store.stop() == 0
            committed = pipeline.broker.committed(f"{pipeline.prefix}iot-storage")
            assert sum(committed.values()) == 0
    finally:
        pipeline.database.start().wait_ready()
    if stop_while == "up":
        assert store.stop() == 0
    store.start().wait_ready()
    assert_stored(pipeline, 20)


@pytest.fixture
def assert_stored() -> Callable[[Pipeline, int], None]:
    def check(pipeline: Pipeline, images: int) -> None:
        wait_for(lambda: done_with(pipeline), "everything to be committed")
        assert len(pipeline.documents()) == images

    return check


def test_a_backlog_is_taken_in_step_to_its_end(pipeline: Pipeline) -> None:
    """Each document of a long backlog is written once, and no record stays behind."""
    images = 3000  # several fetches of each partition, and more than may wait in memory
    producer = KafkaProducer(bootstrap_servers=pipeline.broker.bootstrap_servers, linger_ms=20)
    messages = [make_messages(bytes(3000)) for _ in range(images)]
    for topic, place in ((pipeline.image_topic, 0), (pipeline.prediction_topic, 1)):
        for message in messages:
            producer.send(topic, key=message[place].key, value=message[place].encode())
    producer.flush()
    producer.close()
    # Without the patience that keeps the topics in step, each fetch that takes its time loses it.
    pipeline.store("--max-batch-size", "200", "--max-batch-delay", "0").start().wait_ready()
    wait_for(lambda: done_with(pipeline), "the end of both topics")
    documents = pipeline.documents().values()
    assert len(documents) == images
    assert all("StoredAt" in document for document in documents)
    once = sum(document["_rev"].startswith("1-") for document in documents)
    # At the end of a topic the partitions run out one after the other.
    assert once > 0.9 * images
