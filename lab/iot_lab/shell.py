"""Running other programs: with an answer, with a log, or in the place of this one."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from iot_lab import paths
from iot_lab.console import duration, say

# Seconds between two lines about a program that is still at work: one when it says something new,
# and one in any case.
NEWS = 10.0
HEARTBEAT = 30.0
SHOWN_ON_FAILURE = 25  # lines of its log
WIDTH = 90  # columns of its last line that a heartbeat shows
_stopping = threading.Event()
_at_work: set[subprocess.Popen[str]] = set()

TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class LabError(Exception):
    """The lab cannot go on; the message says why and what to do."""


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end this program at once, with the programs that its threads run."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        _stopping.set()
        for process in list(_at_work):
            process.terminate()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def root_command(*command: str) -> list[str]:
    """Return the command as root runs it: behind sudo for everybody else."""
    return list(command) if os.geteuid() == 0 else ["sudo", *command]


def answer(*command: str, folder: Path = paths.ROOT) -> str:
    """Run a command in a folder and return what it prints, without the last line's end.

    Raises LabError with what it said when it fails.
    """
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is not installed; 'lab/bin/lab setup' installs it") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise LabError(f"{' '.join(command)}\nfailed with status {done.returncode}: {said}")
    return done.stdout.rstrip("\n")


def succeeds(*command: str) -> bool:
    """Tell whether a command exists and ends with status 0. What it prints is dropped."""
    try:
        answer(*command)
    except LabError:
        return False
    return True


def engine(*arguments: str) -> str:
    """Ask the container engine as Vagrant does, through lab/bin/docker, and return its answer."""
    return answer(str(paths.ENGINE), *arguments)


def logged(
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    title: str | None = None,
) -> None:
    """Run a long command with its output in .lab/log/NAME.log, telling regularly where it stands.

    Raises LabError with the end of the log when the command fails.
    """
    log = paths.LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    title = title or name
    started = time.monotonic()
    last = [""]
    told, told_at = "", started
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=paths.ROOT,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is not installed; 'lab/bin/lab setup' installs it") from error

    def follow() -> None:
        assert process.stdout is not None  # noqa: S101 - stdout=PIPE makes it one
        with log.open("w") as output:
            for line in process.stdout:
                output.write(line)
                output.flush()
                last[0] = TERMINAL_CODES.sub("", line).strip() or last[0]

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    _at_work.add(process)
    try:
        while True:
            try:
                status = process.wait(NEWS)
                break
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if last[0] != told or now - told_at >= HEARTBEAT:
                    told, told_at = last[0], now
                    say(f"    {title}: {duration(now - started)}, {told[:WIDTH]}")
    finally:
        _at_work.discard(process)
    reader.join()
    if status != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_ON_FAILURE:])
        raise LabError(f"{title} failed with status {status}. The end of {shown(log)}:\n{end}")


def retried(attempts: int, work: Callable[[], object], pause: float = 5.0) -> None:
    """Run work that may fail by chance until it succeeds, at most so often.

    Raises the last LabError. `pause` is in seconds.
    """
    for attempt in range(1, attempts + 1):
        try:
            work()
        except LabError as error:
            if attempt == attempts or _stopping.is_set():
                raise
            lines = str(error).splitlines()
            say(f"    {lines[0]} {lines[-1] if len(lines) > 1 else ''}".rstrip())
            say(f"    trying again ({attempt + 1} of {attempts})")
            time.sleep(pause)
        else:
            return


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time into the body; the others wait. The lock dies with its holder."""
    paths.STATE.mkdir(exist_ok=True)
    with (paths.STATE / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"    another lab command is at work on the {name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shown(path: Path) -> str:
    """Return a path as a person in the repository types it."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def first(items: Sequence[Any], default: Any = None) -> Any:
    """Return the first item, or the default where there is none."""
    return items[0] if items else default
