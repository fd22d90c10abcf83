"""What the apps, and nobody, may do in the database, seen from the hosts that use it."""

from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

GROUP = "storage_nodes"
PYTHON = "/opt/iot-pipeline/current/bin/python"

REFUSED = {401, 403}
NOBODY = ("nobody", "iot-audit's wrong password", "iot-storage's wrong password")
APPS = ("iot-audit", "iot-storage")

# Request -> who is answered; all others are refused. None of these changes anything.
READS: dict[tuple[Any, ...], tuple[str, ...]] = {
    ("GET", "/_up"): (*NOBODY, *APPS),
    ("GET", "/{database}"): APPS,
    ("GET", "/{database}/_all_docs?limit=1"): APPS,
    ("GET", "/_all_dbs"): (),
    ("GET", "/_users/_all_docs"): (),
    ("GET", "/_node/_local/_config/admins"): (),
}
# What is for the admin alone.
WRITES: tuple[tuple[Any, ...], ...] = (
    ("PUT", "/made-by-an-app"),
    ("PUT", "/{database}/_design/made-by-an-app", {}),
    ("PUT", "/{database}/_security", {}),
    ("PUT", "/_users/org.couchdb.user:made-by-an-app", {"name": "made-by-an-app", "roles": []}),
    ("PUT", "/_node/_local/_config/admins/made-by-an-app", "made-up"),
)


@pytest.fixture
def answers(
    host: Host, variables: dict[str, Any], run_script: Callable[..., Any]
) -> Callable[..., list[int]]:
    """The statuses that requests get, each of who asks, a method, a path and perhaps a body."""

    def ask(*requests: tuple[Any, ...]) -> list[int]:
        database = variables["couchdb_database"]
        sent = [
            [who, method, path.replace("{database}", database), *body]
            for who, method, path, *body in requests
        ]
        statuses: list[int] = run_script(host, "use_database.py", {"requests": sent}, PYTHON)
        return statuses

    return ask


@pytest.mark.parametrize("who", [*NOBODY, *APPS])
def test_who_may_read_what(who: str, answers: Callable[..., list[int]]) -> None:
    found = answers(*((who, *request) for request in READS))
    for (request, allowed), status in zip(READS.items(), found, strict=True):
        assert status == 200 if who in allowed else status in REFUSED, request


@pytest.mark.e2e
@pytest.mark.parametrize("who", [*NOBODY, *APPS])
def test_nobody_but_the_admin_administers(who: str, answers: Callable[..., list[int]]) -> None:
    found = answers(*((who, *request) for request in WRITES))
    for request, status in zip(WRITES, found, strict=True):
        assert status in REFUSED, request


@pytest.mark.e2e
def test_storage_writes_and_the_audit_does_not(
    node: Any, answers: Callable[..., list[int]]
) -> None:
    # An app's document is gone again before anybody counts it.
    path = f"/{{database}}/made-by-a-test-on-{node.name}"
    created, *refused, removed = answers(
        ("iot-storage", "PUT", path, {}),
        *((who, "PUT", f"{path}-too", {}) for who in (*NOBODY, "iot-audit")),
        *((who, "PUT", f"{path}?rev={{rev}}", {}) for who in (*NOBODY, "iot-audit")),
        *((who, "DELETE", f"{path}?rev={{rev}}") for who in (*NOBODY, "iot-audit")),
        ("iot-storage", "DELETE", f"{path}?rev={{rev}}"),
    )
    assert (created, removed) == (201, 200)
    assert set(refused) <= REFUSED


def test_no_app_is_the_admin(host: Host) -> None:
    """Its password is looked for in test_secrets.py."""
    users = host.check_output(
        "grep --no-filename ^IOT_STORE_USER= /etc/iot-pipeline/iot-storage.env "
        "/etc/iot-pipeline/iot-audit.env"
    )
    assert users.replace('"', "").splitlines() == [
        "IOT_STORE_USER=iot-storage",
        "IOT_STORE_USER=iot-audit",
    ]
