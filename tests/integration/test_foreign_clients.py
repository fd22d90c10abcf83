"""Clients of other makers come in with the settings that docs/security.md gives."""

import re
import shutil
import subprocess
from pathlib import Path

import confluent_kafka
import pytest

from iot_lab.processes import Pipeline
from iot_lab.secure_broker import SecureBroker, write_secret

DOCUMENT = Path(__file__).parents[2] / "docs/security.md"
SETTINGS = re.compile(r"```properties\n(bootstrap\.servers=.*?)```", re.DOTALL)


def documented(broker: SecureBroker, user: str) -> dict[str, str]:
    """The settings of the document, with what differs from place to place replaced."""
    found = SETTINGS.search(DOCUMENT.read_text())
    assert found
    settings = dict(line.split("=", 1) for line in found[1].splitlines())
    return settings | {
        "bootstrap.servers": broker.bootstrap_servers,
        "sasl.username": user,
        "sasl.password": broker.passwords[user],
        "ssl.ca.location": broker.ca_file,
    }


def test_confluent_kafka(secure_pipeline: Pipeline, secure_broker: SecureBroker) -> None:
    topic, refused = secure_pipeline.image_topic, []
    producer = confluent_kafka.Producer(documented(secure_broker, "iot-producer"))
    producer.produce(topic, b"value", b"key", on_delivery=lambda error, _: refused.append(error))
    assert producer.flush(30) == 0
    assert refused == [None]

    # This client wants a group for all it does, and so a user that may use one.
    own = {"group.id": f"{secure_pipeline.prefix}iot-storage", "enable.auto.commit": "false"}
    consumer = confluent_kafka.Consumer(documented(secure_broker, "iot-storage") | own)
    try:
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        start = confluent_kafka.OFFSET_BEGINNING
        consumer.assign([confluent_kafka.TopicPartition(topic, p, start) for p in partitions])
        record = consumer.poll(30)
        assert record is not None
        assert (record.error(), record.key(), record.value()) == (None, b"key", b"value")
    finally:
        consumer.close()


@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed")
def test_kcat(secure_pipeline: Pipeline, secure_broker: SecureBroker, tmp_path: Path) -> None:
    version = subprocess.run(["kcat", "-V"], check=False, capture_output=True, text=True)
    library = re.search(r"librdkafka (\d+)\.(\d+)\.(\d+)", version.stdout + version.stderr)
    assert library
    # Older ones fail with SCRAM at any Kafka 4: https://github.com/edenhill/kcat/issues/462
    mechanism = "SCRAM-SHA-512" if tuple(map(int, library.groups())) >= (2, 6, 1) else "PLAIN"

    def kcat(user: str, *words: str, text: str = "") -> str:
        settings = documented(secure_broker, user) | {"sasl.mechanism": mechanism}
        file = write_secret(
            tmp_path / user, "".join(f"{name}={value}\n" for name, value in settings.items())
        )
        done = subprocess.run(
            ["kcat", "-F", str(file), "-t", secure_pipeline.image_topic, *words],
            check=False,
            capture_output=True,
            input=text,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    kcat("iot-producer", "-P", text="sent by kcat\n")
    assert kcat("iot-audit", "-C", "-o", "beginning", "-e", "-q") == "sent by kcat\n"
