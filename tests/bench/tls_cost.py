"""What TLS and a login cost the producer: in the clear, then with TLS and SCRAM, over and over.

    .lab/venv/tools/bin/python tests/bench/tls_cost.py [--count N] [--rounds N] [--warm-up N]

Starts two brokers of its own on loopback that differ in nothing else, and lets `iot-pipeline
produce --interval 0` send images to them in turn. The producer has a core for itself, the brokers
have the others. Nothing counts before the brokers are warm: until Java has compiled its encryption
for good, which takes some 150,000 records, a broker spends several times as much on TLS. Prints
figures by side and round as JSON; CPU is in microseconds a record, the producer's start included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lab"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps" / "src"))

from iot_lab.processes import APPS, LASTING_JAVA, PARTITIONS, Broker
from iot_lab.secure_broker import SecureBroker
from iot_lab.shell import stop_on_signals
from iot_pipeline.access import find_problem
from iot_pipeline.settings import ProduceSettings, load

USER = "iot-producer"
TOPIC_LIMIT = 1_100_000  # bytes, as in the lab's inventory
LOGINS = 20
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def children_cpu() -> float:
    """Seconds of CPU that ended child processes have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Side:
    """A broker, and what was found with it."""

    def __init__(self, broker: Broker, core: int) -> None:
        self._broker = broker
        self._core = core
        self._topics = (f"images-{number}" for number in itertools.count())
        self.found: dict[str, list[float]] = {}

    def produce(self, count: int) -> dict[str, float]:
        """Send so many images to a topic of their own."""
        topic = next(self._topics)
        self._broker.create_topics({topic: (PARTITIONS, TOPIC_LIMIT)})
        command = ["taskset", "--cpu-list", str(self._core), str(APPS / "iot-pipeline"), "produce"]
        command += ["--interval", "0", "--count", str(count), "--image-topic", topic]
        command += ["--compression", "zstd"]
        environment = {**os.environ, "IOT_ENV_FILE": os.devnull, **self._broker.environment(USER)}
        used, served = children_cpu(), self._cpu()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        sent = re.search(r" sent images=(\d+) .*per_second=([\d.e+]+)", done.stderr)
        if not sent or int(sent[1]) != count:
            raise RuntimeError(f"the producer did not send {count} images: {done.stderr}")
        with self._broker.admin() as admin:
            admin.delete_topics([topic])
        return {
            "records_per_second": float(sent[2]),
            "producer_cpu_us": (children_cpu() - used) / count * 1e6,
            "broker_cpu_us": (self._cpu() - served) / count * 1e6,
        }

    def log_in(self) -> float:
        """Milliseconds until the broker lets an app in that connects, as a median."""
        environment = {"IOT_ENV_FILE": os.devnull, **self._broker.environment(USER)}
        settings = load(ProduceSettings, {}, environment)
        taken = []
        for _ in range(LOGINS):
            began = time.monotonic()
            problem = find_problem(settings)
            taken.append((time.monotonic() - began) * 1000)
            if problem:
                raise RuntimeError(problem)
        return median(taken)

    def keep(self, figures: dict[str, float]) -> None:
        """Add figures of a round."""
        for name, value in figures.items():
            self.found.setdefault(name, []).append(value)

    def _cpu(self) -> float:
        """Seconds of CPU that the broker has used."""
        stat = Path(f"/proc/{self._broker.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def measure(
    folder: Path, count: int, rounds: int, warm_up: int
) -> dict[str, dict[str, list[float]]]:
    """Find the figures of both sides, by round."""
    core, *others = sorted(os.sched_getaffinity(0))
    # The brokers inherit it.
    os.sched_setaffinity(0, others or [core])
    with (
        Broker(folder / "plain", LASTING_JAVA) as plain,
        SecureBroker(folder / "tls", LASTING_JAVA) as tls,
    ):
        written = {"principals": [f"User:{USER}"], "resource_type": "topic"}
        tls.allow([{**written, "resource_name": "*", "operations": ["write"]}])
        sides = {"plaintext": Side(plain, core), "tls": Side(tls, core)}
        for name, side in sides.items():
            print(f"warming the broker up: {name}", file=sys.stderr, flush=True)
            side.produce(warm_up)
        for name, side in in_turn(list(sides.items()), rounds):
            figures = {**side.produce(count), "login_ms": side.log_in()}
            side.keep(figures)
            rate = figures["records_per_second"]
            print(f"{name}: {rate:,.0f} records/s", file=sys.stderr, flush=True)
        return {name: side.found for name, side in sides.items()}


def in_turn(sides: list[tuple[str, Side]], rounds: int) -> Iterator[tuple[str, Side]]:
    """All sides in each round, in the other order than in the one before."""
    for _ in range(rounds):
        yield from sides
        sides.reverse()


def main() -> None:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(description="Measure what TLS and SCRAM cost the producer.")
    parser.add_argument("--count", type=int, default=100_000, help="records of a run (100000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument(
        "--warm-up", type=int, default=300_000, help="records before anything counts (300000)"
    )
    options = parser.parse_args()
    # So that brokers end and nothing of them is left.
    stop_on_signals()
    with tempfile.TemporaryDirectory(prefix="iot-tls-cost-") as name:
        found = measure(Path(name), options.count, options.rounds, options.warm_up)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
