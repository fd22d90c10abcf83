"""Runs a drill on the running lab, and judges it."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from iot_lab import paths, remote, report
from iot_lab.console import say
from iot_lab.drills import faults
from iot_lab.drills.drill import Drill, Step
from iot_lab.drills.faults import PATIENCE
from iot_lab.drills.watch import STAGES, Watch, load
from iot_lab.hosts import Machine
from iot_lab.shell import LabError

HEALTH_WITHIN = 15.0  # seconds in which health must answer, whatever does not
AT_ONCE = 5000  # dead letters that fit on a command line
# Seconds of steady work, before anything is done and after; and where nobody looks at times. Within
# watch.PAUSE nothing could be told.
SETTLED, SETTLED_BUSY = 10.0, 5.0
# Findings that say nothing of whether the lab can take the next blow.
HARMLESS = frozenset({"dead-letters", "consumer-lag", "audit-stale", "audit-missing"})


@dataclass
class Row:
    """What was seen of one step on the hosts that it hit together."""

    what: str
    hosts: str
    lasted: float  # seconds
    back: float | None = None  # seconds from its end until every stage and each hit host worked
    pauses: dict[str, float] = field(default_factory=dict)  # longest, in seconds, by stage
    health: list[str] = field(default_factory=list)  # findings while it lasted
    health_seconds: float = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What was seen of a drill."""

    name: str
    summary: str
    topology: str
    rows: list[Row]
    audit: dict[str, Any]
    failures: float
    restarts: int
    wrong: list[str]

    @property
    def passed(self) -> bool:
        """Whether all held that must."""
        return not self.wrong and not any(row.wrong for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can say it."""
        return asdict(self) | {"passed": self.passed}


def run(lab: faults.Lab, drill: Drill) -> Outcome:
    """Run a drill to its end, undo what it did, and return what was seen.

    Raises LabError when the lab is not well before, or something cannot be done to it.
    """
    faults.undo_leftovers(lab)
    _until_whole(lab, "before the drill")
    before = report.audit(lab.machines)
    if drill.loses_brokers:
        before["dead_lettered"] = 0
    watch = Watch(lab.machines)
    settled = SETTLED_BUSY if drill.busy else SETTLED
    rows: list[Row] = []
    with load(lab.machines, drill.rate) as lab.start_load, watch.running():
        _until_steady(watch, time.monotonic(), settled)
        for step in drill.steps:
            for hit in step.rounds(lab.machines):
                began, failures, restarts = time.time(), watch.failures(), watch.restarts()
                row = _do(lab, watch, settled, step, hit)
                if not drill.busy:
                    _until_whole(lab, f"after {row.what}")
                if step.no_failures:
                    _expect_none(row, "failed writes", watch.failures() - failures)
                    _expect_none(row, "errors in journals", _said(lab, began, "--priority=err"))
                if step.no_restarts:
                    _expect_none(row, "restarts of services", watch.restarts() - restarts)
                if step.unsaid:
                    said = _said(lab, began, f"--grep={step.unsaid}")
                    _expect_none(row, f"times {step.unsaid} in journals", said)
                rows.append(row)
                say(f"    {describe(row)}")
        if drill.busy:
            _until_whole(lab, "after the drill")
        failures, restarts = watch.failures(), watch.restarts()
    expected_letters = sum(step.sends_dead_letters for step in drill.steps)
    after, wrong = _judge(lab, before, expected_letters)
    drop_letters(lab)
    return Outcome(drill.name, drill.summary, lab.topology, rows, after, failures, restarts, wrong)


def drop_letters(lab: faults.Lab) -> None:
    """Be done with the dead letters of what the drill itself has sent, and with nobody else's.

    Raises LabError when that fails.
    """
    storage = report.auditor(lab.machines)
    if not lab.sent or storage is None:
        return
    listed = faults.on_host(storage, "iot-pipeline dead-letters list --json", timeout=300)
    letters = [json.loads(line) for line in listed.splitlines()]
    own = [
        letter["position"]
        for letter in letters
        if (letter["source_topic"], letter["source_partition"], letter["source_offset"]) in lab.sent
    ]
    for first in range(0, len(own), AT_ONCE):
        words = ["iot-pipeline", "dead-letters", "drop", "--yes", *own[first : first + AT_ONCE]]
        faults.on_host(storage, shlex.join(words), timeout=300)


def describe(row: Row) -> str:
    """Say in a line what was seen of a step."""
    pauses = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row.pauses.items())
    back = "not back" if row.back is None else f"back after {row.back:.1f} s"
    seen = f"; health: {', '.join(row.health)} ({row.health_seconds:.0f} s)" if row.health else ""
    wrong = "".join(f"\n      WRONG: {what}" for what in row.wrong)
    return f"{row.what} {row.hosts}: {back}; longest pauses (s): {pauses}{seen}{wrong}"


def _do(lab: faults.Lab, watch: Watch, settled: float, step: Step, hit: Sequence[Machine]) -> Row:
    what = _name(step)
    names = ", ".join(machine.name for machine in hit)
    say(f"    {what} {names}" + (f" for {step.seconds:.0f} s" if step.seconds else ""))
    row = Row(what, names, 0)
    around = faults.AROUND.get(step.action)
    with around(lab, hit, step) if around else nullcontext():
        if around:
            _until_whole(lab, "on the small disk")
            _until_steady(watch, time.monotonic(), settled)
        began = time.monotonic()
        with faults.FAULTS[step.action](lab, hit, step):
            if step.health:
                # What lasts is seen after the brokers and groups have noticed.
                time.sleep(min(step.seconds / 3, 30))
                asked = time.monotonic()
                found = health(lab)
                row.health_seconds = time.monotonic() - asked
                row.health = sorted({finding["name"] for finding in found["findings"]})
                row.wrong += [
                    f"health did not name {n}" for n in step.health if n not in row.health
                ]
                if row.health_seconds > HEALTH_WITHIN:
                    row.wrong.append(f"health took {row.health_seconds:.1f} s")
            time.sleep(max(0.0, began + step.seconds - time.monotonic()))
            ended = time.monotonic()
        row.lasted = ended - began
        try:
            row.back = _until_steady(watch, ended, settled, hit)
        except LabError as error:
            row.wrong.append(str(error))
        if step.back_within is not None and row.back is not None and row.back > step.back_within:
            row.wrong.append(f"back after {row.back:.1f} s, not within {step.back_within:.0f} s")
        until = time.monotonic()
        row.pauses = {stage: watch.longest_pause(stage, began, until) for stage in STAGES}
    return row


def _name(step: Step) -> str:
    if step.action == "play":
        return str(step.argument.get("name") or " ".join(step.argument["playbooks"]))
    if step.action == "send":
        return str(step.argument.get("name") or step.argument["script"])
    argument = step.argument if isinstance(step.argument, str) else " ".join(step.argument or [])
    return f"{step.action.replace('_', ' ')} {argument}".strip()


def health(lab: faults.Lab) -> dict[str, Any]:
    """Ask `lab health`. Raises LabError when it cannot tell."""
    done = subprocess.run(
        [str(paths.ROOT / "lab" / "bin" / "lab"), "health", "--topology", lab.topology, "--json"],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise LabError(f"health: {done.stderr.strip() or done.stdout.strip()}") from error
    return answer


def _until_whole(lab: faults.Lab, when: str) -> None:
    """Wait until health finds nothing that matters. Raises LabError."""
    ends = time.monotonic() + PATIENCE
    while True:
        found = [f for f in health(lab)["findings"] if f["name"] not in HARMLESS]
        if not found:
            return
        if time.monotonic() > ends:
            listed = ", ".join(
                f"{f['name']} {f.get('host', '')} {f.get('detail', '')}" for f in found
            )
            raise LabError(f"{when}, the lab is not well within {PATIENCE:.0f} s: {listed}")
        time.sleep(1)


def _until_steady(watch: Watch, since: float, settled: float, hit: Sequence[Machine] = ()) -> float:
    """Wait until every stage, and each of these hosts, works steadily for so many seconds.

    Returns after how many seconds it began to. Raises LabError when it does not.
    """
    ends = time.monotonic() + PATIENCE
    while True:
        now = time.monotonic()
        steady = watch.steady_since(since, now, hit)
        if steady is not None and now - steady >= settled:
            return steady - since
        if now > ends:
            raise LabError(f"not every stage works steadily within {PATIENCE:.0f} s")
        time.sleep(0.2)


def _expect_none(row: Row, what: str, count: float) -> None:
    if count:
        row.wrong.append(f"{count:.0f} {what}")


def _said(lab: faults.Lab, since: float, *which: str) -> int:
    """Count what the pipeline's services have said of a kind since then (seconds since 1970).

    The Kafka client calls each lost connection an error, and then makes another one: what it says
    by itself does not count.
    """
    words = ["journalctl", "--unit=iot-*", f"--since=@{since:.0f}", "--output=cat", "--no-pager"]
    script = f"{shlex.join([*words, '--quiet', *which])} || true"
    answers = remote.everywhere(lab.machines, lambda m: faults.on_host(m, script))
    lines = [line for answer in answers.values() for line in answer.splitlines()]
    return sum(not line.startswith("kafka.") for line in lines)


def _judge(
    lab: faults.Lab, before: dict[str, Any], letters: int
) -> tuple[dict[str, Any], list[str]]:
    """Audit until nothing is on its way. Returns what was added meanwhile, and what is wrong."""
    ends = time.monotonic() + PATIENCE
    while True:
        now = report.audit(lab.machines)
        counted = ("produced", "stored", "predicted", "missing", "duplicated", "dead_lettered")
        added = {name: now[name] - before[name] for name in counted}
        wrong = [f"{added[name]} {name}" for name in ("missing", "duplicated") if added[name]]
        if added["dead_lettered"] != letters:
            wrong.append(f"{added['dead_lettered']} dead letters instead of {letters}")
        if added["produced"] < 0:
            wrong.append(f"{-added['produced']} images are known no more")
        # What is neither, nor missing, a dead letter accounts for.
        if now["pending"]:
            wrong.append(f"{now['pending']} images are still on their way")
        if not wrong or time.monotonic() > ends:
            return added, wrong
        time.sleep(3)
