"""The drills' command line: `lab drill`, `make drill`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from iot_lab import artifacts, hosts, paths
from iot_lab.command_line import Exit, Parser
from iot_lab.console import Colour, duration, paint, say, table
from iot_lab.drills import drill as drills
from iot_lab.drills import faults, page, run
from iot_lab.shell import LabError, locked, shown, stop_on_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run drills, or list them, as the command line says. Returns the exit status."""
    options = _parser().parse_args(arguments)
    stop_on_signals()
    try:
        if options.list or not options.names:
            _list()
            return 0
        with locked("drill"):
            return _run(options)
    except LabError as error:
        print(f"{paint('drill:', Colour.BAD)} {error}", file=sys.stderr)
        return Exit.UNAVAILABLE
    except KeyboardInterrupt:
        print("drill: interrupted; what it did was undone", file=sys.stderr)
        return Exit.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lab drill",
        description="Break the running lab on purpose while images flow, and audit. Each drill is "
        f"a file of {shown(drills.FOLDER)}. Exit status 1: something was lost, stored twice, or "
        "not back in time.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="drills, `short` or `all`")
    parser.add_argument("--list", action="store_true", help="say which drills there are")
    parser.add_argument(
        "--topology",
        default=os.environ.get("TOPOLOGY") or "couchdb",
        choices=hosts.topologies(),
        help="a folder of inventory/ (default: $TOPOLOGY, else couchdb)",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"keep what was seen in {shown(page.PAGE)}"
    )
    parser.add_argument(
        "--audit-only",
        action="store_true",
        help="judge by the audit alone, and send ten images a second at most: on a busy machine, "
        "times and failed writes say nothing",
    )
    return parser


def _list() -> None:
    known = [drills.load(name) for name in drills.names()]
    rows = [(d.name, "short" if d.short else "", d.summary) for d in known]
    say(table(("DRILL", "", "WHAT HAPPENS"), rows))
    say("\nmake drill NAME=all runs all, NAME=short the quick ones.")


def _run(options: argparse.Namespace) -> int:
    chosen = [drills.load(name) for name in _named(options.names)]
    if options.audit_only:
        chosen = [drills.judged_by_the_audit(drill) for drill in chosen]
    lab = faults.Lab(options.topology)
    failed = []
    for number, drill in enumerate(chosen, 1):
        say(paint(f"==> {number} of {len(chosen)}: {drill.name}: {drill.summary}", Colour.TITLE))
        lacks = drill.lacks(lab.machines)
        if lacks:
            say(f"    skipped: {lacks}")
            continue
        started = time.monotonic()
        try:
            for name in drill.artifacts:
                artifacts.ARTIFACTS[name]()
            outcome = run.run(lab, drill)
        except (LabError, artifacts.ArtifactError) as error:
            say(f"    {paint('FAILED', Colour.BAD)}: {error}")
            failed.append(drill.name)
            continue
        if options.write:
            page.keep(outcome.as_dict())
            page.write()
        counts = ", ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in outcome.audit.items()
        )
        say(f"    {counts}; {outcome.failures:.0f} failed writes, tried again")
        for wrong in outcome.wrong:
            say(f"    {paint('WRONG', Colour.BAD)}: {wrong}")
        verdict = paint("passed", Colour.GOOD) if outcome.passed else paint("FAILED", Colour.BAD)
        say(f"    {verdict} in {duration(time.monotonic() - started)}")
        if not outcome.passed:
            failed.append(drill.name)
    if failed:
        say(paint(f"Drills that failed: {', '.join(failed)}", Colour.BAD))
    return 1 if failed else 0


def _named(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        if name == "all":
            found += drills.names()
        elif name == "short":
            found += [n for n in drills.names() if drills.load(n).short]
        else:
            found.append(name)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    os.chdir(paths.ROOT)
    sys.exit(main())
