"""The benchmark's command line: `lab bench`, `make bench`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iot_lab import paths, setup
from iot_lab.bench import measure, page
from iot_lab.bench.access import Lab
from iot_lab.command_line import Exit, Parser
from iot_lab.console import Colour, duration, paint, say
from iot_lab.shell import LabError, locked, shown, stop_on_signals

DOCS = paths.ROOT / "docs"
PARTIAL = paths.STATE / "bench"
JSON_NAME = "benchmarks.json"


def main(arguments: list[str] | None = None) -> int:
    """Measure, or only render, as the command line says. Returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    stop_on_signals()
    try:
        if options.render:
            page.write(DOCS / JSON_NAME)
            say(f"{shown(DOCS / 'benchmarks.md')} is made from {shown(DOCS / JSON_NAME)}.")
            return 0
        with locked("bench"):
            return _measure(options, words)
    except LabError as error:
        print(f"{paint('bench:', Colour.BAD)} {error}", file=sys.stderr)
        return Exit.UNAVAILABLE
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    listed = "; ".join(f"{name}: {text}" for name, text in measure.PARTS.items())
    parser = Parser(
        prog="lab bench",
        description="Measure the pipeline on the running lab. Its services are stopped meanwhile "
        "and started again at the end; topics, groups and databases that the benchmark makes are "
        "removed. A whole run writes docs/benchmarks.json and .md, one with --only the same files "
        f"in {shown(PARTIAL)}. Parts: {listed}.",
    )
    parser.add_argument(
        "--only", metavar="PART[,PART...]", help="measure these parts (default: all)"
    )
    parser.add_argument(
        "--images", type=int, default=20_000, metavar="N", help="images of the backlog (20000)"
    )
    parser.add_argument(
        "--records", type=int, default=100_000, metavar="N", help="records of the producer (100000)"
    )
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="of each (3)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=12.0,
        metavar="N",
        help="of a run that does not come to its end before (12)",
    )
    parser.add_argument(
        "--memory-images",
        type=int,
        default=100_000,
        metavar="N",
        help="images that memory is watched over (100000)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for what is written")
    parser.add_argument(
        "--render", action="store_true", help="only make the page again, from docs/benchmarks.json"
    )
    return parser


def _measure(chosen: argparse.Namespace, words: list[str]) -> int:
    parts = chosen.only.split(",") if chosen.only else list(measure.PARTS)
    unknown = sorted(set(parts) - set(measure.PARTS))
    if unknown:
        raise LabError(f"no part is called {', '.join(unknown)}: {', '.join(measure.PARTS)}")
    options = measure.Options(
        parts=parts,
        images=chosen.images,
        records=chosen.records,
        repetitions=chosen.repetitions,
        seconds=chosen.seconds,
        memory_images=chosen.memory_images,
    )
    folder = chosen.output or (PARTIAL if chosen.only else DOCS)
    lab = Lab(os.environ.get("TOPOLOGY") or "couchdb")
    lab.check()
    if "tls" in parts:
        # It runs the apps here.
        setup.setup("demo")
    started = time.monotonic()
    found: dict[str, Any] = {
        "made": {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"make bench{f' ARGS={shlex.quote(shlex.join(words))}' if words else ''}",
        }
    }
    measurement: measure.Measurement | None = None
    failures: dict[str, str] = {}
    try:
        say("Stopping the lab's services for the time of the measurement")
        lab.prepare()
        found |= measure.facts(lab)
        measurement = measure.Measurement(lab, options)
        _run(lab, measurement, failures)
    finally:
        interrupted = sys.exc_info()[0] is not None
        _restore(lab, measurement)
        if measurement is not None:
            found |= measurement.found()
            found["made"]["minutes"] = round((time.monotonic() - started) / 60, 1)
            found["failures"] = failures
            _write(found, PARTIAL if interrupted or failures else folder)
    say(page.bars_as_text(found))
    for title, problem in failures.items():
        say(f"{paint('failed:', Colour.BAD)} {title}: {problem.splitlines()[0]}")
    say(f"Measured in {duration(time.monotonic() - started)}.")
    return 1 if failures else 0


def _run(lab: Lab, measurement: measure.Measurement, failures: dict[str, str]) -> None:
    """Run the steps, saying what is left. What fails is told and left out."""
    steps = measurement.steps()
    planned = sum(step.seconds for step in steps)
    started = time.monotonic()
    done = 0.0
    say(f"{len(steps)} steps, about {duration(planned)}")
    for number, step in enumerate(steps, start=1):
        used = time.monotonic() - started
        # The plan's own seconds, corrected by how far it was off so far.
        pace = used / done if done > planned / 20 else 1.0
        left = duration(max(0.0, planned - done) * pace)
        say(f"{number:>4} of {len(steps)}  {step.title}, about {left} left in all")
        began = time.monotonic()
        try:
            said = step.run()
        except (LabError, ValueError, KeyError) as error:
            failures[step.title] = str(error) or repr(error)
            say(f"            {paint('failed', Colour.BAD)}: {failures[step.title]}")
            measurement.cancel()
            lab.stop_units()
        else:
            took = duration(time.monotonic() - began)
            say(f"            {said}{paint(f'  ({took})', Colour.QUIET)}")
        done += step.seconds


def _restore(lab: Lab, measurement: measure.Measurement | None) -> None:
    """Leave the lab as it was found. Signals wait until that is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    say("Removing what the benchmark made, and starting the lab's services again")
    if measurement is not None:
        measurement.cancel()
    for problem in lab.restore():
        say(f"            {paint('not removed', Colour.BAD)}: {problem}")
    stop_on_signals()


def _write(found: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JSON_NAME
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    page.write(file)
    say(f"Written: {shown(file)} and {shown(file.with_suffix('.md'))}")


if __name__ == "__main__":
    sys.exit(main())
