"""What the module health_host tells of services, disks, certificates and servers."""

import datetime as dt
import http.server
import importlib.util
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from iot_lab.secure_broker import Authority

FILE = Path(__file__).parents[2] / "roles/health/library/health_host.py"
SHOWN = b"""# HELP iot_sink_up Whether the sink takes writes
iot_sink_up 0.0
iot_oldest_unhandled_seconds 12.5
iot_records_in_total{topic="iot-topic"} 9.0
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("health_host", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


health_host = load()


class Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SHOWN)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metrics_port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Connections are made, and nobody answers: what a stopped process leaves."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_what_a_service_shows(metrics_port: int) -> None:
    assert health_host.ask_metrics(metrics_port, 10) == {
        "metrics": {"iot_sink_up": 0.0, "iot_oldest_unhandled_seconds": 12.5}
    }


def test_a_service_that_was_stopped_by_a_signal(silent_port: int) -> None:
    found = health_host.ask_metrics(silent_port, 0.2)
    assert found == {"problem": f"no answer at 127.0.0.1:{silent_port} (timed out)"}


def test_a_service_that_listens_no_longer() -> None:
    assert "Connection refused" in health_host.ask_metrics(1, 1)["problem"]


def test_what_is_reached(silent_port: int) -> None:
    assert health_host.knock(f"127.0.0.1:{silent_port}", 1) == ""
    assert health_host.knock("127.0.0.1:1", 1) == "Connection refused"
    assert health_host.knock("no-such-host.invalid:1", 1) != ""


@pytest.mark.parametrize(
    "state, detail, shown",
    [
        ("active", "running", "active"),
        ("failed", "failed", "failed (failed)"),
        ("activating", "auto-restart", "activating (auto-restart)"),
    ],
)
def test_what_systemd_says(state: str, detail: str, shown: str) -> None:
    properties = {
        "Id": "kafka.service",
        "ActiveState": state,
        "SubState": detail,
        "StateChangeTimestampMonotonic": "5000000",
        "NRestarts": "3",
    }
    found = health_host.service(properties, now=65.0)
    assert (found["state"], found["seconds"], found["restarts"]) == (shown, 60, 3)


def test_a_unit_that_never_ran_has_no_time() -> None:
    properties = {
        "Id": "a.service",
        "ActiveState": "inactive",
        "SubState": "dead",
        "StateChangeTimestampMonotonic": "0",
        "NRestarts": "0",
    }
    assert health_host.service(properties, now=65.0)["seconds"] is None


def test_the_certificate_that_ends_first_counts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    first = authority.issue("expired", dt.timedelta(days=-1)).certificate
    chain = tmp_path / "chain.pem"
    chain.write_text(authority.certificate.read_text() + first.read_text())
    now = dt.datetime.now(dt.UTC)
    found = health_host.certificate(str(chain), now)
    assert found["days"] == -1.0
    assert "expired" in found["subject"]
    assert found["not_after"] == f"{now - dt.timedelta(days=1):%Y-%m-%d}T" + found["not_after"][11:]
    assert health_host.certificate(str(authority.certificate), now)["days"] == 30.0


@pytest.mark.parametrize(
    "text", ["nothing", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_without_a_certificate(tmp_path: Path, text: str) -> None:
    (tmp_path / "host.pem").write_text(text)
    found = health_host.certificate(str(tmp_path / "host.pem"), dt.datetime.now(dt.UTC))
    assert found["days"] is None


def test_a_file_system_counts_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    found = health_host.disks([str(tmp_path), str(tmp_path / "data"), str(tmp_path / "none")])
    assert [disk["folder"] for disk in found] == [str(tmp_path)]
    assert 0 <= found[0]["used_percent"] <= 100
    assert found[0]["free"] <= found[0]["size"]


def test_shares() -> None:
    assert health_host.percent(1, 3) == 33.3
    assert health_host.percent(0, 0) == 0.0


@pytest.mark.parametrize(
    "command, count",
    [
        (["printf", r"{}\n{}\n"], 2),
        (["true"], 0),
        (["false"], None),
        (["no-such-program"], None),
        (["sleep", "60"], None),
        ([], None),
    ],
)
def test_lines_are_counted_where_the_program_ends_well(
    command: list[str], count: int | None
) -> None:
    assert health_host.count_lines(command, 0.3) == count


def test_what_the_last_audit_has_left(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    assert health_host.last_audit("") is None
    assert health_host.last_audit(str(file)) == {}
    file.write_text("half")
    assert health_host.last_audit(str(file)) == {}
    file.write_text(json.dumps({"missing": 0}))
    assert health_host.last_audit(str(file)) == {"missing": 0}


def problem(url: str, folder: Path) -> str:
    """What is wrong with a database."""
    netrc = folder / "netrc"
    netrc.write_text("machine 127.0.0.1 login admin password secret\n")
    parameters = {
        "database_url": url,
        "database_netrc": str(netrc),
        "database_ca": "",
        "timeout": 0.3,
    }
    found = health_host.ask_database(parameters)
    assert found["url"] == url
    return str(found["problem"])


def test_a_host_without_a_database() -> None:
    assert health_host.ask_database({"database_url": "", "timeout": 1}) is None


def test_couchdb(tmp_path: Path, metrics_port: int, silent_port: int) -> None:
    assert problem(f"couchdb://127.0.0.1:{metrics_port}/img_db", tmp_path) == ""
    assert problem(f"couchdb://127.0.0.1:{silent_port}/img_db", tmp_path) == "timed out"
    assert problem("couchdb://127.0.0.1:1/img_db", tmp_path) == "Connection refused"


class Ping(socketserver.BaseRequestHandler):
    """Answers a ping of MongoDB's protocol, with what the server has as `ok`."""

    def handle(self) -> None:
        size, *_, operation = struct.unpack("<iiii", self.request.recv(16))
        flags, kind, length = struct.unpack("<iBi", self.request.recv(9))
        rest = self.request.recv(length - 4)
        assert (operation, flags, kind, len(rest)) == (2013, 0, 0, size - 25)
        assert rest.startswith(b"\x10ping\0\1\0\0\0")
        body = b"\x01ok\0" + struct.pack("<d", self.server.ok)  # type: ignore[attr-defined]
        message = bytes(5) + struct.pack("<i", len(body) + 5) + body + b"\0"
        self.request.sendall(struct.pack("<iiii", len(message) + 16, 2, 1, 2013) + message)


@pytest.mark.parametrize("ok, said", [(1.0, ""), (0.0, "it answers, and says that it is not well")])
def test_mongodb_is_sent_a_ping(ok: float, said: str, tmp_path: Path) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Ping) as server:
        server.ok = ok  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"mongodb://127.0.0.1:{server.server_address[1]}/kafka_db.image?retryWrites=false"
        assert problem(url, tmp_path) == said
        thread.join()


def test_a_mongodb_that_does_not_answer(silent_port: int, tmp_path: Path) -> None:
    url = f"mongodb://127.0.0.1:{silent_port}/kafka_db.image"
    assert problem(url, tmp_path) == "timed out"
    assert problem(f"{url}?tls=true", tmp_path) == "timed out"
    assert problem("mongodb://127.0.0.1:1/kafka_db.image", tmp_path) == "Connection refused"
