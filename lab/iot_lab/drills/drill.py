"""What a drill is: a file of tests/drills, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from iot_lab import paths
from iot_lab.hosts import Machine
from iot_lab.shell import LabError

FOLDER = paths.ROOT / "tests" / "drills"
ACTIONS = ("kill", "stop", "freeze", "power_off", "cut_off", "fill", "play", "send", "rebuild")
"""What a step can do; faults.py says how, and docs/drills.md what each means."""


@dataclass(frozen=True)
class Step:
    """One thing that is done, to whom, for how long, and what must be seen."""

    action: str
    argument: Any
    hosts: Sequence[str] = ()  # and groups
    together: bool = False  # all of them at once, instead of one after the other
    seconds: float = 0  # how long it lasts before it is undone
    apart: float = 0  # seconds from one host's return to the next one's
    health: Sequence[str] = ()  # findings that health must name while it lasts
    back_within: float | None = None  # seconds after it ends until every stage works again
    no_failures: bool = False  # no write may fail, and no service may say an error meanwhile
    no_restarts: bool = False  # of the pipeline's services
    unsaid: str = ""  # a pattern that no service's journal may show meanwhile
    sends_dead_letters: int = 0

    def rounds(self, machines: Sequence[Machine]) -> Iterator[list[Machine]]:
        """Give the hosts that are hit at the same time, round by round. Nobody is one round."""
        hit = [m for m in machines if m.name in self.hosts or set(m.groups) & set(self.hosts)]
        if self.together or not self.hosts:
            yield hit
        else:
            yield from ([machine] for machine in hit)


BUSY_RATE = 10  # images per second on a machine that does other things too


@dataclass(frozen=True)
class Drill:
    """A file of tests/drills."""

    name: str
    summary: str
    steps: Sequence[Step]
    short: bool = False  # one of the quick ones
    rate: float = 50  # images per second meanwhile
    needs: Mapping[str, int] = field(default_factory=dict)  # group: how many hosts at least
    artifacts: Sequence[str] = ()  # what the lab builds besides, as in `lab artifacts`
    busy: bool = False  # the machine does other things too: the audit alone judges

    @property
    def loses_brokers(self) -> bool:
        """Whether all of them are gone in the end, and what they alone had: dead letters."""
        return any(step.action == "rebuild" for step in self.steps)

    def lacks(self, machines: Sequence[Machine]) -> str:
        """Say what a topology lacks for this drill, or nothing."""
        for group, least in self.needs.items():
            found = sum(group in machine.groups for machine in machines)
            if found < least:
                return f"it needs {least} hosts in {group}, and there are {found}"
        return ""


def judged_by_the_audit(drill: Drill) -> Drill:
    """Return a drill without what a busy machine may miss: times, writes, answers of health.

    Fewer images flow meanwhile, and health is asked before and after all blows instead of between
    them: both keep the machine busy, too.
    """
    steps = [replace(s, health=(), back_within=None, no_failures=False) for s in drill.steps]
    return replace(drill, steps=steps, rate=min(drill.rate, BUSY_RATE), busy=True)


def names() -> list[str]:
    """Return the names of all drills."""
    return sorted(file.stem for file in FOLDER.glob("*.yml"))


def load(name: str) -> Drill:
    """Read a drill. Raises LabError, naming the file and the mistake."""
    file = FOLDER / f"{name}.yml"
    if not file.exists():
        raise LabError(f"no drill is called {name}: {', '.join(names())}")
    return parse(file)


def parse(file: Path) -> Drill:
    """Read a drill's file. Raises LabError, naming the file and the mistake."""
    try:
        content = dict(yaml.safe_load(file.read_text()))
        steps = [_step(step) for step in content.pop("steps")]
        return Drill(name=file.stem, steps=steps, **content)
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise LabError(f"{file.name}: {error}") from error


def _step(content: Mapping[str, Any]) -> Step:
    actions = [key for key in content if key in ACTIONS]
    if len(actions) != 1:
        raise ValueError(f"a step does one of {', '.join(ACTIONS)}, not {actions or 'nothing'}")
    rest = {key: value for key, value in content.items() if key != actions[0]}
    for listed in ("hosts", "health"):
        if isinstance(rest.get(listed), str):
            rest[listed] = [rest[listed]]
    return Step(action=actions[0], argument=content[actions[0]], **rest)
