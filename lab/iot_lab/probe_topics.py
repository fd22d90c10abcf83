"""Prints partitions and records of every topic as JSON. Runs on a host, in the apps' environment.

Its one argument is the file of settings that names the broker.
"""

import json
import sys
from pathlib import Path

from kafka import KafkaConsumer, TopicPartition

settings = dict(
    line.split("=", 1) for line in Path(sys.argv[1]).read_text().splitlines() if "=" in line
)
servers = settings["IOT_BOOTSTRAP_SERVERS"].strip('"').split(",")
consumer = KafkaConsumer(bootstrap_servers=servers, enable_auto_commit=False)
topics = {}
for topic in sorted(consumer.topics()):
    partitions = [
        TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()
    ]
    starts, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    topics[topic] = {
        "partitions": len(partitions),
        "records": sum(ends[partition] - starts[partition] for partition in partitions),
    }
consumer.close()
print(json.dumps(topics))
