import signal
import socket
import sys
from pathlib import Path

import pytest
import yaml

from iot_lab.paths import ROOT
from iot_lab.processes import TOPIC_CONFIG, App, Process, ProcessError, free_port, wait_for


def shell(folder: Path, script: str) -> Process:
    return Process("script", folder, ["/bin/sh", "-c", script], {})


def test_topics_are_made_as_on_hosts() -> None:
    topology = ROOT / "inventory/couchdb/group_vars/all/topology.yml"
    topics = yaml.safe_load(topology.read_text())["kafka_resources_topics"]
    assert all(topic["config"].items() >= TOPIC_CONFIG.items() for topic in topics)


def test_output_goes_to_the_log_and_survives_a_restart(tmp_path: Path) -> None:
    process = shell(tmp_path, "echo to out; echo to err >&2; exit 3")
    for _ in range(2):
        assert process.start().wait(10) == 3
    assert process.output() == "to out\nto err\n" * 2


def test_an_end_before_it_is_ready_shows_the_log(tmp_path: Path) -> None:
    process = shell(tmp_path, "for n in $(seq 50); do echo line $n; done; exit 7")
    process.start().wait(10)
    with pytest.raises(ProcessError, match="ended with status 7 before it was ready") as failure:
        process.wait_ready()
    assert "line 50" in str(failure.value)
    assert "line 31\n" in str(failure.value)
    assert "line 30\n" not in str(failure.value)


def test_stop_is_sigterm_and_what_ignores_it_is_killed(tmp_path: Path) -> None:
    polite = shell(tmp_path / "a", "trap 'exit 4' TERM; echo up; while :; do sleep 0.05; done")
    polite.start()
    wait_for(lambda: "up" in polite.output(), "the script", 10)
    assert polite.stop() == 4
    deaf = shell(tmp_path / "b", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    deaf.start()
    wait_for(lambda: "up" in deaf.output(), "the script", 10)
    with pytest.raises(ProcessError, match="did not end within"):
        deaf.stop(timeout=0.3)
    assert not deaf.running
    assert deaf.status() == -signal.SIGKILL


def test_settings_of_other_pipelines_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_BOOTSTRAP_SERVERS", "production:9092")
    monkeypatch.setenv("KAFKA_HEAP_OPTS", "-Xmx99g")
    process = Process("env", tmp_path, ["/usr/bin/env"], {"IOT_COUNT": "5"})
    process.start().wait(10)
    assert "IOT_COUNT=5" in process.output()
    assert "production" not in process.output()
    assert "99g" not in process.output()


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = f"""
import pathlib, os, signal, sys, time
sys.path[:0] = {sys.path!r}
from iot_lab.processes import Process
folder = pathlib.Path({str(tmp_path)!r})
process = Process("child", folder, ["/bin/sleep", "60"], {{}}).start()
# Before that it has not told the kernel yet.
while pathlib.Path(f"/proc/{{process.pid}}/comm").read_text() != "sleep\\n":
    time.sleep(0.01)
(folder / "pid").write_text(str(process.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = Process("parent", tmp_path, [sys.executable, "-c", script], {})
    assert parent.start().wait(30) == -signal.SIGKILL
    child = int((tmp_path / "pid").read_text())

    def gone() -> bool:
        # Dead, though perhaps not yet collected by whoever inherited it.
        status = Path(f"/proc/{child}/stat")
        return not status.exists() or status.read_text().split()[2] == "Z"

    wait_for(gone, "the child to die", 10)


def test_an_app_is_ready_when_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "iot-pipeline"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, socket, sys, time\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
        "address = os.environ['NOTIFY_SOCKET'].replace('@', '\\0', 1)\n"
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1\\nSTATUS=x', address)\n"
        "time.sleep(60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("iot_lab.processes.APPS", tmp_path)
    app = App("app", tmp_path / "data", ["produce"], {}).start()
    assert not app.is_ready()
    (tmp_path / "data" / "go").touch()
    app.wait_ready(30)
    app.kill()
    (tmp_path / "data" / "go").unlink()
    assert not app.start().is_ready(), "ready only by its predecessor's word"
    app.kill()
    app.close()


def test_free_ports_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_waiting_names_what_did_not_come() -> None:
    with pytest.raises(TimeoutError, match="waited 0 s in vain for Godot"):
        wait_for(lambda: False, "Godot", 0.05, 0.01)
