import os

import pytest
from kafka.partitioner import murmur2 as reference

from iot_pipeline.kafka_internals import murmur2


@pytest.mark.parametrize(
    "key, expected",
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_keys_are_hashed_as_by_kafka_in_java(key: bytes, expected: int) -> None:
    """The values of Kafka's own test, UtilsTest.testMurmur2: Java's int has a sign."""
    assert murmur2(key) == expected % 2**32


@pytest.mark.parametrize("size", range(40))
def test_keys_of_any_length_are_hashed_as_by_the_client(size: int) -> None:
    for _ in range(50):
        key = os.urandom(size)
        assert murmur2(key) == reference(key), key
