"""Compare every engine and precision with torch in single precision: accuracy, speed, size.

    python parity.py --images val.tar.xz --markdown

Each engine that is installed here is prepared as `iot-pipeline prepare-model` does it, but for the
check: what it would refuse is in the table, marked. Speeds are the medians of several rounds, in
each of which every engine has its turn, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iot_pipeline.classifier import Classifier, load_classifier
from iot_pipeline.engines import MODULES, PRECISIONS, EngineError, find_engine
from iot_pipeline.model import find_model
from iot_pipeline.prepare import ALLOWED_LOSS, Labelled

BATCHES = (1, 8, 32, 64)
PACKAGES = {
    "torch": (),
    "torch-compile": (),
    "onnxruntime": ("onnxruntime", "flatbuffers", "onnx", "protobuf", "ml_dtypes"),
    "openvino": ("openvino", "onnx", "protobuf", "ml_dtypes"),
}
"""What an engine needs beside torch and timm, which all of them are prepared with."""


@dataclass
class Row:
    """One engine in one precision."""

    engine: str
    precision: str
    version: str
    classifier: Classifier
    accuracy: float = 0.0
    """Share of the images that it gets right, 0 to 1."""
    speeds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Images a second of each round, by batch size."""
    cpu: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """CPU milliseconds an image of each round, by batch size."""

    def speed(self, batch: int) -> float:
        """Median images a second."""
        return statistics.median(self.speeds[batch])

    def best(self) -> float:
        """The highest median of all batch sizes, images a second."""
        return max(self.speed(batch) for batch in self.speeds)


def megabytes(packages: Sequence[str]) -> float:
    """What Python packages take on disk, MB."""
    sizes = [
        Path(str(file.locate())).stat().st_size
        for package in packages
        for file in importlib.metadata.files(package) or ()
        if Path(str(file.locate())).is_file()
    ]
    return sum(sizes) / 1e6


def prepared(spec: str, names: Sequence[str], threads: int, folder: Path) -> list[Row]:
    """Those engines that work here, in every precision."""
    model = find_model(spec)
    rows = []
    for name in names:
        for precision in PRECISIONS[name]:
            try:
                engine = find_engine(name)
                place = folder / f"{name}-{precision}"
                place.mkdir()
                engine.build(model, precision, model.config.ranges, place)
                run = engine.load(model, precision, place, threads)
            except EngineError as error:
                print(f"left out: {name} {precision}: {error}", file=sys.stderr)
                continue
            rows.append(Row(name, precision, engine.version(), Classifier(model, run)))
    return rows


def measure(rows: Sequence[Row], images: Labelled, rounds: int, seconds: float) -> None:
    """Fill in accuracies and speeds."""
    for row in rows:
        row.accuracy = images.accuracy(row.classifier)
        print(f"{row.engine} {row.precision}: {row.accuracy:.2%}", file=sys.stderr)
    for _ in range(rounds):
        for batch in BATCHES:
            pixels = images.pixels[:batch]
            for row in rows:
                row.classifier.predict(pixels)
                count, began, began_cpu = 0, time.perf_counter(), time.process_time()
                while time.perf_counter() - began < seconds:
                    row.classifier.predict(pixels)
                    count += batch
                row.speeds[batch].append(count / (time.perf_counter() - began))
                row.cpu[batch].append(1e3 * (time.process_time() - began_cpu) / count)


def markdown(rows: Sequence[Row], reference: Row) -> str:
    """The table for docs/engines.md."""
    speeds = " | ".join(f"at {batch}" for batch in BATCHES)
    lines = [
        f"| engine | precision | accuracy | points | {speeds} | x at 1 | x at best | ms | MB |",
        "|---|---|" + "---:|" * (len(BATCHES) + 6),
    ]
    for row in rows:
        difference = 100 * (row.accuracy - reference.accuracy)
        refused = " (refused)" if difference < -100 * ALLOWED_LOSS else ""
        lines.append(
            f"| {row.engine} {row.version} | {row.precision} | {row.accuracy:.2%} "
            f"| {difference:+.2f}{refused} | "
            + " | ".join(f"{row.speed(batch):,.0f}" for batch in BATCHES)
            + f" | {row.speed(1) / reference.speed(1):.1f} | {row.best() / reference.best():.1f} "
            f"| {statistics.median(row.cpu[32]):.2f} | {megabytes(PACKAGES[row.engine]):.0f} |"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], reference: Row) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [
        {
            "engine": row.engine,
            "version": row.version,
            "precision": row.precision,
            "accuracy": row.accuracy,
            "parity": row.accuracy >= reference.accuracy - ALLOWED_LOSS,
            "images_per_second": {batch: round(row.speed(batch), 1) for batch in BATCHES},
            "cpu_ms_per_image": {
                batch: round(statistics.median(row.cpu[batch]), 3) for batch in BATCHES
            },
            "times_eager_at_1": round(row.speed(1) / reference.speed(1), 2),
            "times_eager_at_best": round(row.best() / reference.best(), 2),
            "packages_mb": round(megabytes(PACKAGES[row.engine])),
        }
        for row in rows
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's description. Exit status 1 when an engine has no parity."""
    parser = argparse.ArgumentParser(
        description="Compare every engine and precision with torch in single precision.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--images", default="sample", help="sample, or folder or tar of class-named folders")
    option("--limit", type=int, help="use only so many of them, of all classes in turn")
    option("--model", default="shipped", help="shipped or local-dir:PATH")
    option("--engines", nargs="+", choices=MODULES, default=list(MODULES), help="which to compare")
    option("--threads", type=int, default=2, help="CPU threads")
    option("--rounds", type=int, default=5, help="rounds of measuring speed")
    option("--seconds", type=float, default=0.5, help="how long each measurement takes")
    option("--markdown", action="store_true", help="print a table instead of JSON")
    options = parser.parse_args(argv)

    images = Labelled.read(options.images, load_classifier(options.model), options.limit)
    with tempfile.TemporaryDirectory() as folder:
        # torch in single precision comes first, since the others are held against it.
        names = list(dict.fromkeys(["torch", *options.engines]))
        rows = prepared(options.model, names, options.threads, Path(folder))
        measure(rows, images, options.rounds, options.seconds)
    reference = rows[0]
    if options.markdown:
        print(markdown(rows, reference))
    else:
        print(json.dumps(as_json(rows, reference), indent=2))
    return int(any(row.accuracy < reference.accuracy - ALLOWED_LOSS - 1e-9 for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
