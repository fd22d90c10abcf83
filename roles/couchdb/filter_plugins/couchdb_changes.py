"""What has to be sent to CouchDB, from what is there and what should be.

Nothing here asks anybody anything: the same data give the same requests.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

SYSTEM_DATABASES = ("_users", "_replicator")
# CouchDB lets all members write. Where some may only read, this function of a design document lets
# the others through.
WRITERS = """function (doc, old, user) {
  if (user.roles.indexOf('_admin') < 0 && %s.indexOf(user.name) < 0) {
    throw({forbidden: 'You may read this database, and not write to it.'});
  }
}"""

Data = Mapping[str, Any]


def couchdb_paths(databases: Sequence[Data], users: Sequence[Data]) -> list[str]:
    """What to read for `couchdb_changes`: a path for each user, and three for each database."""
    return [_user(user) for user in users] + [
        path
        for database in databases
        for path in (_writers(database), _security(database), _indexes(database))
    ]


def couchdb_changes(
    databases: Sequence[Data],
    users: Sequence[Data],
    names: Sequence[str],
    found: Mapping[str, Any],
    enforce_readers: bool,
) -> list[dict[str, Any]]:
    """The requests that make users and databases what they should be, in their order.

    Args:
        databases: as `couchdb_databases` has them.
        users: as `couchdb_users` has them.
        names: of the databases that are there.
        found: what was read from `couchdb_paths`, by path; what is not there is left out.
        enforce_readers: whether a function refuses what readers write.

    Returns:
        Each with `what` it does, in words, `method`, `path` and `body`.
    """
    changes: list[dict[str, Any]] = []

    def add(what: str, method: str, path: str, body: Any = None) -> None:
        changes.append({"what": what, "method": method, "path": path, "body": body or {}})

    for name in [*SYSTEM_DATABASES, *(database["name"] for database in databases)]:
        if name not in names:
            add(f"create database {name}", "PUT", quote(name, safe=""))
    for user in users:
        body = _user_change(user, found.get(_user(user)))
        if body:
            add(f"write user {user['name']}", "PUT", _user(user), body)
    for database in databases:
        for what, *request in _database_changes(database, found, enforce_readers):
            add(f"{what} {database['name']}", *request)
    return changes


def _user_change(user: Data, known: Data | None) -> dict[str, Any] | None:
    """The user's document, if it is to be written. Doing so anew would change its salt."""
    roles = list(user.get("roles", []))
    if (
        known is not None
        and sorted(known.get("roles", [])) == sorted(roles)
        and couchdb_password_is(known, user["password"])
    ):
        return None
    body = {"name": user["name"], "password": user["password"], "roles": roles, "type": "user"}
    return body if known is None else {**body, "_rev": known["_rev"]}


def couchdb_password_is(account: Data, password: str) -> bool:
    """Whether this is the password of a user's document.

    To log in with it would tell too, but failed logins lock the user for others.
    https://docs.couchdb.org/en/stable/intro/security.html: authentication database
    """
    salt = str(account.get("salt", ""))
    if account.get("password_scheme") == "simple":
        expected = str(account.get("password_sha", ""))
        given = hashlib.sha1((password + salt).encode()).hexdigest()  # noqa: S324 - CouchDB's own
        return hmac.compare_digest(given, expected)
    expected = str(account.get("derived_key", ""))
    if not expected:
        return False
    prf = str(account.get("pbkdf2_prf", "sha"))
    key = hashlib.pbkdf2_hmac(
        "sha1" if prf == "sha" else prf,
        password.encode(),
        salt.encode(),
        int(account.get("iterations", 10)),
        len(expected) // 2,
    )
    return hmac.compare_digest(key.hex(), expected)


def _database_changes(
    database: Data, found: Mapping[str, Any], enforce_readers: bool
) -> Iterator[tuple[Any, ...]]:
    members, readers = list(database.get("members", [])), list(database.get("readers", []))
    path, known = _writers(database), found.get(_writers(database), {})
    wanted = {"language": "javascript", "validate_doc_update": WRITERS % json.dumps(members)}
    is_enforced = bool(readers) and enforce_readers
    # Before the readers are let in.
    if is_enforced and any(known.get(name) != value for name, value in wanted.items()):
        rev = {"_rev": known["_rev"]} if known else {}
        yield "set who may write to", "PUT", path, {**wanted, **rev}
    permissions = {
        "admins": {"names": [], "roles": ["_admin"]},
        "members": {"names": members + readers, "roles": ["_admin"]},
    }
    if found.get(_security(database)) != permissions:
        yield "set who may use", "PUT", _security(database), permissions
    if known and not is_enforced:
        yield "let all members write to", "DELETE", f"{path}?rev={known['_rev']}"
    indexes = {
        index["name"]: [_field(each) for each in index["def"]["fields"]]
        for index in found.get(_indexes(database), {}).get("indexes", [])
    }
    for index in database.get("indexes", []):
        # Not left to CouchDB: the stand-in answers only once an index that is there has caught up.
        if indexes.get(index["name"]) != index["fields"]:
            body = {"type": "json", "ddoc": index["name"], "name": index["name"]}
            fields = {"index": {"fields": index["fields"]}}
            yield f"create index {index['name']} of", "POST", _indexes(database), {**body, **fields}


def _field(entry: str | Mapping[str, str]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def _user(user: Data) -> str:
    return f"_users/org.couchdb.user:{quote(user['name'], safe='')}"


def _writers(database: Data) -> str:
    return f"{quote(database['name'], safe='')}/_design/writers"


def _security(database: Data) -> str:
    return f"{quote(database['name'], safe='')}/_security"


def _indexes(database: Data) -> str:
    return f"{quote(database['name'], safe='')}/_index"


class FilterModule:
    """Ansible's way to find filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"couchdb_paths": couchdb_paths, "couchdb_changes": couchdb_changes}
