"""What the module kafka_acls makes of declared and existing ACLs."""

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
    spec = importlib.util.spec_from_file_location("kafka_acls", ROLE / "library/kafka_acls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["kafka_acls"] = module
    spec.loader.exec_module(module)
    return module


kafka_acls = load()


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "principals": ["User:a"],
        "resource_type": "topic",
        "resource_name": "images",
        "pattern": "literal",
        "operations": ["read"],
        "permission": "allow",
        "hosts": ["*"],
    } | changes


def declared(*entries: dict[str, Any]) -> set[Any]:
    found: set[Any] = kafka_acls.declared_acls(entries)
    return found


def test_an_entry_is_an_acl_for_each_principal_operation_and_host() -> None:
    assert len(declared(entry(principals=["User:a", "User:b"]))) == 2
    found = declared(entry(operations=["READ", "write"], hosts=["10.0.0.1", "10.0.0.2"]))
    assert sorted(map(str, found)) == [
        "User:a: allow read on topic images from 10.0.0.1",
        "User:a: allow read on topic images from 10.0.0.2",
        "User:a: allow write on topic images from 10.0.0.1",
        "User:a: allow write on topic images from 10.0.0.2",
    ]


def test_missing_acls_are_added_and_others_left_alone() -> None:
    wanted = declared(entry(), entry(operations=["write"]))
    existing = declared(entry(), entry(principals=["User:b"]))
    found = kafka_acls.make_plan(wanted, existing, remove_unknown=False)
    assert (found.add, found.remove) == (list(declared(entry(operations=["write"]))), [])


def test_undeclared_acls_are_removed_when_told_but_our_own() -> None:
    existing = declared(entry(), entry(principals=["User:b"]), entry(principals=["User:kafka"]))
    found = kafka_acls.make_plan(declared(entry()), existing, remove_unknown=True, own="User:kafka")
    assert (found.add, found.remove) == ([], list(declared(entry(principals=["User:b"]))))


def test_the_same_twice_is_one() -> None:
    assert declared(entry(), entry()) == declared(entry())


def test_the_diff_shows_only_what_changes() -> None:
    wanted = declared(entry(), entry(pattern="prefixed", permission="deny"))
    existing = declared(entry(), entry(principals=["User:b"]))
    diff = kafka_acls.diff_of(kafka_acls.make_plan(wanted, existing, remove_unknown=True))
    assert diff == {
        "before": "User:b: allow read on topic images\n",
        "after": "User:a: deny read on topics like images*\n",
    }


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"principals": ["User:b", "a"]}, "written like User:iot-producer"),
        ({"resource_name": ""}, "has no name"),
        ({"resource_type": "cluster", "operations": ["alter"]}, "name is kafka-cluster"),
        ({"resource_name": "*", "pattern": "prefixed"}, "set the pattern to literal"),
        ({"operations": ["idempotent_write"]}, "not idempotent_write"),
        ({"operations": []}, "not none"),
        ({"hosts": []}, "hosts is empty"),
    ],
)
def test_wrong_declarations_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        declared(entry(**changes))


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"one on topic images: .* two on topic"):
        declared(
            entry(principals=["one"], resource_name="images", operations=["fly"]),
            entry(principals=["two"]),
        )
