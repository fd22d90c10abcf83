"""The producer against a real broker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iot_lab.processes import Pipeline, wait_for
from iot_pipeline.schema import ImageMessage
from iot_pipeline.sources import open_source


def make_images(folder: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        path = folder / "cat" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    return folder


def produced(pipeline: Pipeline, topic: str) -> list[ImageMessage]:
    records = pipeline.broker.records(topic)
    messages = [ImageMessage.decode(record.value) for record in records]
    assert [record.key for record in records] == [message.key for message in messages]
    return sorted(messages, key=lambda message: message.id)


def test_images_come_in_order_and_the_source_begins_again(pipeline: Pipeline) -> None:
    with open_source("sample") as source:
        expected = [(image.label, image.data) for image in source]
    count = len(expected) + 5
    producer = pipeline.produce("--count", str(count), "--interval", "0").start()
    assert producer.wait(60) == 0, producer.output()
    messages = produced(pipeline, pipeline.image_topic)
    assert [(m.ground_truth, m.data) for m in messages] == [*expected, *expected[:5]]
    assert len({message.id for message in messages}) == count
    assert [m.produced_at for m in messages] == sorted(m.produced_at for m in messages)


def test_shuffled_images_are_the_same_for_the_same_seed(pipeline: Pipeline) -> None:
    orders = []
    for number, seed in enumerate((5, 5, 6)):
        topic = f"{pipeline.image_topic}-{number}"
        pipeline.broker.create_topics({topic: (1, 100_000)})
        flags = ["--shuffle", "--seed", str(seed), "--count", "30", "--interval", "0"]
        producer = pipeline.produce(*flags, "--image-topic", topic).start()
        assert producer.wait(60) == 0, producer.output()
        orders.append([message.data for message in produced(pipeline, topic)])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    "topic_limit, flags, named",
    [
        (1_100_000, ["--max-record-bytes", "20000"], "IOT_MAX_RECORD_BYTES=20000"),
        (20_000, [], "raise the topic's max.message.bytes"),
    ],
    ids=["by our limit", "by the broker's limit"],
)
def test_too_large_an_image_is_refused_and_the_next_ones_are_sent(
    pipeline: Pipeline, tmp_path: Path, topic_limit: int, flags: list[str], named: str
) -> None:
    folder = make_images(tmp_path, {"a": 500, "b": 18_000, "c": 500, "d": 18_001, "e": 500})
    topic = f"{pipeline.image_topic}-limited"
    # One partition, so that the records refused and those taken share a sequence.
    pipeline.broker.create_topics({topic: (1, topic_limit)})
    producer = pipeline.produce(
        *("--source", str(folder), "--count", "6", "--interval", "0"),
        *("--image-topic", topic),
        *flags,
    ).start()
    assert producer.wait(60) == 1, producer.output()
    assert [len(message.data) for message in produced(pipeline, topic)] == [500] * 4
    refusals = [line for line in producer.output().splitlines() if "image refused" in line]
    assert len(refusals) == 2
    assert "name=cat/b.png image_bytes=18000" in refusals[0]
    assert "name=cat/d.png image_bytes=18001" in refusals[1]
    for line in refusals:
        assert " error id=" in line.replace(" image refused", "")
        assert named in line


def test_sigterm_ends_it_between_two_images(pipeline: Pipeline) -> None:
    producer = pipeline.produce("--interval", "0.05").start().wait_ready()
    wait_for(lambda: len(pipeline.broker.records(pipeline.image_topic)) >= 3, "three images", 30)
    assert producer.stop() == 0
    messages = produced(pipeline, pipeline.image_topic)
    assert len({message.id for message in messages}) == len(messages)
    assert "stopped service=iot-producer" in producer.output()


def test_a_wrong_source_is_said_before_anything_is_sent(pipeline: Pipeline, tmp_path: Path) -> None:
    done = pipeline.run("produce", "--source", str(tmp_path / "nothing"), "--count", "1")
    assert done.returncode == 78
    assert "there is no source" in done.stderr
    assert pipeline.broker.records(pipeline.image_topic) == []
