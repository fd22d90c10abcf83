"""Prints partitions and records of every topic as JSON. Runs on a host, in the apps' environment.

It connects as the audit does, so it sees the topics that the audit may read.
"""

import json

from kafka import KafkaConsumer, TopicPartition

from iot_pipeline.kafka import client_options
from iot_pipeline.settings import AuditSettings, load

consumer = KafkaConsumer(**client_options(load(AuditSettings)), enable_auto_commit=False)
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
