"""The MongoDB servers, official or the lab's stand-in. Who is let in: test_database_access.py."""

from typing import Any

import pytest
from testinfra.host import Host

GROUP = "mongodb_servers"
DATA = "/var/lib/mongodb"
CONFIG = "/etc/mongodb"


@pytest.fixture
def official(variables: dict[str, Any]) -> None:
    if variables.get("mongodb_distribution") == "standin":
        pytest.skip("a stand-in runs here")


def test_data_and_settings_are_private(host: Host) -> None:
    data = host.file(DATA)
    assert (data.user, data.mode) == ("mongodb", 0o750)
    assert host.check_output("find %s -type f", DATA)
    settings = host.file(CONFIG)
    assert (settings.user, settings.group, settings.mode) == ("root", "mongodb", 0o750)


@pytest.mark.usefixtures("official")
def test_it_asks_who_one_is(host: Host) -> None:
    settings = host.file(f"{CONFIG}/mongod.conf")
    assert (settings.user, settings.group, settings.mode) == ("root", "mongodb", 0o640)
    assert "authorization: enabled" in settings.content_string
    pid = host.check_output("systemctl show --property=MainPID --value mongod")
    arguments = host.check_output("ps --no-headers -ww -o args -p %s", pid)
    assert arguments == f"/usr/bin/mongod --config {CONFIG}/mongod.conf"


def test_it_speaks_only_new_tls_and_shows_the_certificate_on_disk(
    host: Host, node: Any, variables: dict[str, Any]
) -> None:
    if not variables["mongodb_tls"]:
        pytest.skip("the inventory has no TLS")
    folder = variables.get("pki_dir", "/etc/ssl/iot-pipeline")
    fingerprint = "openssl x509 -noout -fingerprint -sha256"
    connect = (
        f"openssl s_client -connect {variables['mongodb_bind_address']}:{variables['mongodb_port']}"
        f" -verify_hostname {node.name} -CAfile {folder}/ca.pem -verify_return_error"
    )
    shown = host.run(f"{connect} </dev/null | {fingerprint}")
    on_disk = host.check_output(f"{fingerprint} -in %s", f"{folder}/host.pem")
    assert shown.stdout.strip() == on_disk, shown.stderr
    old = host.run(f"{connect} -tls1_1 -cipher DEFAULT@SECLEVEL=0 </dev/null")
    assert "Cipher is (NONE)" in old.stdout
