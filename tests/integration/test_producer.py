"""The producer against a real broker."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from kafka.partitioner import murmur2

from iot_lab.processes import PARTITIONS, App, Pipeline, wait_for
from iot_pipeline.produce import WINDOW_BYTES
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
        # Uncompressed, since what counts for the broker is the size that arrives.
        (20_000, ["--compression", "none"], "raise the topic's max.message.bytes"),
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


def sent_line(producer: App) -> dict[str, float]:
    """The numbers of the producer's last word."""
    line = next(line for line in producer.output().splitlines() if " info sent images=" in line)
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.e+]+)", line)}


def peak_mib(producer: App) -> float:
    """The most memory a running producer has held so far."""
    status = Path(f"/proc/{producer.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_broker_killed_under_full_load_gets_each_image_once(
    pipeline: Pipeline, compression: str
) -> None:
    producer = pipeline.produce("--interval", "0", "--compression", compression).start()
    wait_for(lambda: pipeline.produced() > 2000, "images")
    pipeline.broker.kill()
    peak = peak_mib(producer)
    wait_for(lambda: "broker does not confirm" in producer.output(), "a warning")
    # Images that cannot go anywhere do not pile up.
    assert peak_mib(producer) - peak < 2 * WINDOW_BYTES / 2**20
    pipeline.broker.start().wait_ready()
    before = pipeline.produced()
    wait_for(lambda: pipeline.produced() > before + 2000, "images again")
    assert producer.stop() == 0, producer.output()
    sent = sent_line(producer)
    messages = produced(pipeline, pipeline.image_topic)
    assert len({message.id for message in messages}) == len(messages) == sent["images"]
    assert sent["unconfirmed"] == 0


def test_images_lie_in_order_in_the_partitions_of_their_keys(pipeline: Pipeline) -> None:
    producer = pipeline.produce("--count", "10000", "--interval", "0").start()
    assert producer.wait(60) == 0, producer.output()
    records = pipeline.broker.records(pipeline.image_topic)
    assert len(records) == 10_000
    keys = [(record.partition, record.key) for record in records]
    assert keys == sorted(keys)
    for record in records:
        assert record.partition == (murmur2(record.key) & 0x7FFFFFFF) % PARTITIONS


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_those_too_large_for_the_topic_are_found_among_many(
    pipeline: Pipeline, tmp_path: Path, compression: str
) -> None:
    sizes = {f"{number:03}": 500 for number in range(100)}
    folder = make_images(tmp_path, sizes | {"020": 30_000, "021": 30_001, "077": 30_002})
    topic = f"{pipeline.image_topic}-limited"
    pipeline.broker.create_topics({topic: (4, 20_000)})
    producer = pipeline.produce(
        *("--source", str(folder), "--count", "1000", "--interval", "0"),
        *("--image-topic", topic, "--compression", compression),
    ).start()
    assert producer.wait(120) == 1, producer.output()
    messages = produced(pipeline, topic)
    assert [len(message.data) for message in messages] == [500] * 970
    assert len({message.id for message in messages}) == 970
    refusals = [line for line in producer.output().splitlines() if "image refused" in line]
    names = [line.split(" name=")[1].split()[0] for line in refusals]
    assert names == ["cat/020.png", "cat/021.png", "cat/077.png"] * 10
    assert (sent_line(producer)["images"], sent_line(producer)["refused"]) == (970, 30)


def test_large_images_do_not_fill_the_memory(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = make_images(tmp_path, {str(number): 700_000 for number in range(5)})
    producer = pipeline.produce("--source", str(folder), "--interval", "0").start().wait_ready()
    wait_for(lambda: pipeline.produced() > 200, "images")
    assert peak_mib(producer) < 200  # of the 256 that the role allows
    assert producer.stop() == 0


def test_sigterm_at_full_speed_leaves_nothing_unconfirmed(pipeline: Pipeline) -> None:
    producer = pipeline.produce("--interval", "0").start().wait_ready()
    wait_for(lambda: pipeline.produced() > 2000, "images")
    assert producer.stop() == 0
    last = sent_line(producer)
    assert last["unconfirmed"] == 0
    messages = produced(pipeline, pipeline.image_topic)
    assert len({message.id for message in messages}) == len(messages) == last["images"]


def test_sigterm_during_an_outage_says_what_is_not_confirmed(pipeline: Pipeline) -> None:
    producer = pipeline.produce("--interval", "0").start().wait_ready()
    pipeline.broker.kill()
    try:
        wait_for(lambda: "broker does not confirm" in producer.output(), "a warning")
        assert producer.stop() == 69, producer.output()
    finally:
        pipeline.broker.start().wait_ready()
    last = sent_line(producer)
    assert last["unconfirmed"] > 0
    assert f"images not confirmed at the end images={last['unconfirmed']:.0f} id=" in (
        producer.output()
    )
    keys = [record.key for record in pipeline.broker.records(pipeline.image_topic)]
    assert len(set(keys)) == len(keys) >= last["images"]


def test_sigterm_ends_it_between_two_images(pipeline: Pipeline) -> None:
    producer = pipeline.produce("--interval", "0.05").start().wait_ready()
    wait_for(lambda: len(pipeline.broker.records(pipeline.image_topic)) >= 3, "three images")
    assert producer.stop() == 0
    messages = produced(pipeline, pipeline.image_topic)
    assert len({message.id for message in messages}) == len(messages)
    assert "stopped service=iot-producer" in producer.output()


def test_a_source_that_is_none_is_said_before_anything_is_sent(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    (tmp_path / "images.tar").write_bytes(b"no archive")
    done = pipeline.run("produce", "--source", str(tmp_path / "images.tar"), "--count", "1")
    assert done.returncode == 78
    assert "is neither a folder nor a readable tar" in done.stderr
    assert pipeline.broker.records(pipeline.image_topic) == []


@pytest.mark.parametrize("interval", ["0", "0.1"])
def test_a_source_that_is_away_is_waited_for(
    pipeline: Pipeline, tmp_path: Path, interval: str
) -> None:
    folder, away = tmp_path / "set", tmp_path / "away"
    producer = pipeline.produce("--source", str(folder), "--interval", interval).start()
    wait_for(lambda: "source away" in producer.output(), "a warning")
    assert "there is no source" in producer.output()
    make_images(away, {str(number): 500 for number in range(3)})
    away.rename(folder)
    producer.wait_ready()
    wait_for(lambda: pipeline.produced() > 5, "images")
    folder.rename(away)
    folder.mkdir()
    wait_for(lambda: "is it mounted?" in producer.output(), "another warning")
    folder.rmdir()
    away.rename(folder)
    wait_for(lambda: producer.output().count("source is back") == 2, "the source")
    before = pipeline.produced()
    wait_for(lambda: pipeline.produced() > before + 5, "images again")
    assert producer.stop() == 0, producer.output()
    assert sent_line(producer)["unconfirmed"] == 0
    assert sent_line(producer)["images"] == pipeline.produced()
    assert "image skipped" not in producer.output()


@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_sigterm_is_heard_while_the_source_is_away(
    pipeline: Pipeline, tmp_path: Path, when: str
) -> None:
    folder = tmp_path / "set"
    if when == "in the middle":
        make_images(folder, {"1": 500, "2": 500})
    producer = pipeline.produce("--source", str(folder), "--interval", "0").start()
    if when == "in the middle":
        wait_for(lambda: pipeline.produced() > 5, "images")
        folder.rename(tmp_path / "away")
    wait_for(lambda: producer.output().count("source away") >= 2, "warnings")
    assert producer.stop() == 0, producer.output()
    if when == "in the middle":
        assert sent_line(producer)["unconfirmed"] == 0
        assert sent_line(producer)["images"] == pipeline.produced()
