"""CouchDB: one database, over HTTP.

It uses what CouchDB 3 and its stand-in in the lab both do alike: `_bulk_docs`, `_all_docs` by keys
and by range, and Basic authentication.
"""

from __future__ import annotations

import http.client
import json
import select
import ssl
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import couchdb
import couchdb.http
import orjson

from iot_pipeline.access import Tls, certificate_problem
from iot_pipeline.errors import InvalidMessage, Reason, SinkUnavailable
from iot_pipeline.schema import Document
from iot_pipeline.settings import DatabaseSettings, StoreAddress
from iot_pipeline.stores import UNREADABLE, Outcome, PasswordRefused, ResultT, Store


def http_url(address: StoreAddress) -> str:
    """The server's URL as HTTP has it, without the database."""
    return f"{'https' if address.tls else 'http'}://{address.place}"


class _Connections(couchdb.http.ConnectionPool):  # type: ignore[misc] # it has no types
    """Connections to the server; those over TLS trust the authorities that the settings name."""

    def __init__(self, settings: DatabaseSettings) -> None:
        super().__init__(settings.store_timeout)
        self._tls = Tls(settings.store_ca_file)

    def get(self, url: str) -> http.client.HTTPConnection:
        """An open connection, idle or new. Servers close idle ones after a few seconds."""
        parts = urlsplit(url)
        with self.lock:
            idle = self.conns.get((parts.scheme, parts.netloc), [])
            while idle and _is_closed(idle[-1]):
                idle.pop().close()
            has_idle = bool(idle)
        if parts.scheme != "https" or has_idle:
            found: http.client.HTTPConnection = super().get(url)
            return found
        context = self._tls.context()
        connection = http.client.HTTPSConnection(
            parts.netloc, timeout=self.timeout, context=context
        )
        connection.connect()
        return connection

    def clear(self) -> None:
        """Close idle connections."""
        with self.lock:
            idle = [connection for kept in self.conns.values() for connection in kept]
            self.conns.clear()
        for connection in idle:
            connection.close()


def _is_closed(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed an idle connection: it has nothing else to say on one."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


class CouchStore(Store):
    """One database of one CouchDB server."""

    def __init__(self, settings: DatabaseSettings) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            ConfigError: the password file cannot be read.
        """
        super().__init__(settings, "CouchDB")
        # Ours is the only retry: it also keeps the watchdog fed and the group joined.
        session = couchdb.http.Session(timeout=settings.store_timeout)
        session.connection_pool = _Connections(settings)
        url = f"{http_url(self._address)}/{self._address.database}"
        self._database = couchdb.Database(couchdb.http.Resource(url, session))

    def close(self) -> None:
        """Give its connections back. It can be used again, with new ones."""
        self._database.resource.session.connection_pool.clear()

    def _write(self, documents: Sequence[Document], outcome: Outcome) -> list[str]:
        """Write documents with one request.

        Returns:
            The ids of those that someone else changed since they were read.
        """
        if not documents:
            return []
        try:
            rows = self._ask(lambda: self._bulk_docs(documents), may_refuse=True)
        except InvalidMessage as error:
            # One of them is too large or not as the server wants it, but not which one.
            if len(documents) == 1:
                outcome.refused[documents[0]["_id"]] = error
                return []
            half = len(documents) // 2
            return self._write(documents[:half], outcome) + self._write(documents[half:], outcome)
        if not isinstance(rows, list) or len(rows) != len(documents):
            raise SinkUnavailable(f"{self._server}: _bulk_docs did not answer for each document")
        conflicts = []
        for document, row in zip(documents, rows, strict=True):
            identifier = document["_id"]
            problem = row.get("error")
            if not problem:
                outcome.stored[identifier] = document
            elif problem == "conflict":
                conflicts.append(identifier)
            elif problem == "forbidden":
                outcome.refused[identifier] = InvalidMessage(
                    Reason.REFUSED_BY_DATABASE, f"{self._server}: {problem}: {row.get('reason')}"
                )
            else:
                raise SinkUnavailable(f"{self._server}: {problem}: {row.get('reason')}")
        return conflicts

    def _bulk_docs(self, documents: Sequence[Document]) -> Any:
        # Not `Database.update`, which keeps a row's reason but not its error.
        _status, _headers, answer = self._database.resource.post(
            "_bulk_docs", _json({"docs": documents}), {"Content-Type": "application/json"}
        )
        return orjson.loads(answer.read())

    def read(self, identifiers: Sequence[str]) -> dict[str, Document]:
        """The documents with these ids, by id; those that do not exist are left out.

        Raises:
            SinkUnavailable: the database does not answer.
        """
        rows = self._rows(keys=list(identifiers), include_docs=True)
        return {row["doc"]["_id"]: row["doc"] for row in rows if row.get("doc")}

    def _page(self, start: str, limit: int) -> tuple[list[Document], str | None]:
        rows = self._rows(startkey=start, limit=limit, include_docs=True)
        documents = [row["doc"] for row in rows if row.get("doc")]
        # Design documents are programs of the database.
        page = [document for document in documents if not document["_id"].startswith("_")]
        return page, rows[-1]["id"] if len(rows) == limit else None

    def _rows(self, **options: Any) -> list[dict[str, Any]]:
        return self._ask(lambda: list(self._database.view("_all_docs", **options).rows))

    def _send(self, request: Callable[[], ResultT]) -> ResultT:
        """Send a request with the password whose turn it is."""
        user = self._settings.store_user
        self._database.resource.credentials = (user, self._password) if user else None
        try:
            return request()
        except couchdb.http.Unauthorized as error:
            raise PasswordRefused from error

    def _ask(self, request: Callable[[], ResultT], *, may_refuse: bool = False) -> ResultT:
        """Send a request and turn what may go wrong into what is to be done about it."""
        settings = self._settings
        try:
            return self._with_any_password(lambda: self._send(request))
        except couchdb.http.Forbidden as error:
            raise SinkUnavailable(
                f"{self._server}: user {settings.store_user!r} may not use database "
                f"{self.name}: make it a member (IOT_STORE_USER)"
            ) from error
        except couchdb.http.ResourceNotFound as error:
            raise SinkUnavailable(
                f"{self._server} has no database {self.name}: create it, or name another in "
                "IOT_STORE_URL"
            ) from error
        except couchdb.http.ServerError as error:
            status = error.args[0][0] if error.args and isinstance(error.args[0], tuple) else 0
            if may_refuse and status in (400, 413):
                raise InvalidMessage(
                    Reason.REFUSED_BY_DATABASE, f"{self._server} refuses the document: {error}"
                ) from error
            raise SinkUnavailable(f"{self._server} fails: {error}") from error
        except ssl.SSLCertVerificationError as error:
            [(host, _)] = self._address.hosts
            problem = certificate_problem(
                error, host, settings.store_ca_file, "IOT_STORE_CA_FILE", "IOT_STORE_URL"
            )
            raise SinkUnavailable(f"{self._server}: {problem}") from error
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
            raise SinkUnavailable(
                f"{self._server} is not reachable: {problem} (IOT_STORE_URL)"
            ) from error
        except (couchdb.http.HTTPError, *UNREADABLE) as error:
            raise SinkUnavailable(f"{self._server} answers unlike CouchDB: {error}") from error


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        # Others may have added what only the slow way can write, such as integers of over 64 bits.
        return json.dumps(value).encode()
