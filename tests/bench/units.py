"""Runs copies of this host's services with other settings, and samples their metrics.

Runs on a host as root. Reads what to do as JSON from standard input and prints JSON. A copy is the
service's own unit file with a second file of settings: the same user, environment, sandbox and
program. All that is made lies under /run, and `iot-bench-` is in front of every name.
"""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNITS = Path("/run/systemd/system")
FOLDER = Path("/run/iot-bench")
PREFIX = "iot-bench-"
STOPPED = FOLDER / "stopped"  # the services that ran before
CLOCK_TICKS = 100  # USER_HZ, the same on all of Linux's common architectures
KEPT = (
    "iot_records_",
    "iot_cpu_seconds_total",
    "iot_batch_size_records_",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
)
LINES = 15  # of a journal


class Failed(Exception):
    """The message says what did not work."""


def systemctl(*words: str, check: bool = True) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise Failed(f"systemctl {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def journal(name: str) -> str:
    words = ["journalctl", f"--unit={name}", f"--lines={LINES}", "--output=cat", "--no-pager"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def write_unit(unit: dict[str, Any]) -> None:
    """Write a copy of a service as a unit of its own.

    With a `program` it runs that instead of the service's, once, with its output in a file.
    """
    name = unit["name"]
    text = systemctl("cat", f"{unit['like']}.service").partition("[Install]")[0]
    (UNITS / f"{name}.service").write_text(text)
    settings = FOLDER / f"{name}.env"
    settings.write_text("".join(f'{key}="{value}"\n' for key, value in unit["settings"].items()))
    lines = ["[Service]", f"EnvironmentFile={settings}", "Restart=no", f"SyslogIdentifier={name}"]
    if "program" in unit:
        lines += ["Type=oneshot", "WatchdogSec=0", f"TimeoutStartSec={unit['timeout']}"]
        # What the service's own limit says is no business of another program.
        lines += ["MemoryMax=infinity", f"StandardOutput=file:{FOLDER / name}.out"]
        lines += ["ExecStart=", f"ExecStart={' '.join(unit['program'])}"]
    more = UNITS / f"{name}.service.d"
    more.mkdir(exist_ok=True)
    (more / "bench.conf").write_text("\n".join(lines) + "\n")


def remove_units() -> None:
    systemctl("stop", f"{PREFIX}*.service", check=False)
    for file in UNITS.glob(f"{PREFIX}*.service"):
        file.unlink()
    for folder in UNITS.glob(f"{PREFIX}*.service.d"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    for file in FOLDER.glob(f"{PREFIX}*"):
        file.unlink()
    systemctl("daemon-reload")
    systemctl("reset-failed", f"{PREFIX}*.service", check=False)


def metrics(port: int) -> dict[str, float]:
    """What a unit exports at the moment, by series; nothing once it has ended."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    pairs = (line.rpartition(" ")[::2] for line in lines if line.startswith(KEPT))
    return {series: float(value) for series, value in pairs}


def machine() -> dict[str, float]:
    """CPU seconds of all cores since the machine's start: `busy`, and `all`."""
    user, nice, system, idle, wait, *more = (
        int(word) / CLOCK_TICKS for word in Path("/proc/stat").read_text().split()[1:9]
    )
    busy = user + nice + system + sum(more)
    return {"busy": busy, "all": busy + idle + wait}


def sample(units: list[dict[str, Any]]) -> dict[str, Any]:
    before = time.time()
    found = {unit["name"]: metrics(unit["port"]) for unit in units}
    return {"at": (before + time.time()) / 2, "machine": machine(), "units": found}


def delivered(taken: dict[str, Any]) -> float:
    counts: list[float] = [
        value
        for found in taken["units"].values()
        for series, value in found.items()
        if series.startswith("iot_records_out_total")
    ]
    return sum(counts)


def start_services(units: list[dict[str, Any]]) -> float:
    """Start copies of services and return after how many seconds they were ready."""
    for unit in units:
        write_unit(unit)
    systemctl("daemon-reload")
    began = time.monotonic()
    names = [unit["name"] for unit in units]
    try:
        systemctl("start", *names)
    except Failed as error:
        raise Failed(f"{error}\n{''.join(map(journal, names))}") from error
    return time.monotonic() - began


def watch(request: dict[str, Any]) -> dict[str, Any]:
    """Sample units until they are done, then stop them.

    They are done when they have delivered `goal` records together, when `seconds` have passed
    since they delivered the first one, or when one has ended by itself. It is a failure when they
    have delivered nothing for `patience` seconds, or one has failed.
    """
    units = request["units"]
    names = [unit["name"] for unit in units]
    samples: list[dict[str, Any]] = []
    first_at, news_at, count = 0.0, time.monotonic(), 0.0
    reason = "goal"
    while count < request["goal"]:
        taken = sample(units)
        now = time.monotonic()
        if not all(taken["units"].values()):
            reason = "ended"
            break
        samples.append(taken)
        if delivered(taken) > count:
            count, news_at = delivered(taken), now
            first_at = first_at or now
        if now - news_at > request["patience"]:
            reason = "patience"
            break
        if first_at and now - first_at > request["seconds"]:
            reason = "seconds"
            break
        time.sleep(request["interval"])
    results = systemctl("show", "--property=Result", "--value", *names).split()
    if set(results) != {"success"} or reason == "patience":
        said = "".join(map(journal, names))
        raise Failed(f"{', '.join(names)}: {reason} after {count:.0f} records\n{said}")
    systemctl("stop", *names)
    return {"reason": reason, "samples": samples}


def run_program(request: dict[str, Any]) -> Any:
    """Run a program in a service's place and return the JSON that it prints last."""
    unit = request["unit"]
    write_unit(unit)
    systemctl("daemon-reload")
    output = FOLDER / f"{unit['name']}.out"
    output.unlink(missing_ok=True)
    try:
        systemctl("start", unit["name"])
    except Failed as error:
        raise Failed(f"{error}\n{journal(unit['name'])}") from error
    return json.loads(output.read_text().splitlines()[-1])


def cpu_seconds(service: str) -> float:
    """What a service's main process has used since it was started."""
    pid = systemctl("show", "--property=MainPID", "--value", service).strip()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def prepare(services: list[str]) -> list[str]:
    """Remove what an earlier run left, and stop the services; returns those that ran."""
    remove_units()
    running = [name for name in services if is_active(name)]
    # A run that was killed has stopped them and could not start them again.
    if STOPPED.exists():
        running = sorted({*running, *STOPPED.read_text().split()})
    STOPPED.write_text("\n".join(running))
    if running:
        systemctl("stop", *running)
    return running


def restore() -> None:
    """Remove the copies, and start what ran before."""
    remove_units()
    if STOPPED.exists():
        for name in STOPPED.read_text().split():
            systemctl("start", name)
        STOPPED.unlink()


def is_active(name: str) -> bool:
    return systemctl("is-active", f"{name}.service", check=False).strip() == "active"


def main() -> None:
    request = json.load(sys.stdin)
    actions: dict[str, Callable[[], Any]] = {
        "prepare": lambda: prepare(request["services"]),
        "remove": remove_units,
        "restore": restore,
        "start": lambda: start_services(request["units"]),
        "watch": lambda: watch(request),
        "program": lambda: run_program(request),
        "stop": lambda: systemctl("stop", *(unit["name"] for unit in request["units"])),
        "cpu": lambda: {name: cpu_seconds(name) for name in request["services"]},
    }
    try:
        print(json.dumps(actions[request["action"]]()))
    except Failed as error:
        print(re.sub(r"\n+", "\n", str(error)), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
