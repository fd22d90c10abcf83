"""What the module kafka_users makes of declared and existing users."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ansible.module_utils
import pytest

ROLE = Path(__file__).parents[2] / "roles/kafka_resources"


def load() -> ModuleType:
    # Where Ansible puts what a role's modules share.
    ansible.module_utils.__path__.append(str(ROLE / "module_utils"))
    spec = importlib.util.spec_from_file_location("kafka_users", ROLE / "library/kafka_users.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["kafka_users"] = module
    spec.loader.exec_module(module)
    return module


kafka_users = load()
User = kafka_users.User
SCRAM = frozenset({"SCRAM-SHA-512"})
OLD = frozenset({"SCRAM-SHA-256"})


def plan(
    declared: list[Any],
    existing: dict[str, frozenset[str]],
    right: tuple[str, ...] = (),
    keep: frozenset[str] | None = None,
) -> Any:
    return kafka_users.make_plan(declared, existing, lambda user: user.password in right, keep=keep)


def test_a_missing_user_is_created_and_its_password_not_tried() -> None:
    def never(_user: Any) -> bool:
        raise AssertionError

    found = kafka_users.make_plan([User("a", "x")], {"a": OLD}, never, keep=None)
    assert found.create == [User("a", "x")]


def test_a_password_is_changed_only_when_it_is_wrong() -> None:
    users = [User("a", "x"), User("b", "y")]
    assert plan(users, {"a": SCRAM, "b": SCRAM}, right=("x",)).change == [User("b", "y")]
    assert plan(users, {"a": SCRAM, "b": SCRAM}, right=("x", "y")).is_empty()


def test_undeclared_users_are_removed_only_when_told() -> None:
    existing = {"a": SCRAM | OLD, "b": SCRAM, "kafka": SCRAM}
    assert plan([User("a", "x")], existing, right=("x",)).is_empty()
    found = plan([User("a", "x")], existing, right=("x",), keep=frozenset({"kafka"}))
    # Another mechanism would let the declared user in with another password.
    assert found.remove == {"a": OLD, "b": SCRAM}


def test_the_diff_holds_no_password() -> None:
    users = [User("new", "secret-1"), User("old", "secret-2"), User("same", "secret-3")]
    existing = {"old": SCRAM, "same": SCRAM, "gone": SCRAM | OLD}
    found = plan(users, existing, right=("secret-3",), keep=frozenset())
    diff = kafka_users.diff_of(found, existing)
    assert "secret" not in str(diff)
    assert "secret" not in str(found)
    assert ['"new"' in diff[side] for side in ("before", "after")] == [False, True]
    assert ['"old"' in diff[side] for side in ("before", "after")] == [True, True]
    assert ['"gone"' in diff[side] for side in ("before", "after")] == [True, False]
    assert diff["before"] != diff["after"]
    assert '"same"' not in str(diff)
    nothing = plan([User("same", "x")], existing, right=("x",))
    assert kafka_users.diff_of(nothing, existing) == {"before": "", "after": ""}


@pytest.mark.parametrize(
    "users, said",
    [
        ([("a", "x"), ("a", "y")], "more than once: a"),
        ([("a,b", "x")], "'a,b' is no name"),
        ([("a", "")], "a has no password"),
        ([("kafka", "x")], "kafka is the user that this is done as"),
    ],
)
def test_wrong_declarations_are_told(users: list[tuple[str, str]], said: str) -> None:
    entries = [{"name": name, "password": password} for name, password in users]
    with pytest.raises(ValueError, match=said):
        kafka_users.declared_users(entries, "kafka")
