"""The values of some records of the image topic, as JSON.

Runs in the place of a service that may read the topic, with its environment:

    python values.py COUNT
"""

import itertools
import json
import sys

from kafka import KafkaConsumer

from iot_pipeline.kafka import client_options
from iot_pipeline.settings import StoreSettings, load


def main() -> None:
    settings = load(StoreSettings)
    consumer = KafkaConsumer(
        settings.image_topic,
        **client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        consumer_timeout_ms=10_000,
    )
    found = [record.value.decode() for record in itertools.islice(consumer, int(sys.argv[1]))]
    consumer.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
