"""What each compression costs the producer, the broker's disk and a consumer.

    .lab/venv/apps/bin/python tests/bench/compression.py [--count N] [--rounds N] [SOURCE ...]

Starts a broker of its own on loopback. For each source and each compression `iot-pipeline produce
--interval 0` sends the images to a new topic, and a plain consumer reads them back. Beside it,
kafka-producer-perf-test.sh sends five times as many records of the same size, so that its Java is
warm. A SOURCE is one of the producer's; with `png:` before it, its images are sent as PNG. Prints
medians as Markdown.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lab"))

from kafka import KafkaConsumer, TopicPartition
from PIL import Image

from iot_lab.processes import APPS, PARTITIONS, Broker
from iot_pipeline.sources import open_source

COMPRESSIONS = ("none", "gzip", "lz4", "zstd")
TOPIC_LIMIT = 1_100_000  # bytes, as in the lab's inventory


@dataclass
class Run:
    """One compression, once. Seconds of CPU are of the whole process."""

    per_second: float
    producer_cpu: float
    consumer_cpu: float
    disk_bytes: int


def children_cpu() -> float:
    """Seconds of CPU that ended child processes have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def produce(broker: Broker, topic: str, source: str, compression: str, count: int) -> float:
    """Send `count` images; returns images a second, as the producer says."""
    command = [str(APPS / "iot-pipeline"), "produce", "--interval", "0", "--count", str(count)]
    command += ["--source", source, "--compression", compression, "--image-topic", topic]
    command += ["--bootstrap-servers", broker.bootstrap_servers]
    environment = os.environ | {"IOT_ENV_FILE": os.devnull}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r" sent images=(\d+) .*per_second=([\d.e+]+)", done.stderr)
    if not found or int(found[1]) != count:
        raise RuntimeError(f"the producer did not send {count} images: {done.stderr}")
    return float(found[2])


def consume(broker: Broker, topic: str, count: int) -> tuple[float, int]:
    """Read a topic; returns seconds of CPU and the bytes of all keys and values."""
    started = time.process_time()
    consumer = KafkaConsumer(
        bootstrap_servers=broker.bootstrap_servers,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        metrics_enabled=False,
    )
    consumer.assign([TopicPartition(topic, partition) for partition in range(PARTITIONS)])
    seen = size = 0
    while seen < count:
        for records in consumer.poll(timeout_ms=1000).values():
            seen += len(records)
            size += sum(len(record.key) + len(record.value) for record in records)
    consumer.close()
    return time.process_time() - started, size


def on_disk(folder: Path, topic: str) -> int:
    """Bytes of a topic's log segments."""
    return sum(path.stat().st_size for path in folder.glob(f"kafka-data/{topic}-[0-9]*/*.log"))


def reference(broker: Broker, topic: str, count: int, size: int) -> float:
    """Records a second of Kafka's own tool, with acks=all and its other defaults."""
    broker.create_topics({topic: (PARTITIONS, TOPIC_LIMIT)})
    tool = next((broker.home / "bin").glob("kafka-producer-perf-test.sh"))
    command = [str(tool), "--topic", topic, "--num-records", str(count)]
    command += ["--record-size", str(size), "--throughput", "-1", "--producer-props"]
    command += [f"bootstrap.servers={broker.bootstrap_servers}", "acks=all"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"([\d.]+) records/sec", done.stdout)
    return float(found[-1])


def as_png(source: str, folder: Path) -> str:
    """A tar of the source's images as PNG."""
    target = folder / f"{Path(source).name}.png.tar"
    with open_source(source) as images, tarfile.open(target, "w") as archive:
        for number, image in enumerate(images):
            encoded = io.BytesIO()
            Image.open(io.BytesIO(image.data)).save(encoded, format="PNG")
            member = tarfile.TarInfo(f"{image.label}/{number}.png")
            member.size = encoded.tell()
            encoded.seek(0)
            archive.addfile(member, encoded)
    return str(target)


def measure(broker: Broker, folder: Path, source: str, count: int, rounds: int) -> None:
    """Print one source's table."""
    path = as_png(source.removeprefix("png:"), folder) if source.startswith("png:") else source
    runs: dict[str, list[Run]] = {name: [] for name in COMPRESSIONS}
    references: list[float] = []
    label = re.sub(r"\W", "-", Path(path).name)
    size = 0
    for turn in range(rounds):
        before = children_cpu()
        topic = f"{label}-start-{turn}"
        broker.create_topics({topic: (PARTITIONS, TOPIC_LIMIT)})
        produce(broker, topic, path, "none", 1)
        start = children_cpu() - before
        for name in COMPRESSIONS:
            topic = f"{label}-{name}-{turn}"
            broker.create_topics({topic: (PARTITIONS, TOPIC_LIMIT)})
            before = children_cpu()
            rate = produce(broker, topic, path, name, count)
            cpu = children_cpu() - before - start
            reading, size = consume(broker, topic, count)
            runs[name].append(Run(rate, cpu, reading, on_disk(folder, topic)))
        references.append(reference(broker, f"{label}-tool-{turn}", 5 * count, size // count))
    print(f"\n{source}: {count} records of {size // count} bytes, {rounds} rounds")
    tool = median(references)
    print(f"\nkafka-producer-perf-test.sh: {tool:,.0f} records/s\n")
    print("| compression | records/s | of perf-test | producer µs | consumer µs | bytes on disk |")
    print("|---|---|---|---|---|---|")
    for name, found in runs.items():
        rate = median(run.per_second for run in found)
        producer = median(run.producer_cpu for run in found) / count * 1e6
        consumer = median(run.consumer_cpu for run in found) / count * 1e6
        disk = median(run.disk_bytes for run in found) / count
        print(
            f"| {name} | {rate:,.0f} | {rate / tool:.2f} | {producer:.0f} | {consumer:.0f} "
            f"| {disk:,.0f} |",
            flush=True,
        )


def main() -> int:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(description="Measure the producer's compressions.")
    parser.add_argument("--count", type=int, default=50_000, help="records (50000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median (3)")
    parser.add_argument("sources", nargs="*", default=["sample"], metavar="SOURCE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="iot-compression-") as name:
        folder = Path(name)
        with Broker(folder) as broker:
            for source in options.sources:
                measure(broker, folder, source, options.count, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
