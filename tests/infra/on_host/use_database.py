"""Asks the database for things, each as somebody, and prints what came of it.

    stdin   {"store": "couchdb", "document": "made-by-a-test", "admin": ["admin", "PASSWORD"],
             "asks": [["iot-audit", "read documents"], ["nobody", "set rules"]]}
    stdout  ["granted", "refused"]

Who is an app of this host logs in as it does; `iot-audit's wrong password` is one that is made up,
`a stranger` a user that is none, `a user of another database` one that the admin makes, and removes
when all is asked: it may use a database of its own. All others do not log in. What is asked for
means the same for each database.
"""

import base64
import http.client
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iot_pipeline.access import Tls
from iot_pipeline.settings import AuditSettings, DatabaseSettings, StoreSettings, load

APPS: dict[str, type[DatabaseSettings]] = {"iot-storage": StoreSettings, "iot-audit": AuditSettings}
NEW = "made-by-an-app"
# Of another database, and that database.
OTHER, PASSWORD = "made-by-tests-infra", secrets.token_urlsafe()

# CouchDB: method, path and body.
REQUESTS: dict[str, tuple[Any, ...]] = {
    "hear whether it is up": ("GET", "/_up"),
    "use a database of one's own": ("GET", f"/{OTHER}"),
    "see the database": ("GET", "/{database}"),
    "read documents": ("GET", "/{database}/_all_docs?limit=1"),
    "list all databases": ("GET", "/_all_dbs"),
    "see users": ("GET", "/_users/_all_docs"),
    "see settings": ("GET", "/_node/_local/_config/admins"),
    "make a database": ("PUT", f"/{NEW}"),
    "set rules": ("PUT", f"/{{database}}/_design/{NEW}", {}),
    "grant rights": ("PUT", "/{database}/_security", {}),
    "make a user": ("PUT", f"/_users/org.couchdb.user:{NEW}", {"name": NEW, "roles": []}),
    "make an admin": ("PUT", f"/_node/_local/_config/admins/{NEW}", "made-up"),
    "write the document": ("PUT", "/{database}/{document}", {}),
    "write another document": ("PUT", "/{database}/{document}-too", {}),
    "change the document": ("PUT", "/{database}/{document}?rev={rev}", {}),
    "remove the document": ("DELETE", "/{database}/{document}?rev={rev}"),
}

# MongoDB: a function of the database, the collection's name, and the document's id.
COMMANDS: dict[str, Callable[[Any, str, str], Any]] = {
    "hear whether it is up": lambda db, _, __: db.command("ping"),
    "use a database of one's own": lambda db, _, __: db.client[OTHER].command("dbStats"),
    "see the database": lambda db, _, __: db.command("dbStats"),
    "read documents": lambda db, name, _: db[name].find_one(),
    "list all databases": lambda db, _, __: db.client.admin.command(
        "listDatabases", authorizedDatabases=False
    ),
    "see users": lambda db, _, __: db.client.admin.command("usersInfo", {"forAllDBs": True}),
    "see settings": lambda db, _, __: db.client.admin.command("getCmdLineOpts"),
    "make a database": lambda db, _, __: db.client[NEW].create_collection("new"),
    "set rules": lambda db, name, _: db.command("collMod", name, validator={}),
    "grant rights": lambda db, _, __: db.command(
        "grantRolesToUser", "iot-audit", roles=["readWrite"]
    ),
    "make a user": lambda db, _, __: db.command("createUser", NEW, pwd="made-up", roles=["read"]),
    "make an admin": lambda db, _, __: db.client.admin.command(
        "createUser", NEW, pwd="made-up", roles=["root"]
    ),
    "write the document": lambda db, name, key: db[name].insert_one({"_id": key}),
    "write another document": lambda db, name, key: db[name].insert_one({"_id": f"{key}-too"}),
    "change the document": lambda db, name, key: db[name].update_one(
        {"_id": key}, {"$set": {"changed": True}}
    ),
    "remove the document": lambda db, name, key: db[name].delete_one({"_id": key}),
}
NOT_AUTHORIZED, NOT_AUTHENTICATED = 13, 18


def login(who: str) -> tuple[DatabaseSettings, str, str]:
    """The settings that tell where the database is, a user, and a password; empty for nobody."""
    app, _, wrong = who.partition("'s ")
    settings = load(APPS.get(app, AuditSettings))
    if who == "a stranger":
        return settings, "stranger", "made-up"
    if who == "a user of another database":
        return settings, OTHER, PASSWORD
    if app not in APPS:
        return settings, "", ""
    right = Path(settings.store_password_file).read_text().splitlines()[0]
    return settings, settings.store_user, "made-up" if wrong else right


def send_couchdb(
    settings: DatabaseSettings, user: str, password: str, method: str, path: str, body: Any = None
) -> tuple[int, Any]:
    address = settings.store_address
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if user:
        text = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {text}"
    if address.tls:
        context = Tls(settings.store_ca_file).context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address.place, timeout=10, context=context
        )
    else:
        connection = http.client.HTTPConnection(address.place, timeout=10)
    sent = None if body is None else json.dumps(body)
    connection.request(method, path, sent, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read() or b"{}")


def ask_couchdb(who: str, what: str, document: str) -> str:
    as_somebody = login(who)
    database = quote(as_somebody[0].store_address.database, safe="")
    words = {"database": database, "document": document, "rev": "1-0"}
    method, path, *body = REQUESTS[what]
    if "{rev}" in path:
        # Who may not see it is refused whatever he names.
        _, seen = send_couchdb(*as_somebody, "GET", f"/{database}/{document}")
        words["rev"] = seen.get("_rev", words["rev"])
    status, _ = send_couchdb(*as_somebody, method, path.format_map(words), *body)
    if status in {401, 403}:
        return "refused"
    return "granted" if status < 300 else f"status {status}"


@contextmanager
def another_user_of_couchdb(admin: str, password: str) -> Iterator[None]:
    as_admin = load(AuditSettings), admin, password
    user = f"/_users/org.couchdb.user:{OTHER}"

    def send(method: str, path: str, body: Any = None) -> Any:
        status, answer = send_couchdb(*as_admin, method, path, body)
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {answer}")
        return answer

    try:
        send("PUT", f"/{OTHER}")
        send("PUT", user, {"type": "user", "name": OTHER, "password": PASSWORD, "roles": []})
        send("PUT", f"/{OTHER}/_security", {"members": {"names": [OTHER]}})
        yield
    finally:
        send("DELETE", f"/{OTHER}")
        send("DELETE", f"{user}?rev={send('GET', user)['_rev']}")


@contextmanager
def mongodb(settings: DatabaseSettings, user: str, password: str, source: str) -> Iterator[Any]:
    from pymongo import MongoClient

    address = settings.store_address
    options: dict[str, Any] = {"tls": address.tls, **address.options}
    if settings.store_ca_file:
        options["tlsCAFile"] = settings.store_ca_file
    if user:
        options |= {"username": user, "password": password, "authSource": source}
    client: Any
    with MongoClient(
        address.place.split(","), serverSelectionTimeoutMS=10_000, **options
    ) as client:
        yield client


def ask_mongodb(who: str, what: str, document: str) -> str:
    from pymongo.errors import OperationFailure

    settings, user, password = login(who)
    address = settings.store_address
    with mongodb(settings, user, password, OTHER if user == OTHER else address.database) as client:
        try:
            COMMANDS[what](client[address.database], address.collection, document)
        except OperationFailure as error:
            if error.code in {NOT_AUTHORIZED, NOT_AUTHENTICATED}:
                return "refused"
            return f"{error.code}: {error}"
    return "granted"


@contextmanager
def another_user_of_mongodb(admin: str, password: str) -> Iterator[None]:
    roles = [{"role": "readWrite", "db": OTHER}]
    with mongodb(load(AuditSettings), admin, password, "admin") as client:
        try:
            client[OTHER].command("createUser", OTHER, pwd=PASSWORD, roles=roles)
            yield
        finally:
            client[OTHER].command("dropUser", OTHER)


STORES = {
    "couchdb": (ask_couchdb, another_user_of_couchdb),
    "mongodb": (ask_mongodb, another_user_of_mongodb),
}


def main(asked: dict[str, Any]) -> None:
    ask, another_user = STORES[asked["store"]]
    with another_user(*asked["admin"]) if "admin" in asked else nullcontext():
        print(json.dumps([ask(who, what, asked["document"]) for who, what in asked["asks"]]))


if __name__ == "__main__":
    main(json.load(sys.stdin))
