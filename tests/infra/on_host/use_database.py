"""Sends requests to the database in order, each as somebody, and prints the statuses.

    stdin   {"requests": [["iot-audit", "GET", "/img_db"], ["nobody", "PUT", "/img_db/1", {}]]}
    stdout  [200, 401]

Who is no app of this host sends no password; `iot-audit's wrong password` is one that is made up.
In a path, {rev} is the revision that the last document got.
"""

import base64
import http.client
import json
import sys
from pathlib import Path
from typing import Any

from iot_pipeline.access import Tls
from iot_pipeline.settings import AuditSettings, DatabaseSettings, StoreSettings, load

APPS: dict[str, type[DatabaseSettings]] = {"iot-storage": StoreSettings, "iot-audit": AuditSettings}


def headers(who: str, settings: DatabaseSettings) -> dict[str, str]:
    found = {"Content-Type": "application/json", "Accept": "application/json"}
    app, _, wrong = who.partition("'s ")
    if app in APPS:
        password = (
            "made-up" if wrong else Path(settings.store_password_file).read_text().splitlines()[0]
        )
        login = f"{settings.store_user}:{password}".encode()
        found["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
    return found


def send(who: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    settings = load(APPS.get(who.partition("'s ")[0], AuditSettings))
    address = settings.store_address
    if address.tls:
        context = Tls(settings.store_ca_file).context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address.place, timeout=10, context=context
        )
    else:
        connection = http.client.HTTPConnection(address.place, timeout=10)
    sent = None if body is None else json.dumps(body)
    connection.request(method, path, sent, headers(who, settings))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read() or b"{}")


def main(requests: list[list[Any]]) -> None:
    statuses = []
    revision = ""
    for who, method, path, *body in requests:
        status, answer = send(who, method, path.replace("{rev}", revision), *body)
        statuses.append(status)
        if isinstance(answer, dict):
            revision = answer.get("rev", revision)
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(json.load(sys.stdin)["requests"])
