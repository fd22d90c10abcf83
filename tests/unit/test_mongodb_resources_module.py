"""What the module mongodb_resources makes of what is declared and what there is."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "roles/mongodb/library/mongodb_resources.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mongodb_resources", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["mongodb_resources"] = module
    spec.loader.exec_module(module)
    return module


mongodb_resources = load()
STORAGE = mongodb_resources.User("iot-storage", "kafka_db", frozenset({"readWrite"}), "secret-1")
AS_DECLARED = {"roles": [{"role": "readWrite", "db": "kafka_db"}]}
ELSEWHERE = {"roles": [{"role": "readWrite", "db": "admin"}]}
MORE = {"roles": [*AS_DECLARED["roles"], {"role": "read", "db": "admin"}]}
ANOTHER_PASSWORD = {"pwd": "secret-1", "mechanisms": ["SCRAM-SHA-256"]}


def commands(existing: Any, *, is_right: bool = True) -> list[tuple[str, dict[str, Any]]]:
    found = list(mongodb_resources.user_commands(STORAGE, existing, lambda _: is_right))
    assert "secret" not in str([words for words, _, _ in found])
    assert "secret" not in str(STORAGE)
    return [(command, arguments) for _, command, arguments in found]


def test_a_missing_user_is_created_with_its_roles_and_not_tried() -> None:
    def never(_user: Any) -> bool:
        raise AssertionError

    ((_, command, arguments),) = mongodb_resources.user_commands(STORAGE, None, never)
    assert (command, arguments["roles"]) == ("createUser", ["readWrite"])
    assert arguments["pwd"] == "secret-1"


def test_a_user_as_declared_is_left_alone() -> None:
    assert commands(AS_DECLARED) == []


@pytest.mark.parametrize("existing", [ELSEWHERE, MORE, {"roles": []}])
def test_roles_become_those_declared_and_no_others(existing: Any) -> None:
    assert commands(existing) == [("updateUser", {"roles": ["readWrite"]})]


def test_a_password_is_changed_only_when_it_is_wrong() -> None:
    assert commands(AS_DECLARED, is_right=False) == [("updateUser", ANOTHER_PASSWORD)]


class FakeCollection:
    def __init__(self) -> None:
        self.indexes: dict[str, Any] = {"_id_": {"key": [("_id", 1)]}}

    def index_information(self) -> dict[str, Any]:
        return self.indexes

    def create_index(self, keys: list[tuple[str, int]], name: str) -> None:
        self.indexes[name] = {"key": keys}


class FakeDatabase(dict[str, FakeCollection]):
    def list_collection_names(self) -> list[str]:
        return list(self)

    def create_collection(self, name: str) -> None:
        self[name] = FakeCollection()

    def drop_collection(self, name: str) -> None:
        del self[name]


IMAGE = {
    "database": "kafka_db",
    "name": "image",
    "state": "present",
    "indexes": [{"name": "by-truth", "fields": ["GroundTruth", "InferredValue"]}],
}


def ensure(client: Any, *collections: Any, check_mode: bool = False) -> list[str]:
    changes: list[str] = mongodb_resources.ensure_collections(
        client, collections, check_mode=check_mode
    )
    return changes


def test_collections_and_indexes_are_made_once() -> None:
    database = FakeDatabase()
    told = ensure({"kafka_db": database}, IMAGE, check_mode=True)
    assert database == {}
    assert ensure({"kafka_db": database}, IMAGE) == told
    assert told == [
        "collection kafka_db.image is created",
        "index by-truth of kafka_db.image is created",
    ]
    assert database["image"].indexes["by-truth"]["key"] == [
        ("GroundTruth", 1),
        ("InferredValue", 1),
    ]
    assert ensure({"kafka_db": database}, IMAGE) == []


def test_a_collection_is_dropped_when_told() -> None:
    database = FakeDatabase(image=FakeCollection(), copy=FakeCollection())
    absent = {"database": "kafka_db", "name": "copy", "state": "absent", "indexes": []}
    assert ensure({"kafka_db": database}, absent) == ["collection kafka_db.copy is dropped"]
    assert set(database) == {"image"}
    assert ensure({"kafka_db": database}, absent) == []


def test_an_index_of_other_fields_is_told() -> None:
    database = FakeDatabase(image=FakeCollection())
    database["image"].create_index([("GroundTruth", 1)], name="by-truth")
    with pytest.raises(mongodb_resources.Problem, match="by-truth of image sorts by other fields"):
        ensure({"kafka_db": database}, IMAGE)


class FakeServer:
    """A server as it is found: it knows a password of the admin, or nobody yet."""

    def __init__(self, password: str | None, *, is_secondary: bool = False) -> None:
        self.password = password
        self.is_secondary = is_secondary
        self.admin = self

    def lets_in(self, name: str, password: str, database: str) -> bool:
        return (name, database, password) == ("admin", "admin", self.password)

    @contextmanager
    def connect(self, *, alone: bool) -> Iterator[Any]:
        assert alone
        yield self

    def command(self, command: str, name: str, **arguments: Any) -> None:
        from pymongo.errors import NotPrimaryError, OperationFailure

        assert (command, name, arguments["roles"]) == ("createUser", "admin", ["root"])
        if self.is_secondary:
            raise NotPrimaryError("not primary")
        if self.password is not None:
            raise OperationFailure("not authorized", 13)
        self.password = arguments["pwd"]


def test_the_admin_is_made_where_nobody_has_an_account_and_a_wrong_password_is_told() -> None:
    pytest.importorskip("pymongo")
    ensure_admin = mongodb_resources.ensure_admin
    server = FakeServer(None)
    assert ensure_admin(server, "admin", "x", check_mode=False)
    assert ensure_admin(server, "admin", "x", check_mode=False) == []
    for check_mode in (True, False):
        with pytest.raises(mongodb_resources.Problem, match="refuses admin's password"):
            ensure_admin(server, "admin", "y", check_mode=check_mode)


def test_the_first_account_is_made_at_the_primary_alone() -> None:
    pytest.importorskip("pymongo")
    with pytest.raises(mongodb_resources.Problem, match="another member has become the primary"):
        mongodb_resources.ensure_admin(
            FakeServer(None, is_secondary=True), "admin", "x", check_mode=False
        )


SECONDARY = {"setName": "rs0", "secondary": True}
PRIMARY = {"setName": "rs0", "isWritablePrimary": True}
RECOVERING = {"setName": "rs0", "secondary": False, "isWritablePrimary": False}
LOGIN = {"username": "admin"}


class FakeMember:
    """A member of a set that is to be: it says in turn what it is, and knows an admin or nobody."""

    replica_set = "rs0"
    members = ("one:27017", "two:27017", "three:27017")
    address = "127.0.0.1:27017"

    def __init__(self, *said: dict[str, Any], has_users: bool = False, timeout: float = 60) -> None:
        self.said = list(said)
        self.has_users = has_users
        self.timeout = timeout
        self.admin = self
        self.login: Any = None
        self.made: list[Any] = []

    @contextmanager
    def connect(self, login: Any = None, *, alone: bool) -> Iterator[Any]:
        assert alone
        self.login, before = login, self.login
        try:
            yield self
        finally:
            self.login = before

    def command(self, command: Any) -> dict[str, Any]:
        from pymongo.errors import OperationFailure

        if command == "hello":
            return self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if self.has_users and self.login != LOGIN:
            raise OperationFailure("requires authentication", 13)
        self.made.append(command["replSetInitiate"])
        return {}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pymongo")
    monkeypatch.setattr(mongodb_resources, "PAUSE", 0.0)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("has_users", [False, True])
def test_a_replica_set_is_made_of_new_servers_and_of_one_that_has_users(has_users: bool) -> None:
    member = FakeMember({}, SECONDARY, has_users=has_users)
    initiate = mongodb_resources.initiate
    assert initiate(member, LOGIN, check_mode=False) == ["replica set rs0 is made"]
    [config] = member.made
    assert config["_id"] == "rs0"
    assert [m["host"] for m in config["members"]] == [*member.members]
    assert initiate(member, LOGIN, check_mode=False) == []


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "said",
    [
        [RECOVERING, RECOVERING, PRIMARY],
        [RECOVERING, SECONDARY],
        # In none, and one that knew only later that it is.
        [{}, {}],
        [{}, RECOVERING, {}, RECOVERING, SECONDARY],
    ],
)
def test_a_member_is_waited_for_until_it_serves(said: list[dict[str, Any]]) -> None:
    member = FakeMember(*said)
    mongodb_resources.wait_for(member)
    assert member.said == said[-1:]


@pytest.mark.usefixtures("hasty")
def test_a_member_that_does_not_serve_is_named() -> None:
    with pytest.raises(mongodb_resources.Problem, match="neither primary nor secondary of rs0"):
        mongodb_resources.wait_for(FakeMember(RECOVERING, timeout=0))
