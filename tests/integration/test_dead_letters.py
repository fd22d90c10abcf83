"""What can be done with dead letters: look at them, send them again, and be done with them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from kafka import KafkaProducer

from iot_lab.processes import APPS, MAX_RECORD_BYTES, Pipeline, wait_for
from iot_pipeline.errors import InvalidMessage, Reason
from iot_pipeline.replay import BATCH_RECORDS
from iot_pipeline.schema import REPLAYED_FROM, DeadLetter, format_time, now, uuid7

JUNK = b'{"ID": "01a1'


def listed(pipeline: Pipeline, *words: str) -> list[dict[str, Any]]:
    done = pipeline.dead_letters("list", "--json", *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass
class Source:
    """A record that no service has to have read: where it stood, and what was in it."""

    topic: str
    offset: int
    key: bytes | None
    value: bytes | None
    partition: int = 0
    timestamp: int = 0
    timestamp_type: int = 0


def bury(pipeline: Pipeline, sources: Sequence[Source]) -> None:
    """Make dead letters as a service does, many at once."""
    producer = KafkaProducer(**pipeline.broker.client("kafka"), acks="all", max_request_size=2**22)
    error = InvalidMessage(Reason.TOO_MANY_PIXELS, "too many pixels for now")
    for source in sources:
        letter = DeadLetter.of(source, error, "iot-inference")
        # As of one that is too large to come along.
        headers = replace(letter, without_value=source.value == b"").headers()
        producer.send(
            pipeline.dead_letter_topic, key=source.key, value=source.value, headers=headers
        )
    producer.flush()
    producer.close()


def test_what_is_replayed_once_its_cause_is_gone_is_stored_and_the_audit_is_clean(
    pipeline: Pipeline,
) -> None:
    pipeline.store().start().wait_ready()
    narrow = pipeline.infer("--max-image-pixels", "64").start()
    narrow.wait_ready()
    assert pipeline.produce("--count", "6", "--interval", "0").start().wait(60) == 0
    wait_for(lambda: len(listed(pipeline)) == 6, "six dead letters")
    later = format_time(now())
    sent = pipeline.broker.send(pipeline.image_topic, JUNK, b"junk")
    wait_for(lambda: len(listed(pipeline)) == 8, "two more, of both services")
    narrow.stop()
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["missing"], audit["predicted"]) == (0, 0, 0)
    assert (audit["dead_lettered"], audit["open_dead_letters"]) == (7, 7)

    # By reason, stage, time and name.
    images = listed(pipeline, "--reason", "too-many-pixels")
    assert {letter["key"] for letter in images} == set(pipeline.documents())
    junk = listed(pipeline, "--since", later)
    assert {letter["stage"] for letter in junk} == {"iot-inference", "iot-storage"}
    assert {letter["source_offset"] for letter in junk} == {sent.offset}
    assert len(listed(pipeline, "--until", later)) == 6
    assert len(listed(pipeline, "junk", images[0]["position"])) == 3
    assert [letter["key"] for letter in listed(pipeline, "--stage", "iot-storage")] == ["junk"]
    text = pipeline.dead_letters("list").stdout
    assert "too-many-pixels 6, invalid-json 2" in text
    shown = json.loads(pipeline.dead_letters("show", "--json", images[0]["key"]).stdout)
    original = {record.key: record for record in pipeline.broker.records(pipeline.image_topic)}
    assert base64.b64decode(shown["value"]) == original[images[0]["key"].encode()].value
    assert "not JSON" in pipeline.dead_letters("show", "junk").stdout

    # Nothing is done unless someone wants it.
    ends = pipeline.broker.ends(pipeline.image_topic)
    dry = pipeline.dead_letters("replay", "--dry-run")
    assert (dry.returncode, "To replay: 8 dead letters" in dry.stdout) == (0, True), dry.stderr
    unasked = pipeline.dead_letters("replay")
    assert (unasked.returncode, "--yes" in unasked.stderr) == (64, True)
    assert pipeline.broker.ends(pipeline.image_topic) == ends

    pipeline.infer().start().wait_ready()
    done = pipeline.dead_letters("replay", "--reason", "too-many-pixels", "--yes")
    assert (done.returncode, "Done: 6 of 6." in done.stdout) == (0, True), done.stderr
    wait_for(lambda: pipeline.complete() == 6, "the documents")
    again = [record for record in pipeline.broker.records(pipeline.image_topic) if record.headers]
    assert {record.key: record.value for record in again} == {
        letter["key"].encode(): original[letter["key"].encode()].value for letter in images
    }
    assert {name for record in again for name, _ in record.headers} == {REPLAYED_FROM}
    status, audit = pipeline.audit("--grace", "0")
    counts = ("produced", "stored", "predicted", "missing", "duplicated")
    assert (status, [audit[name] for name in counts]) == (0, [6, 6, 6, 0, 0]), audit
    assert (audit["dead_lettered"], audit["open_dead_letters"]) == (7, 1)

    done = pipeline.dead_letters("drop", "junk", "--yes")
    assert (done.returncode, "Done: 2 of 2." in done.stdout) == (0, True), done.stderr
    assert listed(pipeline) == []
    states = [letter["state"] for letter in listed(pipeline, "--all")]
    assert (states.count("replayed"), states.count("dropped")) == (6, 2)
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["dead_lettered"], audit["open_dead_letters"]) == (0, 7, 0)


def test_what_is_refused_again_comes_back_as_new_dead_letters(pipeline: Pipeline) -> None:
    pipeline.store().start().wait_ready()
    pipeline.broker.send(pipeline.image_topic, JUNK, None)
    wait_for(lambda: len(listed(pipeline)) == 1, "a dead letter")
    (first,) = listed(pipeline)
    assert pipeline.dead_letters("replay", first["position"], "--yes").returncode == 0
    wait_for(lambda: len(listed(pipeline, "--all")) == 2, "another dead letter")
    (second,) = listed(pipeline)
    assert second["position"] != first["position"]
    assert (second["key"], second["reason"]) == (None, "invalid-json")
    status, audit = pipeline.audit("--grace", "0")
    assert (status, audit["dead_lettered"], audit["open_dead_letters"]) == (0, 2, 1)


@pytest.mark.parametrize("cut", [signal.SIGKILL, signal.SIGINT])
def test_a_replay_that_is_cut_off_and_done_again_leaves_nothing_out(
    cut: signal.Signals, pipeline: Pipeline
) -> None:
    keys = {uuid7().encode() for _ in range(6000)}
    bury(
        pipeline,
        [Source(pipeline.image_topic, at, key, key) for at, key in enumerate(sorted(keys))],
    )
    command = [str(APPS / "iot-pipeline"), "dead-letters", "replay", "--yes"]
    with subprocess.Popen(
        command,
        env=pipeline.tool_environment("iot-operator"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as replay:
        until = time.monotonic() + 120
        # It stands still while we look, so that it is not done before it can be cut off.
        replay.send_signal(signal.SIGSTOP)
        while pipeline.produced() < 2 * BATCH_RECORDS:
            assert time.monotonic() < until, "nothing is replayed"
            replay.send_signal(signal.SIGCONT)
            time.sleep(0.1)
            replay.send_signal(signal.SIGSTOP)
        replay.send_signal(cut)
        replay.send_signal(signal.SIGCONT)
        _, said = replay.communicate(timeout=60)
    if cut == signal.SIGINT:
        assert (replay.returncode, "cut off: " in said) == (1, True), said
    left = listed(pipeline)
    sent = {record.key for record in pipeline.broker.records(pipeline.image_topic)}
    assert 0 < len(left) < len(keys), "it was not cut off in the middle"
    # What is marked was sent.
    assert keys - {letter["key"].encode() for letter in left} <= sent

    done = pipeline.dead_letters("replay", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"Done: {len(left)} of {len(left)}." in done.stdout
    records = pipeline.broker.records(pipeline.image_topic)
    assert {record.key for record in records} == keys
    assert len(records) <= len(keys) + BATCH_RECORDS
    assert listed(pipeline) == []


def test_what_cannot_go_back_stays_open_and_is_told(pipeline: Pipeline) -> None:
    gone, predictions = f"{pipeline.prefix}gone", pipeline.prediction_topic
    sources = [
        Source(pipeline.image_topic, 0, b"good", b"value"),
        Source("another-pipeline", 1, b"foreign", b"value"),
        Source(pipeline.image_topic, 2, b"empty", b""),
    ]
    bury(pipeline, sources)
    done = pipeline.dead_letters("replay", "--yes")
    assert done.returncode == 1
    assert "another-pipeline is no topic of this pipeline" in done.stderr
    assert "its value was left out" in done.stderr
    assert {letter["key"] for letter in listed(pipeline)} == {"foreign", "empty"}

    bury(pipeline, [Source(gone, 3, b"homeless", b"value")])
    done = pipeline.dead_letters("replay", "homeless", "--yes", "--prediction-topic", gone)
    assert (done.returncode, f"topic {gone} does not exist" in done.stderr) == (1, True)

    # Larger than the topic takes by now: the others of its batch are sent all the same.
    large = bytes(MAX_RECORD_BYTES + 50_000)
    sizes = [b"small", large, b"small as well"]
    bury(
        pipeline,
        [Source(predictions, at, str(at).encode(), each) for at, each in enumerate(sizes)],
    )
    done = pipeline.dead_letters("replay", "0", "1", "2", "--yes")
    assert (done.returncode, "stays open" in done.stderr) == (1, True), done.stderr
    assert {record.key for record in pipeline.broker.records(predictions)} == {b"0", b"2"}
    assert {letter["key"] for letter in listed(pipeline)} == {"foreign", "empty", "homeless", "1"}

    done = pipeline.dead_letters("drop", "--yes")
    assert (done.returncode, listed(pipeline)) == (0, [])
    done = pipeline.dead_letters("show", "foreign", "nobody")
    assert (done.returncode, "nobody: no such dead letter is open" in done.stderr) == (1, True)
    assert "state       dropped" in pipeline.dead_letters("show", "--all", "foreign").stdout


@pytest.mark.parametrize("answer,status", [("n", 1), ("", 1), ("y", 0)])
def test_at_a_terminal_it_asks(answer: str, status: int, pipeline: Pipeline) -> None:
    bury(pipeline, [Source(pipeline.image_topic, 0, b"key", b"value")])
    ours, its = os.openpty()
    with subprocess.Popen(
        [str(APPS / "iot-pipeline"), "dead-letters", "replay"],
        env=pipeline.tool_environment("iot-operator"),
        stdin=its,
        stdout=subprocess.PIPE,
        text=True,
    ) as replay:
        os.write(ours, f"{answer}\n".encode())
        said, _ = replay.communicate(timeout=60)
    os.close(ours)
    os.close(its)
    assert "Replay them? [y/N]" in said
    assert (replay.returncode, "Nothing was done." in said) == (status, status == 1)
    assert len(listed(pipeline)) == status
    assert pipeline.produced() == 1 - status


def test_an_operator_may_and_others_may_not(secure_pipeline: Pipeline) -> None:
    pipeline = secure_pipeline
    bury(pipeline, [Source(pipeline.image_topic, 0, b"key", b"value")])
    done = pipeline.run("dead-letters", "drop", "--yes", user="iot-audit")
    assert (done.returncode, "grant it WRITE" in done.stderr) == (78, True), done.stderr
    done = pipeline.run("dead-letters", "list", user="iot-producer")
    assert done.returncode in (69, 78)
    assert "may not read it" in done.stderr
    assert len(listed(pipeline)) == 1
    done = pipeline.dead_letters("replay", "--yes")
    assert (done.returncode, listed(pipeline)) == (0, []), done.stderr


def test_no_broker_is_told_apart(pipeline: Pipeline) -> None:
    done = pipeline.dead_letters("list", "--bootstrap-servers", "127.0.0.1:1")
    assert (done.returncode, "127.0.0.1:1" in done.stderr) == (69, True)
