"""Knocks at ports and prints which questions each answers to who comes like that.

    stdin   {"doors": [{"address": "192.0.2.12", "port": 9092, "speaks": "kafka"}],
             "tls": true, "identity": "PEM of a certificate and its key", "topic": "iot-topic"}
    stdout  [{"up": true, "use": false}]

`identity` may also name two files of the host, or be empty.

`up` asks whether there is a server, `use` for the names of topics or databases. The server's own
certificate is taken as it is: here the server has to doubt. Python's own libraries are enough, so
that it runs on every host.
"""

import json
import os
import socket
import ssl
import struct
import sys
import tempfile
from typing import Any

REQUEST = 4711


def kafka(connection: socket.socket, body: bytes) -> bytes:
    connection.sendall(struct.pack(">i", len(body)) + body)
    with connection.makefile("rb") as stream:
        (size,) = struct.unpack(">i", stream.read(4))
        answer = stream.read(size)
    return answer if answer[:4] == struct.pack(">i", REQUEST) else b""


def http(connection: socket.socket, path: str) -> bytes:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: db\r\nConnection: close\r\n\r\n".encode())
    with connection.makefile("rb") as stream:
        answer = stream.read()
    return answer if answer.split(b" ", 2)[:2] == [b"HTTP/1.1", b"200"] else b""


def mongodb(connection: socket.socket, command: bytes) -> bool:
    """Whether it does a command of the database `admin`: an OP_MSG with one document, in BSON."""
    fields = (
        b"\x10" + command + struct.pack("<xi", 1) + b"\x02$db\0" + struct.pack("<i", 6) + b"admin\0"
    )
    message = bytes(5) + struct.pack("<i", len(fields) + 5) + fields + b"\0"
    connection.sendall(struct.pack("<iiii", len(message) + 16, REQUEST, 0, 2013) + message)
    with connection.makefile("rb") as stream:
        (size,) = struct.unpack("<i", stream.read(4))
        return b"\x01ok\0" + struct.pack("<d", 1) in stream.read(size - 4)


def ask(connection: socket.socket, speaks: str, question: str, topic: str) -> bool:
    if speaks == "http":
        return bool(http(connection, {"up": "/_up", "use": "/_all_dbs"}[question]))
    if speaks == "mongodb":
        return mongodb(connection, {"up": b"ping", "use": b"listDatabases"}[question])
    if question == "up":  # ApiVersions
        return bool(kafka(connection, struct.pack(">hhih", 18, 0, REQUEST, -1)))
    # Metadata of all topics: one sees those with which one has any business.
    return topic.encode() in kafka(connection, struct.pack(">hhihi", 3, 1, REQUEST, -1, -1))


def context(identity: str | list[str]) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if isinstance(identity, list):
        made.load_cert_chain(*identity)
    elif identity:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "identity.pem")  # noqa: PTH118 as short as it gets
            with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:  # noqa: PTH123
                file.write(identity)
            made.load_cert_chain(path)
    return made


def knock(asked: dict[str, Any], door: dict[str, Any], question: str) -> bool:
    try:
        with socket.create_connection((door["address"], door["port"]), 5) as plain:
            if not asked["tls"]:
                return ask(plain, door["speaks"], question, asked["topic"])
            with context(asked["identity"]).wrap_socket(plain) as encrypted:
                return ask(encrypted, door["speaks"], question, asked["topic"])
    except (OSError, struct.error):
        # It closes the connection, or says what is none of its protocol.
        return False


def main(asked: dict[str, Any]) -> None:
    answers = [
        {question: knock(asked, door, question) for question in ("up", "use")}
        for door in asked["doors"]
    ]
    print(json.dumps(answers))


if __name__ == "__main__":
    main(json.load(sys.stdin))
