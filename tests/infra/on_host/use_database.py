"""Asks the database for things, each as somebody, and prints what came of it.

    stdin   {"document": "made-by-a-test",
             "asks": [["iot-audit", "read documents"], ["nobody", "set rules"]]}
    stdout  ["granted", "refused"]

Who is an app of this host logs in as it does; `iot-audit's wrong password` is one that is made up,
`iot-audit of another database` the right one at a database that is not the user's, `a stranger` a
user that is none. All others do not log in. What is asked for means the same for each database.
"""

import base64
import http.client
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iot_pipeline.access import Tls
from iot_pipeline.settings import AuditSettings, DatabaseSettings, StoreSettings, load

APPS: dict[str, type[DatabaseSettings]] = {"iot-storage": StoreSettings, "iot-audit": AuditSettings}
NEW = "made-by-an-app"

# CouchDB: method, path and body.
REQUESTS: dict[str, tuple[Any, ...]] = {
    "hear whether it is up": ("GET", "/_up"),
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
    app = app.removesuffix(" of another database")
    settings = load(APPS.get(app, AuditSettings))
    if who == "a stranger":
        return settings, "stranger", "made-up"
    if app not in APPS:
        return settings, "", ""
    right = Path(settings.store_password_file).read_text().splitlines()[0]
    return settings, settings.store_user, "made-up" if wrong else right


def ask_couchdb(who: str, what: str, document: str) -> str:
    settings, user, password = login(who)
    address = settings.store_address
    words = {"database": address.database, "document": document, "rev": "1-0"}
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if user:
        text = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {text}"

    def send(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        if address.tls:
            context = Tls(settings.store_ca_file).context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                address.place, timeout=10, context=context
            )
        else:
            connection = http.client.HTTPConnection(address.place, timeout=10)
        sent = None if body is None else json.dumps(body)
        connection.request(method, path.format_map(words), sent, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")

    method, path, *body = REQUESTS[what]
    if "{rev}" in path:
        # Who may not see it is refused whatever he names.
        words["rev"] = send("GET", "/{database}/{document}")[1].get("_rev", words["rev"])
    status, _ = send(method, path, *body)
    if status in {401, 403}:
        return "refused"
    return "granted" if status < 300 else f"status {status}"


def ask_mongodb(who: str, what: str, document: str) -> str:
    from pymongo import MongoClient
    from pymongo.errors import OperationFailure

    settings, user, password = login(who)
    address = settings.store_address
    options: dict[str, Any] = {"tls": address.tls, **address.options}
    if settings.store_ca_file:
        options["tlsCAFile"] = settings.store_ca_file
    if user:
        source = "admin" if who.endswith("of another database") else address.database
        options |= {"username": user, "password": password, "authSource": source}
    client: Any
    with MongoClient(
        address.place.split(","), serverSelectionTimeoutMS=10_000, **options
    ) as client:
        try:
            COMMANDS[what](client[address.database], address.collection, document)
        except OperationFailure as error:
            if error.code in {NOT_AUTHORIZED, NOT_AUTHENTICATED}:
                return "refused"
            return f"{error.code}: {error}"
    return "granted"


def main(asked: dict[str, Any]) -> None:
    store = load(AuditSettings).store_address.scheme
    ask = {"couchdb": ask_couchdb, "mongodb": ask_mongodb}[store]
    print(json.dumps([ask(who, what, asked["document"]) for who, what in asked["asks"]]))


if __name__ == "__main__":
    main(json.load(sys.stdin))
