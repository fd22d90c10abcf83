"""Every metric this package exports. A command uses those of its own work; the rest stay absent."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import (
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from iot_pipeline.errors import ConfigError

# A second series for each counter, with the time it was made, that nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call] # their one untyped function

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PARTS = ("decode", "handle", "deliver")
_TICKS = os.sysconf("SC_CLK_TCK")
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# Records taken from a topic, good or bad. Its rate is the load.
RECORDS_IN = Counter("iot_records_in_total", "Records consumed", ["topic"])

# Results confirmed by the broker or the database: images sent, predictions sent, documents written.
RECORDS_OUT = Counter("iot_records_out_total", "Results confirmed by their sink", ["sink"])

# Batches and images that a sink did not take at that time; they are tried again, so nothing is lost
# by them, but a rate above zero means an outage.
SINK_FAILURES = Counter("iot_sink_failures_total", "Writes the sink refused or missed", ["sink"])

# Records that can never be handled, by reason. Each is in the dead-letter topic, or was refused
# before it was sent.
DEAD_LETTERS = Counter("iot_dead_letters_total", "Records refused for good", ["reason"])

# How many records were handled together. Small batches under load mean that the model waits for
# records.
BATCH_SIZE = Histogram("iot_batch_size_records", "Records in a batch", buckets=_SIZES)

# Where the time goes: waiting for records, decoding a batch, handling it (the model), and waiting
# until the sink has confirmed it. The last three run side by side, each in its own thread.
POLL_SECONDS = Histogram("iot_poll_seconds", "Seconds in one poll", buckets=_SECONDS)
DECODE_SECONDS = Histogram("iot_decode_seconds", "Seconds to decode a batch", buckets=_SECONDS)
HANDLE_SECONDS = Histogram("iot_handle_seconds", "Seconds to handle a batch", buckets=_SECONDS)
SINK_SECONDS = Histogram("iot_sink_seconds", "Seconds until the sink confirmed", buckets=_SECONDS)

# Records in the partition that are not committed yet. A growing lag means the stage is too slow.
LAG = Gauge(
    "iot_consumer_lag_records", "Records behind the partition's end", ["topic", "partition"]
)

# How long the oldest record in hand has waited since it came to the broker. It grows during an
# outage of the sink even when no new records arrive, where lag does not.
OLDEST_SECONDS = Gauge("iot_oldest_unhandled_seconds", "Age of the oldest record in hand")

# 0 from the first write that the sink misses to the next one that it takes, 1 otherwise.
SINK_UP = Gauge("iot_sink_up", "Whether the sink takes writes")


class _ThreadCpu(Collector):
    """CPU seconds by what a thread does, read from the kernel when somebody asks."""

    def collect(self) -> Iterator[Metric]:
        metric = CounterMetricFamily(
            "iot_cpu_seconds",
            "CPU seconds by part: poll, decode, handle, deliver, kafka (the clients' own threads), "
            "native (the model's own threads) and other",
            labels=["part"],
        )
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        seconds: dict[str, float] = defaultdict(float)
        for task in Path("/proc/self/task").glob("*"):
            try:
                # The second field, a name in parentheses, may hold spaces itself.
                fields = (task / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # It ended meanwhile.
            user, system = fields[11:13]  # utime and stime of proc_pid_stat(5)
            seconds[_part(names.get(int(task.name)))] += (int(user) + int(system)) / _TICKS
        for part, value in sorted(seconds.items()):
            metric.add_metric([part], value)
        yield metric


def _part(thread: str | None) -> str:
    if thread is None:
        return "native"
    if thread.startswith("kafka"):
        return "kafka"
    return {"MainThread": "poll"}.get(thread, thread if thread in _PARTS else "other")


if Path("/proc/self/task").is_dir():
    REGISTRY.register(_ThreadCpu())


def serve(host: str, port: int) -> None:
    """Serve the metrics over HTTP from a thread; port 0 serves nothing.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    if not port:
        return
    try:
        start_http_server(port, addr=host)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; "
            "set IOT_METRICS_HOST and IOT_METRICS_PORT, or port 0 for none"
        ) from error
