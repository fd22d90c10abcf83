"""Makes, reads and removes the benchmark's databases.

Runs on the database's host as root, whose file of credentials it reads. Takes what to do as JSON
from standard input and prints JSON.
"""

import base64
import http.client
import json
import netrc
import ssl
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import urlencode, urlsplit

NETRC = "/root/.netrc-couchdb"
PREFIX = "iot_bench_"
PAGE = 1000  # documents


class Server:
    """The database server, as its admin."""

    def __init__(self, url: str, ca_file: str) -> None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        found = netrc.netrc(NETRC).authenticators(host)
        if found is None:
            raise KeyError(f"{NETRC} does not name {host}")
        credentials = f"{found[0]}:{found[2]}".encode()
        self._headers = {
            "Authorization": "Basic " + base64.b64encode(credentials).decode(),
            "Accept": "application/json",
            "Content-Type": "application/json",
        }
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=ca_file or None)
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=60, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, parts.port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        text = None if body is None else json.dumps(body)
        self._connection.request(method, path, text, self._headers)
        answer = self._connection.getresponse()
        content = json.loads(answer.read() or b"null")
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {content}")
        return content

    def documents(self, name: str) -> Iterator[dict[str, Any]]:
        options: dict[str, Any] = {"include_docs": "true", "limit": PAGE}
        while True:
            rows = self.ask("GET", f"/{name}/_all_docs?{urlencode(options)}")["rows"]
            yield from (row["doc"] for row in rows)
            if len(rows) < PAGE:
                return
            options |= {"startkey": json.dumps(rows[-1]["id"]), "skip": 1}


def create(server: Server, name: str, member: str) -> None:
    server.ask("PUT", f"/{name}")
    admins = {"names": [], "roles": ["_admin"]}
    members = {"names": [member], "roles": ["_admin"]}
    server.ask("PUT", f"/{name}/_security", {"admins": admins, "members": members})


def remove(server: Server) -> None:
    for name in server.ask("GET", "/_all_dbs"):
        if name.startswith(PREFIX):
            server.ask("DELETE", f"/{name}")


def latencies(server: Server, name: str) -> dict[str, list[float]]:
    """Milliseconds from produced to stored with its prediction, by the images' source."""
    found: dict[str, list[float]] = {}
    for document in server.documents(name):
        if "StoredAt" in document:
            produced, stored = (
                datetime.fromisoformat(document[key]) for key in ("ProducedAt", "StoredAt")
            )
            milliseconds = (stored - produced).total_seconds() * 1000
            found.setdefault(document["Source"], []).append(milliseconds)
    return found


def main() -> None:
    request = json.load(sys.stdin)
    server = Server(request["url"], request["ca_file"])
    name = request.get("name", PREFIX)
    if not name.startswith(PREFIX):
        raise ValueError(f"{name} is not the benchmark's")
    answer: Any = None
    if request["action"] == "create":
        create(server, name, request["member"])
    elif request["action"] == "remove":
        remove(server)
    elif request["action"] == "complete":
        answer = sum("StoredAt" in document for document in server.documents(name))
    elif request["action"] == "latencies":
        answer = latencies(server, name)
    elif request["action"] == "version":
        answer = server.ask("GET", "/")
    else:
        raise ValueError(request["action"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
