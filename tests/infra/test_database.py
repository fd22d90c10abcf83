"""CouchDB, as an operator asks it on its host."""

import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
from testinfra.host import Host

GROUP = "couchdb_servers"
NETRC = "/root/.netrc-couchdb"
CA = "/etc/ssl/iot-pipeline/ca.pem"


def ask(host: Host, url: str, *options: str) -> tuple[int, Any]:
    """HTTP status and JSON answer. As an operator would ask, with curl."""
    answer = host.check_output(
        f"curl --silent --show-error --max-time 10 --cacert {CA} {' '.join(options)} "
        "--write-out '\n%%{http_code}' %s",
        url,
    )
    body, _, status = answer.rpartition("\n")
    return int(status), json.loads(body)


@pytest.fixture
def server(variables: dict[str, Any]) -> str:
    """URL of the server."""
    parts = urlsplit(variables["store_url"])
    return f"{'https' if 'tls=true' in parts.query else 'http'}://{parts.netloc}"


def test_answers(host: Host, server: str) -> None:
    status, greeting = ask(host, server)
    assert status == 200
    # CouchDB greets with its version; so does what stands in for it in the lab.
    assert greeting["version"]


@pytest.mark.parametrize("path", ["_all_dbs", "{database}", "{database}/_all_docs", "_users"])
def test_strangers_are_refused(
    host: Host, server: str, variables: dict[str, Any], path: str
) -> None:
    path = path.format(database=variables["couchdb_database"])
    assert ask(host, f"{server}/{path}")[0] == 401


def test_strangers_create_nothing(host: Host, server: str) -> None:
    url = f"{server}/made-by-a-stranger"
    assert ask(host, url, "--request PUT")[0] == 401
    assert ask(host, url, f"--netrc-file {NETRC}")[0] == 404


def test_wrong_password_is_refused(host: Host, server: str, variables: dict[str, Any]) -> None:
    url = f"{server}/{variables['couchdb_database']}"
    assert ask(host, url, "--user admin:wrong")[0] == 401


def test_operators_read_with_their_netrc(
    host: Host, server: str, variables: dict[str, Any]
) -> None:
    netrc = host.file(NETRC)
    assert (netrc.user, netrc.mode) == ("root", 0o600)
    url = f"{server}/{variables['couchdb_database']}"
    assert ask(host, url, f"--netrc-file {NETRC}")[0] == 200
    status, documents = ask(host, f"{url}/_all_docs?limit=1", f"--netrc-file {NETRC}")
    assert status == 200
    assert "rows" in documents


def test_listens_only_where_told(host: Host, server: str, variables: dict[str, Any]) -> None:
    if variables["couchdb_bind_address"] != "127.0.0.1":
        pytest.skip("the inventory opens the database to other hosts")
    own = host.check_output("ip -4 -o addr show scope global")
    address = re.search(r"inet ([\d.]+)", own)
    assert address
    refused = host.run(
        "curl --silent --max-time 5 %s://%s:%s/",
        server.partition(":")[0],
        address[1],
        str(variables["couchdb_port"]),
    )
    assert refused.rc == 7
