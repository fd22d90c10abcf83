"""Ansible module: tell how a host is: its services, disks, certificates, and what it can reach."""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
import socket
import ssl
import struct
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: health_host
short_description: Tell how a host is
description:
  - Looks at services, disks and certificates, and whether what the host needs answers it. All waits
    go on at the same time, each for C(timeout) seconds at most.
  - Judges nothing, changes nothing, and needs nothing but the system's Python and openssl.
options:
  services:
    description: Ports on loopback at which services show their metrics, by the unit's name; 0 for a
      service that shows none.
    type: dict
    default: {}
  folders:
    description: Folders whose file systems to look at. What is missing is passed over.
    type: list
    elements: path
    default: []
  certificates:
    description: PEM files. What is missing is passed over.
    type: list
    elements: path
    default: []
  servers:
    description: What this host needs to reach, as C(host:port).
    type: list
    elements: str
    default: []
  database_url:
    description: URL of the database that this host has, C(couchdb://HOST:PORT/DATABASE) or
      C(mongodb://HOST:PORT/DATABASE.COLLECTION), with C(?tls=true) where it speaks TLS. Empty where
      it has none.
    type: str
    default: ""
  database_netrc:
    description: File with CouchDB's user and password.
    type: path
    default: ""
  database_ca:
    description: PEM file of the authorities that may have signed the database's certificate. Empty
      for the host's own.
    type: path
    default: ""
  audit_record:
    description: File in which C(iot-pipeline audit) leaves its last result. Empty for none.
    type: path
    default: ""
  dead_letters_command:
    description: Program and arguments that print a line for each open dead letter. Empty for none.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait for an answer; that program may take thrice as long.
    type: int
    default: 2
"""

EXAMPLES = """
- name: Look at the host
  health_host:
    services:
      iot-storage.service: 9103
    folders: [/var/lib/iot-pipeline]
"""

RETURN = """
services:
  description: Each with C(unit), C(state) as systemd tells it, C(seconds) since then, C(restarts),
    C(problem) where it runs and does not answer, and C(metrics), some of its figures.
  type: list
disks:
  description: File systems, each with C(folder), C(size) and C(free) in bytes, C(used_percent) and
    C(inodes_used_percent).
  type: list
certificates:
  description: Each with C(file), C(subject), C(not_after) and C(days) left, below 0 for one that
    has expired; of a file with several the one that ends first.
  type: list
unreached:
  description: What keeps the servers that do not answer from it, by C(host:port).
  type: dict
database:
  description: C(url), and the C(problem) with it; empty where it answers. Null without a URL.
  type: dict
audit:
  description: What the last audit has left. Null without audit_record, empty where there is none.
  type: dict
dead_letters:
  description: Number of open dead letters. Null where it could not be found out in time, and
    missing without dead_letters_command.
  type: int
clock:
  description: The least and the most by which this host's clock may be ahead of the control host's,
    C(least) and C(most) in seconds, from how long asking took.
  type: dict
"""

PROPERTIES = ("Id", "ActiveState", "SubState", "StateChangeTimestampMonotonic", "NRestarts")
# Those that tell of an outage, of all that a service shows.
METRICS = ("iot_sink_up", "iot_oldest_unhandled_seconds")
METRIC = re.compile(rf"^({'|'.join(METRICS)}) (\S+)$", re.MULTILINE)
# MongoDB's wire protocol: an OP_MSG with one document, {ping: 1, $db: "admin"} in BSON. Its answer
# has a field `ok`, of 1.0.
DOCUMENT = b"\x10ping\0" + struct.pack("<i", 1) + b"\x02$db\0" + struct.pack("<i", 6) + b"admin\0"
MESSAGE = bytes(5) + struct.pack("<i", len(DOCUMENT) + 5) + DOCUMENT + b"\0"
PING = struct.pack("<iiii", len(MESSAGE) + 16, 1, 0, 2013) + MESSAGE
MONGODB_OK = b"\x01ok\0" + struct.pack("<d", 1)
PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def ask_systemd(units: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tell how systemd sees the units."""
    if not units:
        return []
    done = subprocess.run(
        ["systemctl", "show", f"--property={','.join(PROPERTIES)}", *units],
        check=True,
        capture_output=True,
        text=True,
    )
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    return [
        service(dict(line.split("=", 1) for line in block.splitlines()), now)
        for block in done.stdout.strip().split("\n\n")
    ]


def service(properties: Mapping[str, str], now: float) -> dict[str, Any]:
    """Return a unit as a result shows it; `now` is in seconds of the monotonic clock."""
    state, detail = properties["ActiveState"], properties["SubState"]
    changed = int(properties["StateChangeTimestampMonotonic"]) / 1e6
    return {
        "unit": properties["Id"],
        "state": state if state == "active" else f"{state} ({detail})",
        "seconds": round(now - changed) if changed else None,
        "restarts": int(properties["NRestarts"]),
        "problem": "",
        "metrics": {},
    }


def ask_metrics(port: int, timeout: float) -> dict[str, Any]:
    """Tell what a service shows, or what is wrong."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=timeout) as answer:
            text = answer.read().decode()
    except OSError as error:
        return {"problem": f"no answer at 127.0.0.1:{port} ({explain(error)})"}
    return {"metrics": {name: float(value) for name, value in METRIC.findall(text)}}


def explain(error: OSError) -> str:
    """Say why there is no answer."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "timed out"
    return getattr(reason, "strerror", "") or str(reason)


def disk(folder: str) -> dict[str, Any]:
    """Tell how full a file system is, as users other than root see it."""
    found = os.statvfs(folder)
    used = found.f_blocks - found.f_bfree
    return {
        "folder": folder,
        "size": found.f_blocks * found.f_frsize,
        "free": found.f_bavail * found.f_frsize,
        "used_percent": percent(used, used + found.f_bavail),
        "inodes_used_percent": percent(found.f_files - found.f_ffree, found.f_files),
    }


def percent(part: int, whole: int) -> float:
    """Return a share; of nothing it is none."""
    return round(100 * part / whole, 1) if whole else 0.0


def disks(folders: list[str]) -> list[dict[str, Any]]:
    """Tell of each file system once, by the first of the folders on it."""
    first: dict[int, str] = {}
    for folder in folders:
        if Path(folder).exists():
            first.setdefault(Path(folder).stat().st_dev, folder)
    return [disk(folder) for folder in first.values()]


def certificate(file: str, now: datetime) -> dict[str, Any]:
    """Tell when the first certificate of a file ends that ends."""
    try:
        found = [ending(pem, now) for pem in PEM.findall(Path(file).read_text())]
    except subprocess.CalledProcessError:
        found = []
    if not found:
        return {"file": file, "subject": "", "not_after": "", "days": None}
    return {"file": file, **min(found, key=lambda each: float(each["days"]))}


def ending(pem: str, now: datetime) -> dict[str, Any]:
    """Tell when a certificate ends."""
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-subject", "-dateopt", "iso_8601"],
        input=pem,
        check=True,
        capture_output=True,
        text=True,
    )
    values = dict(line.split("=", 1) for line in done.stdout.splitlines())
    end = datetime.fromisoformat(values["notAfter"])
    return {
        "subject": values["subject"],
        "not_after": f"{end:%Y-%m-%dT%H:%M:%SZ}",
        "days": round((end - now).total_seconds() / 86400, 1),
    }


def knock(server: str, timeout: float) -> str:
    """Tell what keeps a server from answering; nothing is sent to it."""
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError as error:
        return explain(error)
    return ""


def ask_database(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Tell whether the database answers: CouchDB as an operator asks, MongoDB as anybody may."""
    url, timeout = parameters["database_url"], parameters["timeout"]
    if not url:
        return None
    parts = urlsplit(url)
    try:
        context = (
            ssl.create_default_context(cafile=parameters["database_ca"] or None)
            if parse_qs(parts.query).get("tls") == ["true"]
            else None
        )
        if parts.scheme == "mongodb":
            ask_mongodb(parts, context, timeout)
        else:
            ask_couchdb(parts, context, timeout, parameters["database_netrc"])
    except OSError as error:
        return {"url": url, "problem": explain(error)}
    except (netrc.NetrcParseError, ValueError) as error:
        return {"url": url, "problem": str(error)}
    return {"url": url, "problem": ""}


def ask_couchdb(
    parts: SplitResult, context: ssl.SSLContext | None, timeout: float, file: str
) -> None:
    """Ask for the database. Raises OSError and NetrcParseError."""
    login = netrc.netrc(file).authenticators(parts.hostname or "")
    user, _, password = login or ("", "", "")
    word = base64.b64encode(f"{user}:{password}".encode()).decode()
    scheme, port = ("https", 6984) if context else ("http", 5984)
    server = parts.netloc if parts.port else f"{parts.netloc}:{port}"
    request = urllib.request.Request(  # noqa: S310 - one of these two
        f"{scheme}://{server}{parts.path}", headers={"Authorization": f"Basic {word}"}
    )
    urllib.request.urlopen(request, timeout=timeout, context=context).close()  # noqa: S310


def ask_mongodb(parts: SplitResult, context: ssl.SSLContext | None, timeout: float) -> None:
    """Send a `ping`, which needs no user. Raises OSError and ValueError."""
    host = parts.hostname or ""
    with socket.create_connection((host, parts.port or 27017), timeout) as plain:
        connection = context.wrap_socket(plain, server_hostname=host) if context else plain
        with connection, connection.makefile("rb") as stream:
            connection.sendall(PING)
            head = stream.read(4)
            if len(head) < 4:
                raise ValueError("it closes the connection")
            answer = stream.read(min(struct.unpack("<i", head)[0] - 4, 65536))
    if MONGODB_OK not in answer:
        raise ValueError("it answers, and says that it is not well")


def last_audit(file: str) -> dict[str, Any] | None:
    """Return what the last audit has left."""
    if not file:
        return None
    try:
        found: dict[str, Any] = json.loads(Path(file).read_text())
    except (OSError, ValueError):
        return {}
    return found


def count_lines(command: list[str], timeout: float) -> int | None:
    """Return how many lines a program prints, or None where it does not end well."""
    if not command:
        return None
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.count(b"\n")


def look(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the module's result. Raises CalledProcessError and OSError where tools are missing."""
    timeout, wanted = parameters["timeout"], parameters["services"]
    ports = {unit: int(port) for unit, port in wanted.items() if int(port)}
    servers = parameters["servers"]
    now = datetime.now(UTC)
    with ThreadPoolExecutor(max_workers=32) as pool:
        asked = pool.submit(ask_database, parameters)
        letters = pool.submit(count_lines, parameters["dead_letters_command"], 3 * timeout)
        knocks = pool.map(partial(knock, timeout=timeout), servers)
        shown = dict(
            zip(ports, pool.map(partial(ask_metrics, timeout=timeout), ports.values()), strict=True)
        )
        services = ask_systemd(wanted)
        for each in services:
            if each["state"] == "active":
                each.update(shown.get(each["unit"], {}))
        return {
            "services": services,
            "disks": disks(parameters["folders"]),
            "certificates": [
                certificate(file, now) for file in parameters["certificates"] if Path(file).exists()
            ],
            "unreached": {
                server: problem for server, problem in zip(servers, knocks, strict=True) if problem
            },
            "database": asked.result(),
            "audit": last_audit(parameters["audit_record"]),
            **({"dead_letters": letters.result()} if parameters["dead_letters_command"] else {}),
        }


def main() -> None:
    """Run as an Ansible module."""
    began = time.time()
    module = AnsibleModule(
        argument_spec={
            "services": {"type": "dict", "default": {}},
            "folders": {"type": "list", "elements": "path", "default": []},
            "certificates": {"type": "list", "elements": "path", "default": []},
            "servers": {"type": "list", "elements": "str", "default": []},
            "database_url": {"type": "str", "default": ""},
            "database_netrc": {"type": "path", "default": ""},
            "database_ca": {"type": "path", "default": ""},
            "audit_record": {"type": "path", "default": ""},
            "dead_letters_command": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 2},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **look(module.params), began=began, ended=time.time())


if __name__ == "__main__":
    main()
