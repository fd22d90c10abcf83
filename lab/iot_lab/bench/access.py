"""The running lab as the benchmark uses it: its hosts, and what it makes on them and removes again.

Everything on a host goes through `Host.ask` and `Host.start`: a script of tests/bench, with a
request in JSON, that answers in JSON.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from iot_lab import hosts, paths, remote
from iot_lab.shell import LabError

SCRIPTS = paths.ROOT / "tests" / "bench"
FOLDER = "/run/iot-bench"
SYSTEM_PYTHON = "python3"
APPS_PYTHON = "/opt/iot-pipeline/current/bin/python"
TOPICS = "iot-bench-"
DATABASES = "iot_bench_"
METRICS_PORT = 19100
ADMIN_SETTINGS = "/opt/kafka/config/admin.properties"
"""What Kafka's tools connect with as the administrator, where the brokers ask who one is."""

SERVICES = {
    "producer": ("producers", "iot-producer"),
    "broker": ("kafka_brokers", "kafka"),
    "inference": ("inference_nodes", "iot-inference"),
    "storage": ("storage_nodes", "iot-storage"),
}
"""Role in the benchmark: the group of the inventory whose first host has it, and its service."""

APPS = ("producer", "inference", "storage")


class Job:
    """A script at work on a host."""

    def __init__(self, host: Host, script: str, process: subprocess.Popen[str]) -> None:
        self._what = f"{script} on {host.machine.name}"
        self._process = process

    def result(self, timeout: float) -> Any:
        """Wait and return the answer.

        Raises LabError when it fails or takes longer than `timeout` seconds.
        """
        try:
            out, said = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            self.cancel()
            raise LabError(f"{self._what}: no answer within {timeout:.0f} s") from error
        if self._process.returncode:
            raise LabError(f"{self._what} failed:\n{said.strip()}")
        return json.loads(out)

    def cancel(self) -> None:
        """Let go of it. What it runs on the host ends with `Lab.restore`."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@dataclass
class Host:
    """A host, with the settings of the service it runs."""

    machine: hosts.Machine
    settings: Mapping[str, Any] = field(default_factory=dict)

    def start(self, script: str, request: Mapping[str, Any], python: str = SYSTEM_PYTHON) -> Job:
        """Start a script of tests/bench, as root, and return while it works."""
        words = ["sudo", python, f"{FOLDER}/{script}.py"]
        process = subprocess.Popen(
            remote.command(self.machine, shlex.join(words)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for us to hear: what runs on the hosts is ended in order.
            start_new_session=True,
        )
        assert process.stdin is not None  # noqa: S101 - stdin=PIPE makes it one
        # A script that failed at once is heard of when its result is asked for.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        process.stdin = None
        return Job(self, script, process)

    def ask(
        self,
        script: str,
        request: Mapping[str, Any] | None = None,
        python: str = SYSTEM_PYTHON,
        timeout: float = 120,
    ) -> Any:
        """Run a script of tests/bench and return its answer. Raises LabError when it fails."""
        return self.start(script, request or {}, python).result(timeout)

    def run(self, *words: str, script: str | None = None, timeout: float = 60) -> str:
        """Run words and return what they print. Raises LabError when they fail."""
        done = remote.run(self.machine, *words, script=script, timeout=timeout)
        if done.returncode:
            raise LabError(f"{self.machine.name}: {words[0]}: {done.stderr.strip()}")
        return done.stdout


class Lab:
    """The four roles' hosts, and what the benchmark makes and removes on them."""

    def __init__(self, topology: str) -> None:
        machines = hosts.machines(topology)
        self.hosts: dict[str, Host] = {}
        for role, (group, _) in SERVICES.items():
            machine = next((m for m in machines if group in m.groups), None)
            if machine is None:
                raise LabError(f"no host of the inventory is in the group {group}")
            self.hosts[role] = Host(machine)
        if "couchdb_servers" not in self.hosts["storage"].machine.groups:
            raise LabError(
                "the benchmark needs the database on the storage host, as in TOPOLOGY=couchdb"
            )
        self._number = 0
        self._databases = 0
        self._kafka_python = ""

    @property
    def _apps(self) -> list[tuple[Host, str]]:
        return [(self.hosts[role], SERVICES[role][1]) for role in APPS]

    def check(self) -> None:
        """Look whether all services run. Raises LabError, saying which does not."""
        for role, (_, service) in SERVICES.items():
            host = self.hosts[role]
            # A run that was killed has stopped the services; this one will start them again.
            words = f"systemctl is-active {service} || test -e {FOLDER}/stopped"
            done = remote.run(host.machine, words, timeout=15)
            if done.returncode:
                said = done.stdout.strip() or done.stderr.strip()
                raise LabError(
                    f"{service} on {host.machine.name} is not running ({said}); "
                    "the benchmark needs a running lab: make lab"
                )

    def prepare(self) -> None:
        """Send the scripts, remove what an earlier run left, and stop the services."""
        files = {file.name: file.read_text() for file in sorted(SCRIPTS.glob("*.py"))}
        unpack = (
            "import json, pathlib, sys; "
            f"folder = pathlib.Path('{FOLDER}'); folder.mkdir(exist_ok=True); "
            "[(folder / name).write_text(text) for name, text in json.load(sys.stdin).items()]"
        )
        for host in self.hosts.values():
            host.run(f'sudo {SYSTEM_PYTHON} -c "{unpack}"', script=json.dumps(files))
        self.ask_units("broker", {"action": "prepare", "services": []})
        for host, service in self._apps:
            host.ask("units", {"action": "prepare", "services": [service]})
            host.settings = host.ask("effective_settings", python=APPS_PYTHON)[service]
        self.remove()
        self._ask_topics("grant", principals=[self._principal(role) for role in APPS])

    def restore(self) -> list[str]:
        """Remove all that was made and start the services again.

        Returns what did not work, in words; the rest was done all the same.
        """
        problems = self.stop_units()

        def attempt(remove: Callable[[], object]) -> None:
            try:
                remove()
            except (LabError, ValueError) as error:
                problems.append(str(error))

        attempt(lambda: self._ask_topics("remove", prefix=TOPICS))
        attempt(lambda: self.ask_database("remove"))
        for host in self.hosts.values():
            attempt(partial(host.ask, "units", {"action": "restore"}))
            with suppress(LabError):
                host.run(f"sudo rm -rf {FOLDER}")
        return problems

    def stop_units(self) -> list[str]:
        """End every program of the benchmark. Returns what did not work, in words."""
        problems = []
        for host in self.hosts.values():
            try:
                host.ask("units", {"action": "remove"})
            except (LabError, ValueError) as error:
                problems.append(str(error))
        return problems

    def remove(self, prefix: str = TOPICS) -> None:
        """Remove topics and groups by prefix; with the default one, rights and databases too."""
        self._ask_topics("remove", prefix=prefix)
        if prefix == TOPICS:
            self.ask_database("remove")

    def ask_units(self, role: str, request: Mapping[str, Any], timeout: float = 120) -> Any:
        """Run tests/bench/units.py on a role's host."""
        return self.hosts[role].ask("units", request, timeout=timeout)

    def create_topic(self, name: str, *, partitions: int, like: str = "IOT_IMAGE_TOPIC") -> str:
        """Make a topic with the configuration of one of the lab's, and return its full name."""
        full = TOPICS + name
        topic = {
            "name": full,
            "partitions": partitions,
            "like": self.hosts["storage"].settings[like],
        }
        self._ask_topics("create", topics=[topic])
        return full

    def records(self, topic: str) -> int:
        """Count the records of a topic."""
        return int(self._ask_topics("records", topic=topic))

    def values(self, topic: str, count: int) -> list[str]:
        """Return the values of some records of a topic."""
        found: list[str] = self.program("storage", {"IOT_IMAGE_TOPIC": topic}, "values", str(count))
        return found

    def create_database(self) -> str:
        """Make an empty database that storage may use, and return its name."""
        self._databases += 1
        name = f"{DATABASES}{self._databases}"
        request = self._database_request("create", name)
        request["member"] = self.hosts["storage"].settings["IOT_STORE_USER"]
        self.hosts["storage"].ask("databases", request)
        return name

    def store_url(self, database: str) -> str:
        """Where storage finds a database of the benchmark's: beside its own."""
        own = urlsplit(str(self.hosts["storage"].settings["IOT_STORE_URL"]))
        return own._replace(path=f"/{database}").geturl()

    def ask_database(self, action: str, name: str = DATABASES, timeout: float = 300) -> Any:
        """Run an action of tests/bench/databases.py."""
        request = self._database_request(action, name)
        return self.hosts["storage"].ask("databases", request, timeout=timeout)

    def _principal(self, role: str) -> str:
        """Who a role's app is to the brokers: its user or, where it has none, its host."""
        host = self.hosts[role]
        return f"User:{host.settings['IOT_SASL_USERNAME'] or host.machine.name}"

    def _ask_topics(self, action: str, **more: Any) -> Any:
        """Run an action of tests/bench/topics.py as the administrator.

        Only brokers' hosts have an administrator's settings. The role kafka_resources has left
        there what speaks to Kafka.
        """
        broker = self.hosts["broker"]
        if not self._kafka_python:
            newest, *_ = broker.run("ls -t /opt/kafka-resources/*/complete").split()
            self._kafka_python = newest.replace("complete", "bin/python")
        servers = self.hosts["storage"].settings.get("IOT_BOOTSTRAP_SERVERS", "")
        request = {"action": action, "servers": servers.split(","), "admin": ADMIN_SETTINGS}
        return broker.ask("topics", {**request, **more}, self._kafka_python)

    def _database_request(self, action: str, name: str = DATABASES) -> dict[str, Any]:
        settings = self.hosts["storage"].settings
        store = urlsplit(str(settings["IOT_STORE_URL"]))
        url = f"{'https' if 'tls=true' in store.query else 'http'}://{store.netloc}"
        ca_file = settings.get("IOT_STORE_CA_FILE", "")
        return {"action": action, "url": url, "ca_file": ca_file, "name": name}

    def unit(
        self,
        role: str,
        settings: Mapping[str, str],
        program: Sequence[str] = (),
        timeout: int = 300,
    ) -> dict[str, Any]:
        """Describe a copy of a role's service, for tests/bench/units.py.

        It has a group and a name in it of its own, unless the settings give others. With a program
        (a script's name and its arguments) it runs that, for at most `timeout` seconds.
        """
        self._number += 1
        service = SERVICES[role][1]
        name = f"iot-bench-{role}-{self._number}"
        port = METRICS_PORT + self._number
        own = {
            "IOT_GROUP_ID": name,
            "IOT_GROUP_INSTANCE_ID": name,
            "IOT_DEAD_LETTER_TOPIC": f"{TOPICS}dead-letter",
            "IOT_METRICS_HOST": "127.0.0.1",
            "IOT_METRICS_PORT": str(port),
        }
        unit: dict[str, Any] = {"name": name, "like": service, "port": port}
        unit["settings"] = {**own, **settings}
        if program:
            script, *words = program
            unit["program"] = [APPS_PYTHON, f"{FOLDER}/{script}.py", *words]
            unit["timeout"] = timeout
        return unit

    def program(
        self, role: str, settings: Mapping[str, str], *words: str, timeout: int = 300
    ) -> Any:
        """Run a script of tests/bench in the place of a role's service, and return its answer."""
        unit = self.unit(role, settings, words, timeout)
        return self.ask_units(role, {"action": "program", "unit": unit}, timeout + 60)

    def cpu_seconds(self, role: str, service: str) -> float:
        """Return what a service's main process has used since its start."""
        answer = self.ask_units(role, {"action": "cpu", "services": [service]})
        return float(answer[service])
