"""A real broker and a real database process for all tests, and topics of its own for each.

The apps are the installed ones of .lab/venv/apps, as `make demo` runs them.
"""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from iot_lab.paths import ROOT
from iot_lab.processes import APPS, Broker, CouchDB, Database, MongoDB, Pipeline, wait_for
from iot_lab.secure_broker import SecureBroker, pipeline_acls

SOURCES = ROOT / "apps" / "src" / "iot_pipeline"
_prefixes = (f"t{number}-" for number in itertools.count(1))


@pytest.fixture(scope="session", autouse=True)
def apps() -> None:
    """The apps are installed, and are what the sources say."""
    setup = "run lab/bin/lab setup demo"
    if not (APPS / "iot-pipeline").exists():
        pytest.fail(f"{APPS / 'iot-pipeline'} is missing: {setup}")
    found = subprocess.run(
        [APPS / "python", "-c", "import iot_pipeline; print(iot_pipeline.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    installed = Path(found.stdout.strip())
    names = [str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py")]
    _same, different, missing = filecmp.cmpfiles(SOURCES, installed, names, shallow=False)
    if different or missing:
        pytest.fail(f"{installed} is not built from {SOURCES} as it is now: {setup}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="session")
def broker(folder: Path) -> Iterator[Broker]:
    with Broker(folder) as broker:
        yield broker


@pytest.fixture(scope="session")
def secure_broker(folder: Path) -> Iterator[SecureBroker]:
    """TLS on every listener, users that log in, and nothing allowed without an ACL."""
    with SecureBroker(folder / "secure") as broker:
        yield broker


class AnsibleModule(Protocol):
    """Calls a module of the role kafka_resources through `ansible`, as a play calls it."""

    def __call__(
        self,
        name: str,
        parameters: Mapping[str, Any],
        *,
        check: bool = False,
        until: Callable[[], object] | None = None,
    ) -> dict[str, Any]:
        """The module's result, with `failed`, and all that Ansible said at length as `output`.

        Once `until` is true, Ansible and all that it has started on this side are killed.
        """


@pytest.fixture
def ansible_module(tmp_path: Path) -> AnsibleModule:
    ansible = Path(sys.executable).with_name("ansible")
    role = ROOT / "roles/kafka_resources"
    variables = tmp_path / "parameters.json"
    variables.touch(mode=0o600)

    def call(
        name: str,
        parameters: Mapping[str, Any],
        *,
        check: bool = False,
        until: Callable[[], object] | None = None,
    ) -> dict[str, Any]:
        # Passwords do not belong where `ps` shows them.
        variables.write_text(json.dumps({"parameters": parameters}))
        arguments = {key: f"{{{{ parameters['{key}'] }}}}" for key in parameters}
        running = subprocess.Popen(
            [
                *(str(ansible), "localhost", "--connection=local", "-vvv", "--diff"),
                *(f"--module-name={name}", f"--extra-vars=@{variables}"),
                *(f"--args={json.dumps(arguments)}", *(["--check"] if check else [])),
            ],
            env=os.environ
            | {
                "ANSIBLE_ACTION_PLUGINS": str(role / "action_plugins"),
                "ANSIBLE_LIBRARY": str(role / "library"),
                "ANSIBLE_MODULE_UTILS": str(role / "module_utils"),
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
                "ANSIBLE_NOCOLOR": "true",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if until:
            wait_for(until, "what Ansible is to do before it is killed")
            os.killpg(running.pid, signal.SIGKILL)
        said, errors = running.communicate()
        output = said + errors
        if until:
            return {"failed": True, "output": output}
        found = re.search(r"^localhost \| [A-Z!]+ => (\{.*)", said, re.MULTILINE | re.DOTALL)
        assert found, output
        result: dict[str, Any] = json.JSONDecoder().raw_decode(found[1])[0]
        return result | {"failed": running.returncode != 0, "output": output}

    return call


@pytest.fixture(scope="session")
def database(folder: Path) -> Iterator[CouchDB]:
    with CouchDB(folder) as database:
        yield database


@pytest.fixture(scope="session")
def mongodb(folder: Path) -> Iterator[MongoDB]:
    with MongoDB(folder) as server:
        yield server


class MakePipeline(Protocol):
    """Makes a pipeline with topics and a database of its own."""

    def __call__(self, server: Database | None = None) -> Pipeline:
        """On another database server than CouchDB, if one is given."""


@pytest.fixture(scope="session")
def make_pipeline(folder: Path, broker: Broker, database: CouchDB) -> MakePipeline:
    def make(server: Database | None = None) -> Pipeline:
        prefix = next(_prefixes)
        return Pipeline(folder / prefix.rstrip("-"), broker, server or database, prefix)

    return make


@pytest.fixture
def pipeline(make_pipeline: MakePipeline) -> Iterator[Pipeline]:
    with make_pipeline() as pipeline:
        yield pipeline
        # A test that fails leaves what it killed dead, and the next ones need it.
        for server in (pipeline.broker, pipeline.database):
            if not server.running:
                server.start().wait_ready()


@pytest.fixture
def secure_pipeline(
    folder: Path, secure_broker: SecureBroker, database: CouchDB
) -> Iterator[Pipeline]:
    """Each app logs in as itself, and may do what its ACLs grant."""
    prefix = next(_prefixes)
    with Pipeline(folder / prefix.rstrip("-"), secure_broker, database, prefix) as pipeline:
        secure_broker.allow(pipeline_acls(prefix))
        yield pipeline


@pytest.fixture(scope="session")
def running(make_pipeline: MakePipeline) -> Iterator[Pipeline]:
    """A pipeline whose inference and storage run, for tests that leave it as it was."""
    with make_pipeline() as pipeline:
        workers = [pipeline.store().start(), pipeline.infer().start()]
        for worker in workers:
            worker.wait_ready()
        yield pipeline
        for worker in workers:
            assert worker.running, worker.error("ended during the tests")


@pytest.fixture(scope="session")
def assert_clean() -> Callable[[Pipeline, int], None]:
    """Wait until the audit has nothing to wait for, then hold it to the number of images."""

    def check(pipeline: Pipeline, images: int) -> None:
        wait_for(lambda: pipeline.complete() >= images, f"{images} complete documents", 90)
        status, audit = pipeline.audit("--grace", "0")
        counts = {name: audit[name] for name in ("produced", "stored", "predicted")}
        assert counts == dict.fromkeys(counts, images), audit
        assert (audit["missing"], audit["duplicated"], audit["dead_lettered"]) == (0, 0, 0), audit
        assert status == 0, audit

    return check
