"""A bare loop of `_bulk_docs`: how fast this database takes the documents that storage writes.

Runs in the place of the storage service, with its environment: reads both topics, makes the
documents that storage would make, and only then writes them, with one kept connection, so many at
once, one request after the other:

    python bulk_docs.py DOCUMENTS BATCH

Prints documents, seconds and CPU seconds as JSON. Nothing is read from the database, no row of an
answer is looked at: it does less than any program that must not lose a document.
"""

import base64
import http.client
import json
import sys
import time
from typing import Any
from urllib.parse import quote

from kafka import KafkaConsumer

from iot_pipeline.access import Tls
from iot_pipeline.kafka import client_options
from iot_pipeline.passwords import PasswordFile
from iot_pipeline.schema import (
    STORED_AT,
    ImageMessage,
    PredictionMessage,
    document,
    format_time,
    is_complete,
    merge,
    now,
)
from iot_pipeline.settings import StoreSettings, load


def documents(settings: StoreSettings, count: int) -> list[dict[str, Any]]:
    """The first complete documents that the two topics make."""
    consumer = KafkaConsumer(
        settings.image_topic,
        settings.prediction_topic,
        **client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        consumer_timeout_ms=10_000,
    )
    found: dict[str, dict[str, Any]] = {}
    complete = 0
    for record in consumer:
        is_image = record.topic == settings.image_topic
        state = document((ImageMessage if is_image else PredictionMessage).decode(record.value))
        before = found.get(state["_id"])
        after = found[state["_id"]] = merge(before or state, state)
        if is_complete(after):
            after[STORED_AT] = format_time(now())
            complete += 1
            if complete == count:
                break
    consumer.close()
    return sorted(filter(is_complete, found.values()), key=lambda each: str(each["_id"]))


def connect(settings: StoreSettings) -> http.client.HTTPConnection:
    """A connection that is kept, as storage's is."""
    address = settings.store_address
    if address.tls:
        context = Tls(settings.store_ca_file).context()
        return http.client.HTTPSConnection(address.place, timeout=60, context=context)
    return http.client.HTTPConnection(address.place, timeout=60)


def main() -> None:
    count, size = int(sys.argv[1]), int(sys.argv[2])
    settings = load(StoreSettings)
    made = documents(settings, count)
    connection = connect(settings)
    headers = {"Content-Type": "application/json"}
    if settings.store_user:
        _, password = PasswordFile(settings.store_password_file).choose()
        credentials = base64.b64encode(f"{settings.store_user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {credentials}"
    path = f"/{quote(settings.store_address.database, safe='')}/_bulk_docs"
    began, used = time.monotonic(), time.process_time()
    for start in range(0, len(made), size):
        body = json.dumps({"docs": made[start : start + size]})
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 201:
            raise SystemExit(f"_bulk_docs answers {answer.status} {answer.reason}")
    found = {"documents": len(made), "batch": size, "seconds": time.monotonic() - began}
    print(json.dumps({**found, "cpu_seconds": time.process_time() - used}))


if __name__ == "__main__":
    main()
