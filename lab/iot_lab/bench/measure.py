"""What is measured, in steps: each runs programs on the hosts and keeps its figures."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from iot_lab import paths
from iot_lab.bench import figures
from iot_lab.bench.access import ADMIN_SETTINGS, FOLDER, SCRIPTS, TOPICS, Job, Lab
from iot_lab.console import say
from iot_lab.shell import LabError, logged

PARTS = {
    "ceiling": "the engine alone on the inference host",
    "inference": "a backlog of images to predictions",
    "baseline": "the plain consumer that such projects use",
    "storage": "both topics to the database, against a bare loop of _bulk_docs",
    "producer": "the producer, against kafka-producer-perf-test.sh",
    "tls": "the producer over TLS with a login, against plaintext, on this machine",
    "scaling": "1, 2 and 4 partitions and inference workers",
    "latency": "from produced to stored with its prediction, at 1, 10 and 50 images/s",
    "memory": "resident memory over many images",
}

BATCHES = (1, 8, 32, 64)
EAGER = "torch fp32"
CEILING_SECONDS = 2.5  # at each batch size
PARTITIONS = 4  # as the lab's own topics have
WORKERS = (1, 2, 4)
RATES = {1: 100, 10: 600, 50: 1500}
"""Images per second of the latency's measurement, and how many images in all repetitions."""
WARM_UP_IMAGES = 20
LATENCY_SETTLE = 60.0  # seconds that the last images get
SAMPLE = 1.0  # seconds between two looks at an app's metrics
PATIENCE = 90.0  # seconds without anything delivered after which a run has failed
PAYLOADS = 500
DELIVERED_BY_STORAGE = 2  # records for each document: the image, and its prediction
# What `iot-pipeline produce` gives its client where no pace is asked for.
PRODUCER_BATCHES = {"batch.size": 262_144, "linger.ms": 5}
# Java compiles what encrypts only once it was used a lot: with 20,000 records it was half as fast.
PERF_TEST_WARM_UP = 100_000
PERF_TESTS: dict[str, tuple[bool, Mapping[str, int]]] = {
    "perf_test": (True, {}),
    "perf_test_large_batches": (True, PRODUCER_BATCHES),
    "perf_test_uncompressed": (False, {}),
}
"""Runs of kafka-producer-perf-test.sh: compressed as the producer does or not, and properties."""


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    parts: Sequence[str]
    images: int
    records: int  # of the producer's runs
    repetitions: int
    seconds: float  # of a run that does not come to the end of its images before
    memory_images: int


@dataclass(frozen=True)
class Step:
    """One thing to do. `run` returns what a person wants to read of it."""

    title: str
    seconds: float  # how long it takes, roughly
    run: Callable[[], str]


class Measurement:
    """The steps of a run, and what they found."""

    def __init__(self, lab: Lab, options: Options) -> None:
        self._lab = lab
        self._options = options
        self._values: dict[tuple[str, ...], list[float]] = {}
        self._plain: dict[str, Any] = {}
        self._latencies: dict[str, list[list[float]]] = {}
        settings = lab.hosts["inference"].settings
        self._default = f"{settings['IOT_ENGINE']} {settings['IOT_PRECISION']}"
        self._engines = list(dict.fromkeys([EAGER, self._default]))
        self._batches = sorted({*BATCHES, int(settings["IOT_MAX_BATCH_SIZE"])})
        self._jobs: list[Job] = []
        self._topics = 0

    def found(self) -> dict[str, Any]:
        """Return all figures so far, as docs/benchmarks.json has them."""
        found: dict[str, Any] = {
            "engines": {"eager": EAGER, "default": self._default},
            "settings": self._settings(),
            **self._plain,
        }
        for path, values in self._values.items():
            place = found
            for name in path[:-1]:
                place = place.setdefault(name, {})
            place[path[-1]] = figures.summary(values)
        if self._latencies:
            self._put_latencies(found)
        figures.add_ratios(found)
        return found

    def cancel(self) -> None:
        """Let go of scripts at work."""
        for job in self._jobs:
            job.cancel()

    def steps(self) -> list[Step]:
        """Return what is to be done, in order.

        Repetitions of what is compared are interleaved: noise hits all alike.
        """
        wanted = set(self._options.parts)
        planned = []
        if wanted - {"ceiling", "tls", "latency", "memory"}:
            planned.append(self._fill_step(PARTITIONS))
        planned += self._engine_steps(wanted)
        for part, make in (
            ("storage", self._storage_steps),
            ("producer", self._producer_steps),
            ("tls", self._tls_steps),
            ("scaling", self._scaling_steps),
            ("latency", self._latency_steps),
            ("memory", self._memory_steps),
        ):
            if part in wanted:
                planned += make()
        return planned

    def _each(self) -> Iterator[str]:
        """What the titles of a step's repetitions end with."""
        total = self._options.repetitions
        return (f"{number} of {total}" for number in range(1, total + 1))

    def _fill_step(self, partitions: int) -> Step:
        seconds = 8 + self._options.images / 3000
        title = f"images into a topic of {partitions} partitions"
        return Step(title, seconds, partial(self._fill, partitions))

    def _engine_steps(self, wanted: Container[str]) -> list[Step]:
        planned = []
        seconds = self._options.seconds
        ceiling = 8 + (CEILING_SECONDS + 0.5) * len(self._batches)
        for which in self._each():
            for engine in self._engines:
                if "ceiling" in wanted:
                    title = f"the engine alone, {engine}, {which}"
                    planned.append(Step(title, ceiling, partial(self._ceiling, engine)))
                if "inference" in wanted:
                    title = f"inference, {engine}, {which}"
                    planned.append(Step(title, 13 + seconds, partial(self._inference, engine)))
            if "baseline" in wanted:
                planned.append(
                    Step(f"the plain consumer, {which}", 17 + 2 * seconds, self._baseline)
                )
        return planned

    def _storage_steps(self) -> list[Step]:
        images = self._options.images
        planned = [Step("predictions of all images", 15 + images / 1000, self._classify_all)]
        for which in self._each():
            planned += [
                Step(f"storage, {which}", 20 + images / 1300, self._storage),
                Step(f"a bare loop of _bulk_docs, {which}", 15 + images / 1800, self._bulk_docs),
            ]
        return planned

    def _producer_steps(self) -> list[Step]:
        records = self._options.records
        planned = [Step("records for kafka-producer-perf-test.sh", 4, self._payload)]
        for which in self._each():
            planned.append(Step(f"producer, {which}", 8 + records / 12000, self._producer))
            planned += [
                Step(f"{name}, {which}", 12 + records / 25000, partial(self._perf_test, name))
                for name in PERF_TESTS
            ]
        return planned

    def _tls_steps(self) -> list[Step]:
        records, repetitions = self._options.records, self._options.repetitions
        seconds = 60 + repetitions * (4 + records / 8000)
        title = f"producer over TLS and in the clear, {repetitions} times"
        return [Step(title, seconds, self._tls)]

    def _scaling_steps(self) -> list[Step]:
        seconds = self._options.seconds
        planned = [self._fill_step(number) for number in WORKERS if number != PARTITIONS]
        planned += [
            Step(
                f"inference, workers: {workers}, {which}",
                13 + 3 * workers + seconds,
                partial(self._scaling, workers),
            )
            for which in self._each()
            for workers in WORKERS
        ]
        return planned

    def _latency_steps(self) -> list[Step]:
        seconds = 40 + sum(count / pace for pace, count in RATES.items())
        return [Step("latency at 1, 10 and 50 images/s", seconds, self._latency)]

    def _memory_steps(self) -> list[Step]:
        images = self._options.memory_images
        return [Step(f"memory over {images:,} images", 20 + images / 500, self._memory)]

    def _settings(self) -> dict[str, Any]:
        # Those that say how, not those that say where.
        private = ("HOST", "PORT", "SERVERS", "URL", "FILE", "USER", "DIR", "CACHE", "NAME")
        options = self._options
        chosen: dict[str, Any] = {
            role: {
                name: value
                for name, value in self._lab.hosts[role].settings.items()
                if not any(word in name for word in (*private, "TOPIC", "DATABASE", "INSTANCE"))
            }
            for role in ("producer", "inference", "storage")
        }
        chosen["bench"] = {
            "images": options.images,
            "producer_records": options.records,
            "tool_warm_up": PERF_TEST_WARM_UP,
            "repetitions": options.repetitions,
            "seconds": options.seconds,
            "partitions": PARTITIONS,
        }
        return chosen

    def _keep(self, value: float, *path: str) -> None:
        self._values.setdefault(path, []).append(value)

    def _topic(self, name: str, partitions: int = PARTITIONS) -> str:
        """Make a topic for one use."""
        self._topics += 1
        like = "IOT_PREDICTION_TOPIC" if name == "predictions" else "IOT_IMAGE_TOPIC"
        return self._lab.create_topic(f"{name}-{self._topics}.", partitions=partitions, like=like)

    def _start(self, role: str, units: Sequence[dict[str, Any]]) -> float:
        request = {"action": "start", "units": units}
        return float(self._lab.ask_units(role, request, timeout=330))

    def _watch(self, role: str, units: Sequence[dict[str, Any]], goal: int, **more: float) -> Job:
        request = {
            "action": "watch",
            "units": units,
            "goal": goal,
            "seconds": self._options.seconds,
            "interval": SAMPLE,
            "patience": PATIENCE,
            **more,
        }
        job = self._lab.hosts[role].start("units", request)
        self._jobs.append(job)
        return job

    def _run(
        self, role: str, units: Sequence[dict[str, Any]], goal: int, **more: float
    ) -> list[figures.Sample]:
        """Start units, sample them until they are done, and return the samples."""
        self._start(role, units)
        limit = more.get("seconds", self._options.seconds) + PATIENCE + 60
        samples: list[figures.Sample] = self._watch(role, units, goal, **more).result(limit)[
            "samples"
        ]
        return samples

    def _engine(self, engine: str) -> dict[str, str]:
        if engine == self._default:
            # As it was prepared: what `auto` came to is not there under its own name.
            return {}
        name, precision = engine.split()
        return {"IOT_ENGINE": name, "IOT_PRECISION": precision}

    def _fill(self, partitions: int) -> str:
        """Let the producer send the backlog that several measurements read."""
        topic = self._lab.create_topic(f"images-{partitions}", partitions=partitions)
        count = self._options.images
        self._produce(topic, count)
        there = self._lab.records(topic)
        if there < count:
            raise LabError(f"{topic} holds {there} of {count} images")
        return f"{there:,} images in {partitions} partitions"

    def _produce(self, topic: str, count: int, **settings: str) -> list[figures.Sample]:
        """Run the producer until it has sent so many images."""
        own = {"IOT_IMAGE_TOPIC": topic, "IOT_COUNT": str(count), "IOT_INTERVAL": "0", **settings}
        unit = self._lab.unit("producer", own)
        interval = 0.2 if own["IOT_INTERVAL"] == "0" else 1.0
        return self._run("producer", [unit], count, seconds=900, interval=interval)

    def _ceiling(self, engine: str) -> str:
        words = ("ceiling", str(CEILING_SECONDS), *map(str, self._batches))
        answer = self._lab.program("inference", self._engine(engine), *words)
        rates: dict[str, float] = answer["images_per_second"]
        for name in ("images_per_second", "cpu_ms_per_image"):
            for batch, value in answer[name].items():
                self._keep(value, "ceiling", engine, name, batch)
        self._plain["model"] = answer["model"]
        return ", ".join(f"{value:,.0f} at {batch}" for batch, value in rates.items()) + " images/s"

    def _inference(self, engine: str) -> str:
        goal = self._options.images
        unit = self._lab.unit(
            "inference",
            {
                **self._engine(engine),
                "IOT_IMAGE_TOPIC": f"{TOPICS}images-{PARTITIONS}",
                "IOT_PREDICTION_TOPIC": (topic := self._topic("predictions")),
            },
        )
        samples = self._run("inference", [unit], goal)
        first, last = figures.steady(samples, goal)
        rate, split = figures.rate(first, last), figures.cpu_split(first, last)
        self._keep(rate, "inference", engine, "images_per_second")
        for part, value in split.items():
            self._keep(value, "inference", engine, "cpu_ms_per_image", part)
        self._keep(figures.cores_used(first, last), "inference", engine, "cores_used")
        self._keep(figures.machine_busy(first, last), "inference", engine, "machine_busy")
        self._keep(figures.mean_batch(first, last), "inference", engine, "batch")
        self._check(topic, figures.everywhere(samples[-1], figures.RECORDS_OUT))
        parts = ", ".join(f"{part} {value:.2f}" for part, value in split.items() if part != "all")
        return f"{rate:,.0f} images/s; CPU ms an image: {split['all']:.2f} ({parts})"

    def _check(self, topic: str, delivered: float) -> None:
        """Hold what an app says it delivered against what the topic holds."""
        there = self._lab.records(topic)
        if there < delivered:
            raise LabError(f"{topic} holds {there} records, {delivered:.0f} were delivered")

    def _baseline(self) -> str:
        seconds = self._options.seconds
        images = f"{TOPICS}images-{PARTITIONS}"
        predictions = self._topic("predictions")
        settings = {"IOT_IMAGE_TOPIC": images, "IOT_PREDICTION_TOPIC": predictions}
        done = self._lab.program("inference", settings, "baseline", "infer", str(seconds))
        inferred = done["messages"] / done["seconds"]
        self._keep(inferred, "baseline", "inference_images_per_second")
        settings["IOT_STORE_URL"] = self._lab.store_url(self._lab.create_database())
        done = self._lab.program("storage", settings, "baseline", "store", str(seconds))
        stored = done["messages"] / done["seconds"]
        self._keep(stored, "baseline", "storage_messages_per_second")
        self._lab.ask_database("remove")
        return f"{inferred:,.1f} images/s; storage {stored:,.1f} messages/s"

    def _classify_all(self) -> str:
        """Make the predictions that storage is measured with."""
        goal = self._options.images
        self._lab.create_topic("predictions", partitions=PARTITIONS, like="IOT_PREDICTION_TOPIC")
        unit = self._lab.unit("inference", self._storage_topics())
        self._run("inference", [unit], goal, seconds=900)
        self._check(f"{TOPICS}predictions", goal)
        return f"{goal:,} predictions"

    @staticmethod
    def _storage_topics() -> dict[str, str]:
        return {
            "IOT_IMAGE_TOPIC": f"{TOPICS}images-{PARTITIONS}",
            "IOT_PREDICTION_TOPIC": f"{TOPICS}predictions",
        }

    def _storage(self) -> str:
        documents = self._options.images
        database = self._lab.create_database()
        url = self._lab.store_url(database)
        unit = self._lab.unit("storage", {**self._storage_topics(), "IOT_STORE_URL": url})
        goal = documents * DELIVERED_BY_STORAGE
        before = self._lab.cpu_seconds("storage", "couchdb")
        samples = self._run("storage", [unit], goal, seconds=600, interval=0.25)
        used = self._lab.cpu_seconds("storage", "couchdb") - before
        complete = self._lab.ask_database("complete", database)
        if complete != documents:
            raise LabError(f"{complete} of {documents} documents are complete")
        first, last = figures.steady(samples, goal)
        rate = figures.rate(first, last) / DELIVERED_BY_STORAGE
        split = figures.cpu_split(first, last)
        self._keep(rate, "storage", "documents_per_second")
        for part, value in split.items():
            milliseconds = value * DELIVERED_BY_STORAGE
            self._keep(milliseconds, "storage", "cpu_ms_per_document", part)
        self._keep(used / documents * 1000, "storage", "cpu_ms_per_document", "database")
        self._keep(figures.machine_busy(first, last), "storage", "machine_busy")
        self._lab.ask_database("remove")
        return f"{rate:,.0f} documents/s; the database used {used / documents * 1000:.2f} ms each"

    def _bulk_docs(self) -> str:
        batch = self._lab.hosts["storage"].settings["IOT_MAX_BATCH_SIZE"]
        settings = {
            **self._storage_topics(),
            "IOT_STORE_URL": self._lab.store_url(self._lab.create_database()),
        }
        words = ("bulk_docs", str(self._options.images), str(batch))
        before = self._lab.cpu_seconds("storage", "couchdb")
        done = self._lab.program("storage", settings, *words)
        used = self._lab.cpu_seconds("storage", "couchdb") - before
        rate = done["documents"] / done["seconds"]
        self._keep(rate, "storage", "bulk_docs_per_second")
        for name, seconds in (("all", done["cpu_seconds"]), ("database", used)):
            milliseconds = seconds / done["documents"] * 1000
            self._keep(milliseconds, "storage", "bulk_docs_cpu_ms_per_document", name)
        self._lab.ask_database("remove")
        return f"{rate:,.0f} documents/s, {done['batch']} at once"

    def _payload(self) -> str:
        """Put images as the producer sends them on the broker's host, where the tool runs."""
        values = self._lab.values(f"{TOPICS}images-{PARTITIONS}", PAYLOADS)
        size = sum(map(len, values)) / len(values)
        self._plain["record_bytes"] = figures.significant(size)
        broker = self._lab.hosts["broker"]
        broker.run(f"sudo tee {FOLDER}/payload >/dev/null", script="\n".join(values))
        # The tool connects as the administrator does. It runs as Kafka's user, who alone can read
        # how; in its arguments everybody could.
        settings = f"$(test -e {ADMIN_SETTINGS} && echo {ADMIN_SETTINGS} || echo /dev/null)"
        broker.run(f"sudo install -m 0400 -o kafka -g kafka {settings} {FOLDER}/client.properties")
        return f"{len(values)} records of {size:,.0f} bytes on average"

    def _producer(self) -> str:
        goal, topic = self._options.records, self._topic("produced")
        samples = self._produce(topic, goal)
        first, last = figures.steady(samples, goal)
        rate = figures.rate(first, last)
        self._keep(rate, "producer", "records_per_second")
        for part, value in figures.cpu_split(first, last).items():
            self._keep(value, "producer", "cpu_ms_per_record", part)
        self._check(topic, goal)
        self._lab.remove(topic)
        return f"{rate:,.0f} records/s"

    def _perf_test(self, name: str) -> str:
        """Run kafka-producer-perf-test.sh on as many cores as the producer's host has."""
        producer = self._lab.hosts["producer"]
        compressed, more = PERF_TESTS[name]
        compression = producer.settings["IOT_COMPRESSION"] if compressed else "none"
        topic, count = self._topic("produced"), self._options.records
        properties = [
            f"bootstrap.servers={producer.settings['IOT_BOOTSTRAP_SERVERS']}",
            *("acks=all", "enable.idempotence=true", f"compression.type={compression}"),
            *(f"{key}={value}" for key, value in more.items()),
        ]
        cores = f"0-{producer.machine.cpus - 1}"
        words = [
            *("sudo systemd-run --quiet --wait --pipe --collect --unit=iot-bench-perf-test",),
            *("--property=User=kafka", "taskset", "--cpu-list", cores),
            "/opt/kafka/bin/kafka-producer-perf-test.sh",
            *("--topic", topic, "--num-records", str(PERF_TEST_WARM_UP + count)),
            *("--warmup-records", str(PERF_TEST_WARM_UP), "--throughput", "-1"),
            *("--payload-file", f"{FOLDER}/payload"),
            *("--command-config", f"{FOLDER}/client.properties"),
            *("--command-property", *properties),
        ]
        said = self._lab.hosts["broker"].run(*words, timeout=300)
        rate = steady_rate(said)
        self._keep(rate, "producer", f"{name}_records_per_second")
        self._lab.remove(topic)
        return f"{rate:,.0f} records/s, {compression}"

    def _tls(self) -> str:
        """Compare on brokers of this machine: the lab's has no port without TLS."""
        options = self._options
        words = ["--count", str(options.records), "--rounds", str(options.repetitions)]
        logged("tls-cost", [sys.executable, str(SCRIPTS / "tls_cost.py"), *words])
        found = json.loads((paths.LOGS / "tls-cost.log").read_text().splitlines()[-1])
        for side, measured in found.items():
            for name, values in measured.items():
                for value in values:
                    self._keep(value, "tls", side, name)
        ours, theirs = (found[side]["records_per_second"] for side in ("tls", "plaintext"))
        return (
            f"{statistics.median(ours):,.0f} records/s, "
            f"in the clear {statistics.median(theirs):,.0f}"
        )

    def _scaling(self, workers: int) -> str:
        goal, topic = self._options.images, f"{TOPICS}images-{workers}"
        shared = {
            "IOT_IMAGE_TOPIC": topic,
            "IOT_PREDICTION_TOPIC": self._topic("predictions", workers),
            "IOT_GROUP_ID": f"{TOPICS}scaling-{self._topics}",
        }
        units = [self._lab.unit("inference", shared) for _ in range(workers)]
        before = self._lab.cpu_seconds("broker", "kafka")
        samples = self._run("inference", units, goal, seconds=self._options.seconds + 10)
        used = self._lab.cpu_seconds("broker", "kafka") - before
        first, last = figures.steady(samples, goal)
        rate = figures.rate(first, last)
        images = figures.everywhere(samples[-1], figures.RECORDS_OUT)
        place = ("scaling", str(workers))
        self._keep(rate, *place, "images_per_second")
        self._keep(figures.cpu_split(first, last)["all"], *place, "cpu_ms_per_image", "apps")
        self._keep(used / images * 1000, *place, "cpu_ms_per_image", "broker")
        self._keep(figures.cores_used(first, last), *place, "cores_used_by_apps")
        self._keep(used / images * rate, *place, "cores_used_by_broker")
        self._keep(figures.machine_busy(first, last), *place, "machine_busy")
        busy = figures.machine_busy(first, last)
        return f"{rate:,.0f} images/s; {busy:.0%} of the machine's cores busy"

    def _latency(self) -> str:
        """Send images at several rates through all three apps; read the documents' times."""
        topics = {
            "IOT_IMAGE_TOPIC": self._topic("images"),
            "IOT_PREDICTION_TOPIC": self._topic("predictions"),
        }
        database = self._lab.create_database()
        infer = self._lab.unit("inference", topics)
        url = self._lab.store_url(database)
        store = self._lab.unit("storage", {**topics, "IOT_STORE_URL": url})
        self._start("inference", [infer])
        self._start("storage", [store])
        repetitions = self._options.repetitions

        def send(pace: int, count: int, source: str) -> None:
            self._produce(
                topics["IOT_IMAGE_TOPIC"],
                count,
                IOT_INTERVAL=f"{1 / pace:g}",
                IOT_SOURCE_NAME=source,
            )

        send(10, WARM_UP_IMAGES, "warm-up")
        expected: dict[str, int] = {"warm-up": WARM_UP_IMAGES}
        for number in range(1, repetitions + 1):
            for pace, count in RATES.items():
                source = f"{pace}/{number}"
                expected[source] = max(1, round(count / repetitions))
                say(f"            {expected[source]} images at {pace}/s, {number} of {repetitions}")
                send(pace, expected[source], source)
        end = time.monotonic() + LATENCY_SETTLE
        while (complete := self._lab.ask_database("complete", database)) < sum(expected.values()):
            if time.monotonic() > end:
                raise LabError(f"{complete} of {sum(expected.values())} images were stored")
            time.sleep(1)
        self._lab.ask_units("inference", {"action": "stop", "units": [infer]})
        self._lab.ask_units("storage", {"action": "stop", "units": [store]})
        answer: dict[str, list[float]] = self._lab.ask_database("latencies", database)
        for source, values in answer.items():
            if source != "warm-up":
                self._latencies.setdefault(source.partition("/")[0], []).append(values)
        self._lab.ask_database("remove")
        found: dict[str, Any] = {}
        self._put_latencies(found)
        return ", ".join(
            f"{pace}/s: p50 {entry['p50']:.0f}, p99 {entry['p99']:.0f} ms"
            for pace, entry in found["latency_ms"].items()
        )

    def _put_latencies(self, found: dict[str, Any]) -> None:
        """Percentiles of all images at a rate; the repetitions' p50 and p99 tell the spread."""
        for pace, repetitions in sorted(self._latencies.items(), key=lambda item: int(item[0])):
            together = [value for values in repetitions for value in values]
            by_repetition = [figures.percentiles(values) for values in repetitions]
            entry = {**figures.percentiles(together), "images": len(together)}
            found.setdefault("latency_ms", {})[pace] = entry
            found.setdefault("latency_repetitions_ms", {})[pace] = {
                name: figures.summary(each[name] for each in by_repetition)
                for name in ("p50", "p95", "p99")
            }

    def _memory(self) -> str:
        """Let many images flow through all three apps and look at their memory meanwhile."""
        counted = self._options.memory_images
        warm_up = counted // 5
        count = warm_up + counted
        topics = {
            "IOT_IMAGE_TOPIC": self._topic("images"),
            "IOT_PREDICTION_TOPIC": self._topic("predictions"),
        }
        url = self._lab.store_url(self._lab.create_database())
        delivered = {"inference": 1, "storage": DELIVERED_BY_STORAGE, "producer": 1}
        units = {
            "inference": self._lab.unit("inference", topics),
            "storage": self._lab.unit("storage", {**topics, "IOT_STORE_URL": url}),
            "producer": self._lab.unit(
                "producer", {**topics, "IOT_COUNT": str(count), "IOT_INTERVAL": "0"}
            ),
        }
        # Generous: a tenth of what a small machine does.
        limit = 300 + count / 50
        jobs = {}
        for role, unit in units.items():
            self._start(role, [unit])
            more = {"seconds": limit, "interval": 0.25 if role == "producer" else 2.0}
            jobs[role] = self._watch(role, [unit], count * delivered[role], **more)
        found: dict[str, Any] = {"images": counted, "warm_up": warm_up}
        for role, job in jobs.items():
            answer = job.result(limit + PATIENCE + 60)
            if role != "producer" and answer["reason"] != "goal":
                raise LabError(f"{role} did not come to the end within {limit:.0f} s")
            found[role] = figures.resident_mb(
                answer["samples"], warm_up * delivered[role], counted * delivered[role]
            )
        self._plain["memory_mb"] = found
        return ", ".join(
            f"{role} {found[role]['start']:.0f} to {found[role]['end']:.0f} MB" for role in units
        )


def steady_rate(said: str) -> float:
    """Return records/s from what kafka-producer-perf-test.sh prints: its last summary.

    With warm-up records that is the one of the time after them.

    Raises LabError when there is none.
    """
    rates = re.findall(r"records sent, ([0-9.]+) records/sec", said)
    if not rates:
        raise LabError(f"kafka-producer-perf-test.sh says no rate: {said.strip()[-400:]}")
    return float(rates[-1])


def facts(lab: Lab) -> dict[str, Any]:
    """Return the machine and the versions of what runs on the hosts, without their names."""
    found = {role: host.ask("facts") for role, host in lab.hosts.items()}
    machine = found["inference"]["machine"]
    for entry in found.values():
        del entry["machine"]
    server = lab.ask_database("version")
    vendor = server.get("vendor", {}).get("name", "")
    # The stand-in calls itself that.
    found["storage"]["database"] = (
        f"the lab's {vendor}" if "stand-in" in vendor else f"CouchDB {server['version']}"
    )
    machine["host_cores"] = {role: host.machine.cpus for role, host in lab.hosts.items()}
    return {"machine": machine, "versions": found}
