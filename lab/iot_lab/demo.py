"""`lab demo`: the whole pipeline as plain processes, each image printed on its way.

Runs in the apps' virtual environment (see `lab setup demo`): it reads the topics and the database
like any other client, so what it prints is what really arrived there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from iot_lab.artifacts import ArtifactError
from iot_lab.command_line import Exit, Parser
from iot_lab.console import Colour, paint, say
from iot_lab.processes import App, Broker, CouchDB, Pipeline, Process, ProcessError
from iot_pipeline.errors import InvalidMessage
from iot_pipeline.schema import STORED_AT, DeadLetter, ImageMessage, PredictionMessage, parse_time

POLL = 0.1  # seconds
DRAIN = 20.0  # seconds that the images on their way get at the end
SILENCE = 15.0  # seconds without a stored image after which the demo says that it waits
ASKED_AT_ONCE = 200  # documents


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM."""


@dataclass(slots=True)
class Journey:
    """What is known of one image so far."""

    number: int
    truth: str
    produced_at: datetime
    prediction: PredictionMessage | None = None
    stored_at: datetime | None = None

    @property
    def latency(self) -> float:
        """Seconds from produced to stored with its prediction."""
        return (self.stored_at - self.produced_at).total_seconds() if self.stored_at else 0.0


class Watcher:
    """Follows images through topics and database."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._consumer = KafkaConsumer(
            bootstrap_servers=pipeline.broker.bootstrap_servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        topics = (pipeline.image_topic, pipeline.prediction_topic, pipeline.dead_letter_topic)
        self._consumer.assign(
            [
                TopicPartition(topic, partition)
                for topic in topics
                for partition in sorted(self._consumer.partitions_for_topic(topic) or {0})
            ]
        )
        self._predictions: dict[str, PredictionMessage] = {}
        self.journeys: dict[str, Journey] = {}
        self.pending: dict[str, Journey] = {}
        self.dead_letters: list[DeadLetter] = []  # not shown yet

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def caught_up(self) -> bool:
        """Whether nothing is left to read in the topics."""
        ends = self._consumer.end_offsets(self._consumer.assignment())
        return all(self._consumer.position(at) >= end for at, end in ends.items())

    def look(self) -> list[Journey]:
        """Read what is new; returns the images whose document is complete since the last look."""
        for records in self._consumer.poll(timeout_ms=int(POLL * 1000)).values():
            for record in records:
                self._take(record)
        return self._ask_database() if self.pending else []

    def _take(self, record: Any) -> None:
        if record.topic == self._pipeline.dead_letter_topic:
            self.dead_letters.append(DeadLetter.from_headers(record.headers))
            self.pending.pop((record.key or b"").decode(errors="replace"), None)
            return
        try:
            if record.topic == self._pipeline.image_topic:
                image = ImageMessage.decode(record.value)
                number = len(self.journeys) + 1
                journey = Journey(number, image.ground_truth, image.produced_at)
                self.journeys[image.id] = self.pending[image.id] = journey
            else:
                prediction = PredictionMessage.decode(record.value)
                self._predictions[prediction.id] = prediction
        except InvalidMessage:
            pass  # It comes back as a dead letter.

    def _ask_database(self) -> list[Journey]:
        keys = [key for key in self.pending if key in self._predictions][:ASKED_AT_ONCE]
        if not keys:
            return []
        documents = self._pipeline.database.documents(self._pipeline.database_name, keys)
        complete = []
        for identifier, document in documents.items():
            if STORED_AT in document:
                journey = self.pending.pop(identifier)
                journey.prediction = self._predictions.pop(identifier)
                journey.stored_at = parse_time(document[STORED_AT])
                complete.append(journey)
        return complete


class Screen:
    """What the person sees."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._right = 0
        self._shown = 0

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Print what is being waited for, and how long it took."""
        began = time.monotonic()
        print(f"  {what:<60}", end="", flush=True)
        try:
            yield
        except BaseException:
            say(paint("✗", Colour.BAD))
            raise
        say(f"{paint('✓', Colour.GOOD)} {time.monotonic() - began:5.1f} s")

    def journey(self, journey: Journey) -> None:
        """Print one image's way."""
        prediction = journey.prediction
        if prediction is None:
            return
        right = prediction.inferred_value == journey.truth
        self._right += right
        self._shown += 1
        classified = (prediction.inferred_at - journey.produced_at).total_seconds()
        verdict = paint("✓", Colour.GOOD) if right else paint("✗", Colour.BAD)
        share = self._right / self._shown
        say(
            f"{journey.number:>5}  {journey.produced_at.astimezone():%H:%M:%S}  {prediction.id}  "
            f"{journey.truth:<10}  {prediction.inferred_value:<10} {verdict}  "
            f"{prediction.confidence:4.0%}  {classified:8.2f} s  {journey.latency:6.2f} s  "
            f"{share:12.0%}"
        )

    def ready(self) -> None:
        """Say that images flow from now on, and what the columns are."""
        say(
            f"\nUp after {time.monotonic() - self._started:.0f} s. Each image gets a line once it "
            "is stored with its prediction.\nSeconds count from when it was produced. Ctrl-C ends "
            "the demo with an audit.\n\n"
            f"{'no.':>5}  {'produced':<8}  {'id':<36}  {'truth':<10}  {'predicted':<12}  sure  "
            "classified    stored  right so far"
        )


class Demo:
    """Starts everything, follows the images, ends everything."""

    def __init__(self, options: argparse.Namespace, folder: Path, screen: Screen) -> None:
        self._options = options
        self._folder = folder
        self._screen = screen

    def run(self) -> int:
        """Run until the count is reached or the person ends it; returns the exit status."""
        say(f"Starting the pipeline on 127.0.0.1; logs and data in {self._folder}")
        with ExitStack() as ending:
            ending.callback(say, "Everything is stopped.")
            broker, database = Broker(self._folder), CouchDB(self._folder)
            for server in (broker, database):
                ending.callback(_stop, server)
                server.start()
            with self._screen.step(f"Database at {database.url}"):
                database.wait_ready()
            with self._screen.step(f"Kafka at {broker.bootstrap_servers}"):
                broker.wait_ready()
            pipeline = Pipeline(self._folder, broker, database)
            ending.callback(pipeline.stop)
            with self._screen.step("Topics and database"):
                pipeline.prepare()
            workers = [pipeline.infer().start(), pipeline.store().start()]
            for worker, what in zip(workers, ("Inference, with its model", "Storage"), strict=True):
                with self._screen.step(what):
                    worker.wait_ready()
            watcher = Watcher(pipeline)
            ending.callback(watcher.close)
            return self._follow(pipeline, watcher, workers)

    def _follow(self, pipeline: Pipeline, watcher: Watcher, workers: list[App]) -> int:
        options = self._options
        flags = ["--interval", str(options.interval), "--count", str(options.count)]
        flags += ["--source", str(options.dataset)] if options.dataset else []
        flags += ["--shuffle"] if options.shuffle else []
        with self._screen.step(f"Producer, an image each {options.interval:g} s"):
            producer = pipeline.produce(*flags).start().wait_ready()
        self._screen.ready()
        try:
            self._watch(watcher, producer, workers)
        except _Interrupted:
            say("\nNo more images; waiting for those on their way …")
        producer.stop()
        self._drain(watcher)
        say("\nAudit of both topics and the database:\n")
        audit = pipeline.run("audit", "--grace", "0")
        say(audit.stdout.rstrip() + audit.stderr.rstrip() + "\n")
        return audit.returncode

    def _watch(self, watcher: Watcher, producer: App, workers: list[App]) -> None:
        """Print images until the producer has sent as many as it was told to."""
        heard = time.monotonic()
        while producer.running:
            if self._show(watcher) or not watcher.pending:
                heard = time.monotonic()
            if time.monotonic() - heard > SILENCE:
                say(f"  {len(watcher.pending)} images wait; logs in {self._folder}")
                heard = time.monotonic()
            for worker in workers:
                if not worker.running:
                    raise worker.error(f"ended with status {worker.status()}")
        if producer.status():
            raise producer.error(f"ended with status {producer.status()}")

    def _show(self, watcher: Watcher) -> bool:
        complete = watcher.look()
        for journey in complete:
            self._screen.journey(journey)
        while watcher.dead_letters:
            letter = watcher.dead_letters.pop(0)
            say(f"  refused by {letter.stage}: {letter.reason}: {letter.message}")
        return bool(complete)

    def _drain(self, watcher: Watcher) -> None:
        """Show what is still on its way, for a while; the audit judges what is not."""
        deadline = time.monotonic() + DRAIN
        self._show(watcher)
        while (watcher.pending or not watcher.caught_up()) and time.monotonic() < deadline:
            self._show(watcher)


def _stop(process: Process) -> None:
    try:
        process.stop()
    finally:
        process.kill()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise _Interrupted


def main(arguments: list[str] | None = None) -> int:
    """Run the demo as the command line says and return its exit status."""
    parser = Parser(
        prog="lab demo",
        description="Run the pipeline as plain processes on loopback and print every image: when "
        "it was produced, how it was classified, when it was stored. Ends with an audit, whose "
        "exit status (0: nothing is missing) is the demo's.",
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="time between images (1)"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=0,
        metavar="N",
        help="images to send; 0 goes on until Ctrl-C (0)",
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="PATH",
        default=os.environ.get("DATASET") or None,
        help="folder or tar of class-named folders to send instead of the drawings that ship "
        "(default: $DATASET)",
    )
    parser.add_argument("--shuffle", action="store_true", help="send the images in random order")
    parser.add_argument("--keep", action="store_true", help="keep logs and data afterwards")
    options = parser.parse_args(arguments)
    if options.dataset:
        options.dataset = options.dataset.expanduser().resolve()
        if not options.dataset.exists():
            parser.error(f"there is no {options.dataset}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="iot-demo-"))
    try:
        status = Demo(options, folder, Screen()).run()
    except _Interrupted:
        print("\nInterrupted: ended without an audit.")
        status = Exit.INTERRUPTED
    except (ProcessError, ArtifactError) as error:
        print(f"\n{error}", file=sys.stderr)
        status = Exit.UNAVAILABLE
    if status not in (Exit.OK, Exit.INTERRUPTED) or options.keep:
        print(f"Logs and data: {folder}")
    else:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
