"""The table of docs/drills.md: what the last run of each drill has seen."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iot_lab import paths
from iot_lab.drills.watch import STAGES

DOCS = paths.ROOT / "docs"
PAGE = DOCS / "drills.md"
RESULTS = DOCS / "drills.json"
MARKS = ("<!-- table -->", "<!-- end of table -->")


def keep(outcome: Mapping[str, Any], results: Path = RESULTS) -> None:
    """Put what was seen of a drill in the place of what was seen before."""
    known = read(results)
    known[outcome["name"]] = dict(outcome)
    results.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def read(results: Path = RESULTS) -> dict[str, Any]:
    """Return what was seen, by the drill's name."""
    if not results.exists():
        return {}
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def write(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Put the table of all that was seen into the page."""
    table = "\n".join(render(read(results)))
    text = page.read_text()
    between = re.compile(rf"(?s){MARKS[0]}.*{MARKS[1]}")
    page.write_text(between.sub(lambda _: f"{MARKS[0]}\n{table}\n{MARKS[1]}", text))


def render(known: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table: a drill, then each of its blows."""
    stages = " | ".join(STAGES)
    lines = [
        f"| drill | blow | lasted | back | {stages} | health said |",
        "|---|---|---:|---:|" + "---:|" * len(STAGES) + "---|",
    ]
    for name, seen in known.items():
        audit = seen["audit"]
        judged = (
            f"{audit['produced']} produced, {audit['missing']} missing, "
            f"{audit['duplicated']} duplicated, {audit['dead_lettered']} dead letters, "
            f"{seen['failures']:.0f} failed writes tried again"
        )
        wrong = [*seen["wrong"], *(what for row in seen["rows"] for what in row["wrong"])]
        verdict = f" **did not hold**: {'; '.join(wrong)}" if wrong else ""
        lines.append(
            f"| **{name}** | {seen['summary']} ({seen['topology']}): {judged}{verdict} |"
            + " |" * (3 + len(STAGES))
        )
        for row in seen["rows"]:
            back = "not" if row["back"] is None else f"{row['back']:.1f}"
            pauses = " | ".join(f"{row['pauses'].get(stage, 0):.1f}" for stage in STAGES)
            said = ", ".join(row["health"])
            said += f" ({row['health_seconds']:.0f} s)" if said else ""
            blow = f"{row['what']} {row['hosts']}"
            lines.append(f"| | {blow} | {row['lasted']:.0f} | {back} | {pauses} | {said} |")
    return lines
