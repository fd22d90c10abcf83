"""What the apps, and nobody, may do in the database, seen from the hosts that use it.

The same for each kind of database; on_host/use_database.py says what each means by it.
"""

from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

GROUP = "storage_nodes"
PYTHON = "/opt/iot-pipeline/current/bin/python"

NOBODY = ("nobody", "a stranger")
APPS = ("iot-audit", "iot-storage")
# One failed login each: CouchDB locks who has five within five minutes, and the apps are at work.
WRONG = ("iot-audit's wrong password", "iot-storage's wrong password")

# Who is answered; all others are refused. None of these changes anything.
READS: dict[str, tuple[str, ...]] = {
    "see the database": APPS,
    "read documents": APPS,
    "list all databases": (),
    "see users": (),
    "see settings": (),
}
# Whether it is up CouchDB tells everyone, and MongoDB who does not log in, or rightly.
UP = {"couchdb": (*NOBODY, *APPS), "mongodb": ("nobody", *APPS)}
# What is for the admin alone.
WRITES = ("make a database", "set rules", "grant rights", "make a user", "make an admin")

Answers = Callable[..., list[str]]


@pytest.fixture
def admin(node: Any, store: str, secrets: dict[str, Any]) -> list[Any]:
    """The database's admin, and its password."""
    user = node.variables.get(f"{store}_admin_user", "admin")
    return [user, secrets[f"{store}_admin_password"]]


@pytest.fixture
def answers(host: Host, node: Any, store: str, run_script: Any) -> Answers:
    """What comes of asking, each time as somebody for something."""

    def ask(*asks: tuple[str, str], **more: Any) -> list[str]:
        # An app's document is gone again before anybody counts it.
        document = f"made-by-a-test-on-{node.name}"
        asked = {"store": store, "document": document, "asks": asks, **more}
        found: list[str] = run_script(host, "use_database.py", asked, PYTHON)
        return found

    return ask


@pytest.mark.parametrize("who", [*NOBODY, *APPS])
def test_who_may_read_what(who: str, store: str, answers: Answers) -> None:
    wanted = {"hear whether it is up": UP[store], **READS}
    found = answers(*((who, what) for what in wanted))
    assert dict(zip(wanted, found, strict=True)) == {
        what: "granted" if who in allowed else "refused" for what, allowed in wanted.items()
    }


def test_a_wrong_password_lets_nobody_in(answers: Answers) -> None:
    assert answers(*((who, "read documents") for who in WRONG)) == ["refused"] * len(WRONG)


@pytest.mark.e2e
@pytest.mark.parametrize("who", [*NOBODY, *APPS])
def test_nobody_but_the_admin_administers(who: str, answers: Answers) -> None:
    found = answers(*((who, what) for what in WRITES))
    assert dict(zip(WRITES, found, strict=True)) == dict.fromkeys(WRITES, "refused")


@pytest.mark.e2e
def test_a_user_of_another_database_is_refused(answers: Answers, admin: list[Any]) -> None:
    wanted = {
        "use a database of one's own": "granted",
        "see the database": "refused",
        "read documents": "refused",
        "write the document": "refused",
        **dict.fromkeys(WRITES, "refused"),
    }
    found = answers(*(("a user of another database", what) for what in wanted), admin=admin)
    assert dict(zip(wanted, found, strict=True)) == wanted


@pytest.mark.e2e
def test_storage_writes_and_the_audit_does_not(answers: Answers, node: Any) -> None:
    if not node.variables.get("couchdb_enforce_readers", True):
        pytest.skip("the inventory lets the audit write: couchdb_enforce_readers")
    refused = [
        (who, what)
        for who in (*NOBODY, "iot-audit")
        for what in ("write another document", "change the document", "remove the document")
    ]
    created, *found, changed, removed = answers(
        ("iot-storage", "write the document"),
        *refused,
        ("iot-storage", "change the document"),
        ("iot-storage", "remove the document"),
    )
    assert (created, changed, removed) == ("granted", "granted", "granted")
    assert dict(zip(refused, found, strict=True)) == dict.fromkeys(refused, "refused")


@pytest.mark.usefixtures("store")
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
