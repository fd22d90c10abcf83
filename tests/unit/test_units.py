"""The units that the roles write let their services do little: `systemd-analyze security` says how
little, from 0 for nothing to 10 for everything."""

import base64
import http.server
import netrc
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.plugins.filter.core import FilterModule

from iot_pipeline import settings
from iot_pipeline.env_file import read_env_file
from iot_pipeline.errors import Exit

ROLES = Path(__file__).parents[2] / "roles"

# The units of the official packages, which the roles add to.
PACKAGE_UNITS = {
    "couchdb": """\
[Service]
RuntimeDirectory=couchdb
User=couchdb
Group=couchdb
ExecStart=/opt/couchdb/bin/couchdb
Restart=always
""",
    "mongodb": """\
[Service]
User=mongodb
Group=mongodb
ExecStart=/usr/bin/mongod --config /etc/mongod.conf
RuntimeDirectory=mongodb
LimitNOFILE=64000
TasksMax=infinity
""",
}

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze"
)


class Whatever(jinja2.ChainableUndefined):
    """A variable that matters to nothing here."""

    def __str__(self) -> str:
        return "x"

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


def rendered(role: str, template: str, **variables: Any) -> str:
    """A role's template, with the role's defaults as they stand: expressions remain unevaluated."""
    values: dict[str, Any] = {"ansible_facts": {"systemd": {"version": 252}}}
    for part in ("defaults", "vars"):
        values |= yaml.safe_load((ROLES / role / part / "main.yml").read_text())
    environment = jinja2.Environment(  # noqa: S701 a unit is no HTML
        loader=jinja2.FileSystemLoader(ROLES / role / "templates"),
        undefined=Whatever,
        trim_blocks=True,
    )
    environment.filters |= FilterModule().filters()
    environment.tests["search"] = lambda value, pattern: bool(re.search(pattern, value))
    return environment.get_template(template).render(values | variables)


def analysis(unit: str, folder: Path, most: float) -> subprocess.CompletedProcess[str]:
    """What systemd says of a unit; it exits with 1 where the exposure is more than `most`."""
    path = folder / "tested.service"
    path.write_text(unit)
    return subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager"),
            *(f"--threshold={round(most * 10)}", str(path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "most, role, template, variables",
    [
        (2.0, "pipeline_app", "service.j2", {}),
        (2.0, "pipeline_app", "service.j2", {"pipeline_app_writable_code": True}),
        (4.0, "kafka_broker", "kafka.service.j2", {"_kafka_broker_jaas_options": []}),
        (4.0, "couchdb", "couchdb.service.j2", {}),
        (4.0, "couchdb", "couchdb.service.j2", {"couchdb_tls": True}),
        (4.0, "couchdb", "hardening.conf.j2", {"couchdb_tls": True}),
        (4.0, "mongodb", "mongod.service.j2", {"mongodb_tls": True}),
        (4.0, "mongodb", "hardening.conf.j2", {"mongodb_tls": True}),
        (4.0, "firewall", "iot-firewall.service.j2", {}),
    ],
)
def test_services_are_confined(
    tmp_path: Path, most: float, role: str, template: str, variables: dict[str, Any]
) -> None:
    unit = rendered(role, template, **variables)
    if template.endswith(".conf.j2"):
        unit = PACKAGE_UNITS[role] + unit
    found = analysis(unit, tmp_path, most)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    "role, template, setting, statuses",
    [
        (
            *("pipeline_app", "service.j2", "RestartPreventExitStatus"),
            {Exit.USAGE, Exit.DATA, Exit.CONFIG},
        ),
        (
            *("storage_node", "iot-audit.service.j2", "SuccessExitStatus"),
            {Exit.FAILED, Exit.UNREACHABLE},
        ),
    ],
)
def test_units_know_the_exit_statuses(
    role: str, template: str, setting: str, statuses: set[Exit]
) -> None:
    lines = rendered(role, template).splitlines()
    (value,) = (line.split("=")[1] for line in lines if line.startswith(f"{setting}="))
    assert {Exit(int(status)) for status in value.split()} == statuses


@pytest.mark.parametrize(
    "seconds, passes", [(settings.MAX_STORE_TIMEOUT, False), (29, False), (30, True), ("60", True)]
)
def test_a_watchdog_waits_longer_than_its_service(seconds: float | str, passes: bool) -> None:
    tasks = yaml.safe_load((ROLES / "pipeline_app/tasks/preflight.yml").read_text())
    (task,) = (each for each in tasks if each["name"] == "Check the watchdog's patience")
    condition = jinja2.Environment().compile_expression(task["ansible.builtin.assert"]["that"])  # noqa: S701
    assert condition(pipeline_app_watchdog_seconds=seconds) is passes


def test_a_settings_file_says_what_the_inventory_says(tmp_path: Path) -> None:
    values = {
        "IOT_A": "C:\\temp \"quoted\" 'and' $HOME `x` # no comment",
        "IOT_B": " blanks around \\",
        "IOT_C": "two\nlines\\\nand more",
        "IOT_D": "",
        "IOT_E": True,
        "IOT_F": 1.5,
        "IOT_G": "é\u2028\x85",
    }
    (tmp_path / "file").write_text(rendered("pipeline_app", "settings.env.j2", settings=values))
    assert read_env_file(tmp_path / "file") == values | {"IOT_E": "true", "IOT_F": "1.5"}


@pytest.fixture
def guest_book() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and with what its guests have logged in."""
    seen: list[str] = []

    class Doorman(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            word = self.headers.get("Authorization", "").partition(" ")[2]
            seen.append(base64.b64decode(word).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Doorman) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="this machine has no curl")
@pytest.mark.parametrize(
    "password",
    [
        "twelve-letters",
        "#hash#in#front",
        r"back\\slash\es\\",
        "quote's`and$more",
        "#\\",
        123456789012,
    ],
)
def test_curl_and_health_read_the_same_password(
    password: str | int, tmp_path: Path, guest_book: tuple[str, list[str]]
) -> None:
    url, seen = guest_book
    file = tmp_path / "netrc"
    machines = {"_couchdb_netrc_machines": ["127.0.0.1", "other"], "couchdb_admin_user": "admin"}
    file.write_text(rendered("couchdb", "netrc.j2", **machines, couchdb_admin_password=password))
    assert netrc.netrc(str(file)).authenticators("127.0.0.1") == ("admin", "", str(password))
    subprocess.run(["curl", "--silent", "--netrc-file", file, url], check=True)
    assert seen == [f"admin:{password}"]


def test_a_service_that_is_not_confined_is_told(tmp_path: Path) -> None:
    assert analysis(PACKAGE_UNITS["couchdb"], tmp_path, 4.0).returncode == 1


def test_a_process_gets_its_environment_letter_by_letter(
    environment_of: Callable[[str], dict[str, str]],
) -> None:
    values = {"A": "100%", "B": 'a "quoted" word', "C": "c:\\new", "D": "$HOME", "E": "'"}
    unit = rendered("pipeline_app", "service.j2", pipeline_app_environment=values)
    found = environment_of(unit.replace("Type=notify", "Type=exec"))
    assert {name: found[name] for name in values} == values
