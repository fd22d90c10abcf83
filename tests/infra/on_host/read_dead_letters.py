"""Reads the dead-letter topic as this host's audit.

    stdin   {"after": {"0": 17}, "keys": ["…"]}
    stdout  {"ends": {"0": 23}, "letters": [{"key": "…", "value": "…", "headers": {…}}]}

It reads from the offsets of `after` until it has found all keys, for a minute at most. Without any,
it only tells where the topic ends now.
"""

import json
import sys
import time
from typing import Any

from kafka import TopicPartition

from iot_pipeline.kafka import make_reader
from iot_pipeline.settings import AuditSettings, load

PATIENCE_SECONDS = 60


def text(content: bytes | None) -> str:
    return (content or b"").decode("utf-8", "replace")


def main(asked: dict[str, Any]) -> None:
    settings = load(AuditSettings)
    reader = make_reader(settings)
    topic = settings.dead_letter_topic
    partitions = [TopicPartition(topic, number) for number in reader.partitions_for_topic(topic)]
    reader.assign(partitions)
    ends = reader.end_offsets(partitions)
    for partition in partitions:
        reader.seek(partition, asked["after"].get(str(partition.partition), ends[partition]))

    missing = set(asked["keys"])
    letters = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while missing and time.monotonic() < deadline:
        for records in reader.poll(timeout_ms=1000).values():
            for record in records:
                # Others may have written anything there.
                key = text(record.key)
                if key in missing:
                    missing.discard(key)
                    headers = {name: text(value) for name, value in record.headers}
                    value = text(record.value)
                    letters.append({"key": key, "value": value, "headers": headers})
    answer = {
        "ends": {partition.partition: offset for partition, offset in ends.items()},
        "letters": letters,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(json.load(sys.stdin))
