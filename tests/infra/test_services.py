"""What holds for every service, whichever host it is on."""

import re

import pytest
from testinfra.host import Host

USERS = {"kafka": "kafka", "couchdb": "couchdb", "mongod": "mongodb"}


def properties(host: Host, unit: str) -> dict[str, str]:
    lines = host.check_output("systemctl show %s", unit).splitlines()
    return dict(line.partition("=")[::2] for line in lines)


def test_is_enabled_and_runs(host: Host, unit: str) -> None:
    service = host.service(unit)
    assert service.is_running
    assert service.is_enabled


def test_runs_as_its_own_user(host: Host, unit: str) -> None:
    pid = properties(host, unit)["MainPID"]
    user = USERS.get(unit, "iot-pipeline")
    assert host.check_output("ps --no-headers -o user:32 -p %s", pid).strip() == user
    account = host.user(user)
    assert account.uid < 1000
    assert account.shell in {"/usr/sbin/nologin", "/bin/false", "/bin/bash"}
    assert account.password in {"!", "*", "!*", "!!"}


def test_comes_back_after_a_crash(host: Host, unit: str) -> None:
    unit_properties = properties(host, unit)
    assert unit_properties["Restart"] in {"always", "on-failure"}
    assert unit_properties["LimitNOFILE"].isdigit()


def test_cannot_gain_privileges(host: Host, unit: str) -> None:
    assert properties(host, unit)["NoNewPrivileges"] == "yes"
    pid = properties(host, unit)["MainPID"]
    status = host.file(f"/proc/{pid}/status").content_string
    effective = re.search(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    assert effective
    assert int(effective[1], 16) == 0


def test_may_do_little(host: Host, unit: str) -> None:
    """From 0, nothing, to 10, everything."""
    most = 20 if unit.startswith("iot-") else 40
    found = host.run("systemd-analyze security --no-pager --threshold=%s %s", str(most), unit)
    assert found.rc == 0, found.stdout


def test_app_reports_to_systemd(host: Host, app: str) -> None:
    found = properties(host, app)
    assert found["Type"] == "notify"
    assert found["WatchdogUSec"] not in {"0", "infinity"}
    assert found["Restart"] == "always"


def test_app_is_confined(host: Host, app: str) -> None:
    found = properties(host, app)
    assert found["ProtectSystem"] == "strict"
    assert found["ProtectHome"] in {"yes", "tmpfs"}
    assert found["PrivateTmp"] == "yes"
    assert found["PrivateDevices"] == "yes"
    assert found.get("CapabilityBoundingSet", "") == ""  # systemctl leaves out what is empty.
    assert found["MemoryMax"].isdigit()
    assert found["TasksMax"].isdigit()
    # PyTorch compiles kernels at run time, so it has to make memory executable.
    assert found["MemoryDenyWriteExecute"] == ("no" if app == "iot-inference" else "yes")


def test_app_runs_the_current_release(host: Host, app: str) -> None:
    current = host.check_output("readlink --canonicalize /opt/iot-pipeline/current")
    assert re.fullmatch(r"/opt/iot-pipeline/releases/[\d.]+\w*-\w+", current)
    assert host.file("/usr/local/bin/iot-pipeline").linked_to.startswith(current)
    pid = properties(host, app)["MainPID"]
    # The venv's interpreter is a link to the system's, so the program's path tells the release.
    assert "/opt/iot-pipeline/" in host.check_output("ps --no-headers -o args -p %s", pid)
    assert re.search(r"\d+\.\d+\.\d+", host.check_output("iot-pipeline --version"))


def test_app_settings_are_private(host: Host, app: str) -> None:
    settings = host.file(f"/etc/iot-pipeline/{app}.env")
    assert (settings.user, settings.group, settings.mode) == ("root", "iot-pipeline", 0o640)


@pytest.mark.usefixtures("app")
def test_app_can_write_to_its_state_alone(host: Host) -> None:
    state = host.file("/var/lib/iot-pipeline")
    assert state.user == "iot-pipeline"
    assert not state.mode & 0o007
    writable = host.check_output(
        "find /opt/iot-pipeline /etc/iot-pipeline "
        r"-not -type l \( -user iot-pipeline -o -perm /022 \) -print"
    )
    assert writable == ""


def test_app_serves_its_metrics_on_loopback(host: Host, app: str) -> None:
    port = {"iot-producer": 9101, "iot-inference": 9102, "iot-storage": 9103}[app]
    metrics = host.check_output(
        "curl --silent --fail --max-time 5 http://127.0.0.1:%s/metrics", str(port)
    )
    assert re.search(r"^iot_\w+", metrics, re.MULTILINE)


def test_app_logs_no_image(host: Host, app: str) -> None:
    journal = host.check_output("journalctl --unit=%s --output=cat --no-pager --lines=500", app)
    assert journal
    assert not re.search(r"[A-Za-z0-9+/]{200}", journal)
