"""The programs that `make bench` runs on hosts, against a real broker and a real database.

All of it twice: with brokers that ask nobody, and with ones that let apps do what they are granted.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer

from iot_lab.paths import ROOT
from iot_lab.processes import APPS, PARTITIONS, Broker, CouchDB, Pipeline, wait_for
from iot_lab.secure_broker import ADMIN, SecureBroker, write_secret
from iot_pipeline.schema import STORED_AT, PredictionMessage

SCRIPTS = ROOT / "tests" / "bench"
IMAGES = 40
GRANTED = ("iot-producer", "iot-inference", "iot-storage")
_prefixes = (f"iot-bench-t{number}-" for number in itertools.count(1))


def admin_settings(broker: SecureBroker, folder: Path) -> Path:
    """The settings of Kafka's own tools, as the role kafka_broker writes them."""
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required"
    user = f'username="{ADMIN}" password="{broker.passwords[ADMIN]}"'
    lines = [
        "# Ansible managed",
        "security.protocol=SASL_SSL",
        "sasl.mechanism=SCRAM-SHA-512",
        f"sasl.jaas.config={login} {user};",
        "ssl.truststore.type=PEM",
        f"ssl.truststore.location={broker.ca_file}",
    ]
    return write_secret(folder / "admin.properties", "\n".join(lines) + "\n")


def run(
    script: str, *words: str, request: Any = None, environment: Mapping[str, str] | None = None
) -> Any:
    """Run a script and return its answer."""
    done = subprocess.run(
        [str(APPS / "python"), str(SCRIPTS / f"{script}.py"), *words],
        check=False,
        capture_output=True,
        text=True,
        input=json.dumps(request),
        env={**os.environ, **(environment or {})},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask_topics(broker: Broker, admin: Path, action: str, **more: Any) -> Any:
    """Run an action of tests/bench/topics.py."""
    servers = broker.bootstrap_servers.split(",")
    request = {"action": action, "servers": servers, "admin": str(admin), **more}
    return run("topics", request=request)


class Bench:
    """A pipeline with the benchmark's names, and its scripts."""

    def __init__(self, pipeline: Pipeline, admin: Path) -> None:
        self.pipeline = pipeline
        self._admin = admin

    def run(self, user: str, script: str, *words: str, **more: str) -> Any:
        """Run a script in the place of a service and return its answer."""
        own = {**self.pipeline.database_environment, **self.pipeline.broker.environment(user)}
        return run(script, *words, environment={**own, "IOT_THREADS": "2", **more})

    def topics(self, action: str, **more: Any) -> Any:
        """Run an action of tests/bench/topics.py."""
        return ask_topics(self.pipeline.broker, self._admin, action, **more)

    def produce(self) -> None:
        """Send the images."""
        producer = self.pipeline.produce("--interval", "0", "--count", str(IMAGES)).start()
        assert producer.wait(60) == 0, producer.output()


@pytest.fixture(params=["plain", "secure"])
def bench(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, database: CouchDB
) -> Iterator[Bench]:
    prefix, admin = next(_prefixes), tmp_path / "admin.properties"
    if request.param == "secure":
        broker: Broker = request.getfixturevalue("secure_broker")
        assert isinstance(broker, SecureBroker)
        admin_settings(broker, tmp_path)
    else:
        broker = request.getfixturevalue("broker")
    with Pipeline(folder / prefix.rstrip("-"), broker, database, prefix) as pipeline:
        made = Bench(pipeline, admin)
        made.topics("grant", principals=[f"User:{user}" for user in GRANTED])
        yield made
        made.topics("remove", prefix="iot-bench-")


def test_the_plain_consumer_does_the_same_work(bench: Bench) -> None:
    pipeline = bench.pipeline
    bench.produce()
    # The first message only starts the clock.
    group = f"{pipeline.prefix}plain"
    done = bench.run("iot-inference", "baseline", "infer", "60", IOT_GROUP_ID=f"{group}-infer")
    assert done["messages"] == IMAGES - 1
    records = pipeline.broker.records(pipeline.prediction_topic)
    predictions = [PredictionMessage.decode(record.value) for record in records]
    assert len(predictions) == IMAGES
    done = bench.run("iot-storage", "baseline", "store", "60", IOT_GROUP_ID=f"{group}-store")
    assert done["messages"] == 2 * IMAGES - 1
    documents = pipeline.documents().values()
    assert len(documents) == IMAGES
    assert all(
        {"Data", "GroundTruth", "InferredValue"} <= document.keys() for document in documents
    )


def test_bulk_docs_writes_complete_documents(bench: Bench) -> None:
    pipeline = bench.pipeline
    bench.produce()
    with pipeline.infer() as worker:
        assert worker.running
        ends = pipeline.broker.ends
        wait_for(lambda: sum(ends(pipeline.prediction_topic).values()) == IMAGES, "predictions")
    done = bench.run("iot-storage", "bulk_docs", str(IMAGES), "16")
    assert done["documents"] == IMAGES
    documents = pipeline.documents().values()
    assert len(documents) == IMAGES
    assert all(STORED_AT in document for document in documents)


def test_topics_are_made_like_others_read_and_removed(bench: Bench) -> None:
    pipeline, name = bench.pipeline, "iot-bench-images-1."
    topic = {"name": name, "partitions": PARTITIONS, "like": pipeline.image_topic}
    bench.topics("create", topics=[topic])
    pipeline.broker.send(name, b"value")
    assert bench.topics("records", topic=name) == 1
    assert bench.run("iot-storage", "values", "1", IOT_IMAGE_TOPIC=name) == ["value"]
    group = "iot-bench-group"
    with pipeline.infer("--group-id", group, "--image-topic", name):
        pass
    bench.topics("remove", prefix=name)
    bench.topics("remove", prefix=group)
    with pipeline.broker.admin() as admin:
        assert name not in admin.list_topics()
        assert group not in [found["group_id"] for found in admin.list_groups()]
        assert pipeline.image_topic in admin.list_topics()


def test_the_cost_of_tls_has_two_sides() -> None:
    # On brokers of its own: they begin cold, and end with the script.
    words = ["--count", "200", "--rounds", "2", "--warm-up", "200"]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "tls_cost.py"), *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"plaintext", "tls"}
    names = {"records_per_second", "producer_cpu_us", "broker_cpu_us", "login_ms"}
    for side in found.values():
        assert side.keys() == names
        assert all(len(values) == 2 and min(values) > 0 for values in side.values()), side
    # A handshake and the proof of a password take both ends milliseconds.
    assert min(found["tls"]["login_ms"]) > max(found["plaintext"]["login_ms"])


def test_rights_are_granted_for_the_time_of_the_benchmark(
    secure_broker: SecureBroker, tmp_path: Path
) -> None:
    ask = partial(ask_topics, secure_broker, admin_settings(secure_broker, tmp_path))
    secure_broker.create_topics({"iot-bench-rights": (1, 10_000), "of-others": (1, 10_000)})

    def seen() -> set[str]:
        consumer = KafkaConsumer(**secure_broker.client("iot-producer"))
        try:
            return set(consumer.topics()) & {"iot-bench-rights", "of-others"}
        finally:
            consumer.close()

    assert seen() == set()
    ask("grant", principals=["User:iot-producer"])
    assert seen() == {"iot-bench-rights"}
    ask("remove", prefix="iot-bench-rights")
    secure_broker.create_topics({"iot-bench-rights": (1, 10_000)})
    assert seen() == {"iot-bench-rights"}
    ask("remove", prefix="iot-bench-")
    secure_broker.create_topics({"iot-bench-rights": (1, 10_000)})
    assert seen() == set()
