"""Load and observers: the producer's service sends faster, and each stage is watched."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from iot_lab import remote
from iot_lab.drills.drill import FOLDER
from iot_lab.hosts import Machine
from iot_lab.shell import LabError

STAGES = {
    "produce": ("producers", "iot-producer"),
    "infer": ("inference_nodes", "iot-inference"),
    "store": ("storage_nodes", "iot-storage"),
}
"""Stage: the group of its hosts, and its service."""

DROP_IN = "/etc/systemd/system/iot-producer.service.d/drill.conf"
PAUSE = 2.0  # seconds without a result that count as not working
LONGEST = 5400  # seconds after which a forgotten load ends by itself
# A link that is dead is noticed within seconds.
ALIVE = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=3")


@dataclass
class Observer:
    """What one host's service has done so far, by its metrics."""

    machine: Machine
    service: str
    progress: list[float] = field(default_factory=list)  # when results were confirmed
    failures: float = 0  # writes that a sink refused or missed
    starts: set[float] = field(default_factory=set)  # of its process
    last: dict[str, float] | None = None  # what it said when it was last seen

    def hear(self, seen: dict[str, float]) -> None:
        """Take in what watch.py of tests/drills/on_host has printed."""
        self.starts.add(seen["started"])
        if self.last:
            # A process that was restarted counts from nothing again.
            if seen["out"] != self.last["out"]:
                self.progress.append(time.monotonic())
            self.failures += max(0.0, seen["failures"] - self.last["failures"])
        self.last = seen

    def follow(self, ended: threading.Event) -> None:
        """Watch until the end, through restarts and outages of the host."""
        script = (FOLDER / "on_host" / "watch.py").read_text()
        while not ended.is_set():
            words = remote.command(self.machine, "sudo", "python3", "-u", "-", self.service)
            process = subprocess.Popen(
                [words[0], *ALIVE, *words[1:]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            assert process.stdin is not None  # noqa: S101 - stdin=PIPE makes it one
            assert process.stdout is not None  # noqa: S101
            try:
                process.stdin.write(script)
                process.stdin.close()
                for line in process.stdout:
                    if ended.is_set():
                        break
                    self.hear(json.loads(line))
            except (OSError, ValueError):
                pass
            finally:
                process.kill()
                process.wait()
            ended.wait(0.5)


class Watch:
    """All stages of a lab."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self.stages = {
            stage: [Observer(machine, service) for machine in machines if group in machine.groups]
            for stage, (group, service) in STAGES.items()
        }
        self._ended = threading.Event()

    def of(self, machine: Machine) -> list[Observer]:
        """Return the observers of one host."""
        return [o for o in self._all() if o.machine == machine]

    def _all(self) -> list[Observer]:
        return [observer for observers in self.stages.values() for observer in observers]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch as long as the body runs."""
        threads = [
            threading.Thread(target=observer.follow, args=(self._ended,), daemon=True)
            for observer in self._all()
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(timeout=10)

    def longest_pause(self, stage: str, since: float, until: float) -> float:
        """Return the longest time, in seconds, in which a stage confirmed nothing."""
        marks = [since, *_between(self.stages[stage], since, until), until]
        return max(later - earlier for earlier, later in pairwise(marks))

    def steady_since(self, since: float, until: float, hit: Sequence[Machine] = ()) -> float | None:
        """Return from when on no stage, and none of these hosts, paused for longer than PAUSE.

        None where one pauses at the end. Hosts that are no stage's are not looked at.
        """
        steady = since
        for observers in [*self.stages.values(), *([o] for m in hit for o in self.of(m))]:
            marks = [since, *_between(observers, since, until)]
            if until - marks[-1] > PAUSE:
                return None
            ends = [later for earlier, later in pairwise(marks) if later - earlier > PAUSE]
            steady = max(steady, *ends, since)
        return steady

    def failures(self) -> float:
        """Return how many writes a sink refused or missed so far."""
        return sum(observer.failures for observer in self._all())

    def restarts(self) -> int:
        """Return how many times a service was started again so far."""
        return sum(len(observer.starts) - 1 for observer in self._all() if observer.starts)


def _between(observers: Sequence[Observer], since: float, until: float) -> list[float]:
    return sorted(t for o in observers for t in o.progress if since <= t <= until)


@contextmanager
def load(machines: Sequence[Machine], rate: float) -> Iterator[Callable[[], None]]:
    """Have the producers' own services send this many images a second as long as the body runs.

    Gives what tells them again, for hosts that are made anew meanwhile. Raises LabError when one
    cannot be told.
    """
    producers = [machine for machine in machines if "producers" in machine.groups]
    interval = len(producers) / rate
    undo = f"rm -f {DROP_IN}; systemctl daemon-reload; systemctl restart iot-producer"
    begin = f"""
        mkdir -p {DROP_IN.rpartition("/")[0]}
        echo IOT_INTERVAL={interval} > /run/iot-drill.env
        printf '[Service]\\nEnvironmentFile=-/run/iot-drill.env\\n' > {DROP_IN}
        systemctl daemon-reload
        systemctl restart iot-producer
        systemctl stop iot-drill-load.timer 2>/dev/null || true
        systemd-run --quiet --on-active={LONGEST} --unit=iot-drill-load sh -c '{undo}'
    """

    def start() -> None:
        for machine in producers:
            done = remote.run(machine, "sudo sh -e", script=begin)
            if done.returncode:
                raise LabError(f"{machine.name}: {done.stderr.strip()}")

    try:
        start()
        yield start
    finally:
        for machine in producers:
            remote.run(machine, "sudo sh", script=f"systemctl stop iot-drill-load.timer; {undo}")
