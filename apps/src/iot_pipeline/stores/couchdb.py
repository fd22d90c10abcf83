"""CouchDB: one database, over HTTP.

It uses what CouchDB 3 and its stand-in in the lab both do alike: `_bulk_docs`, `_all_docs` by keys
and by range, and Basic authentication.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import couchdb
import couchdb.http
import orjson

from iot_pipeline.access import Tls, certificate_problem
from iot_pipeline.errors import InvalidMessage, Reason, SinkUnavailable
from iot_pipeline.schema import Document
from iot_pipeline.service import Log
from iot_pipeline.settings import DatabaseSettings, StoreAddress
from iot_pipeline.stores import UNREADABLE, Outcome, PasswordRefused, ResultT, Store

log = Log("stores")

# Of an answer that tells of a failure; it may have a row for each document.
ERROR_BYTES = 4 * 1024 * 1024
SHOWN_CHARACTERS = 300
# What a validation function refuses a row with, now and ever. A login that is refused answers the
# whole request instead.
REFUSALS = frozenset({"forbidden", "unauthorized"})
# CouchDB 3.4 and later: a user who has failed to log in five times, from one address, is refused
# with this for five minutes since the first time, whatever the password.
# https://docs.couchdb.org/en/stable/config/auth.html: chttpd_auth_lockout
LOCKED = "temporarily locked"
# So a service that goes on trying fails three times in five minutes, and others may too.
REFUSAL_PAUSE_SECONDS = 100.0
# How a server that speaks TLS answers one that does not: with an alert (RFC 8446, section 5.1).
TLS_ALERT = "\x15\x03"
# How the client hears that of a server that does not speak TLS.
NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})


class _Refusal(Exception):
    """The server has answered that it does not do what it was asked for."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.reason = _reason(body)
        super().__init__(f"{status} {self.reason}")


class _Slow(SinkUnavailable):
    """The server was asked, and has not answered in time. It may still do what it was asked for."""


def http_url(address: StoreAddress) -> str:
    """The server's URL as HTTP has it, without the database."""
    return f"{'https' if address.tls else 'http'}://{address.place}"


class _Connection(http.client.HTTPConnection):
    """A connection that tells what is wrong by itself: the library reads no long answers."""

    def connect(self) -> None:
        """Connect. Whoever does not answer that is not slow but away."""
        try:
            super().connect()
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {self.timeout:g} s") from error

    def send(self, data: Any) -> None:
        """Send a part of a request."""
        with self._closed_on_failure():
            super().send(data)

    def getresponse(self) -> http.client.HTTPResponse:
        """The answer, if it is one of success."""
        with self._closed_on_failure():
            response = super().getresponse()
            if response.status < http.HTTPStatus.BAD_REQUEST:
                return response
            raise _Refusal(response.status, response.read(ERROR_BYTES))

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


class _TlsConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS."""


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
            if idle:
                found: http.client.HTTPConnection = idle.pop()
                return found
        connection = (
            _TlsConnection(parts.netloc, timeout=self.timeout, context=self._tls.context())
            if parts.scheme == "https"
            else _Connection(parts.netloc, timeout=self.timeout)
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

    refusal_pause = REFUSAL_PAUSE_SECONDS

    def __init__(self, settings: DatabaseSettings) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            ConfigError: the password file cannot be read.
        """
        super().__init__(settings, "CouchDB")
        # Ours is the only retry: it also keeps the watchdog fed and the group joined.
        session = couchdb.http.Session(timeout=settings.store_timeout)
        session.connection_pool = _Connections(settings)
        # A plus in a path stands for a blank there.
        url = f"{http_url(self._address)}/{quote(self._address.database, safe='')}"
        self._database = couchdb.Database(couchdb.http.Resource(url, session))
        # Documents that the server has time for in one request.
        self._at_once = sys.maxsize

    def close(self) -> None:
        """Give its connections back. It can be used again, with new ones."""
        self._database.resource.session.connection_pool.clear()

    def _write(
        self, documents: Sequence[Document], outcome: Outcome, alive: Callable[[], None]
    ) -> list[str]:
        """Write documents with one request, or with more where that one is refused or too slow.

        See `Store._write`. A request that was given up may still be carried out: its documents then
        meet themselves as conflicts.
        """
        conflicts: list[str] = []
        lots = [list(documents)] if documents else []
        was_slow = False
        while lots:
            lot = lots.pop()
            if len(lot) > self._at_once:
                lots += [lot[self._at_once :], lot[: self._at_once]]
                continue
            alive()
            started = time.monotonic()
            try:
                conflicts += self._write_lot(lot, outcome)
            except InvalidMessage as error:
                # One of them is too large or not as the server wants it, but not which one.
                if len(lot) == 1:
                    outcome.refused[lot[0]["_id"]] = error
                else:
                    half = len(lot) // 2
                    lots += [lot[half:], lot[:half]]
                was_slow = False
            except _Slow as error:
                self._at_once = max(1, len(lot) // 2)
                # One that is slow twice may be hung, and others have to hear of it.
                if was_slow or len(lot) == 1:
                    raise
                log.warning("slow", error=error, documents=len(lot), next=self._at_once)
                lots.append(lot)
                was_slow = True
            else:
                was_slow = False
                took = time.monotonic() - started
                # Twice as many will be well within the time too.
                if len(lot) == self._at_once and took < self._settings.store_timeout / 4:
                    self._at_once *= 2
        return conflicts

    def _write_lot(self, documents: Sequence[Document], outcome: Outcome) -> list[str]:
        """Write documents with one request.

        Returns:
            The ids of those that someone else changed since they were read.

        Raises:
            InvalidMessage: the server refuses the request for what is in it.
            SinkUnavailable: not everything is written.
        """
        rows = self._ask(lambda: self._bulk_docs(documents), may_refuse=True)
        if (
            not isinstance(rows, list)
            or len(rows) != len(documents)
            or not all(isinstance(row, dict) for row in rows)
        ):
            raise SinkUnavailable(f"{self._server}: _bulk_docs did not answer for each document")
        conflicts = []
        for document, row in zip(documents, rows, strict=True):
            identifier = document["_id"]
            problem = row.get("error")
            if not problem:
                outcome.stored[identifier] = document
            elif problem == "conflict":
                conflicts.append(identifier)
            elif problem in REFUSALS:
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
        except _Refusal as error:
            if user and error.status == http.HTTPStatus.UNAUTHORIZED:
                raise PasswordRefused from error
            raise

    def _ask(self, request: Callable[[], ResultT], *, may_refuse: bool = False) -> ResultT:
        """Send a request and turn what may go wrong into what is to be done about it."""
        settings = self._settings
        try:
            return self._with_any_password(lambda: self._send(request))
        except _Refusal as error:
            if may_refuse and error.status in (400, 413):
                raise InvalidMessage(
                    Reason.REFUSED_BY_DATABASE, f"{self._server} refuses the document: {error}"
                ) from error
            raise SinkUnavailable(f"{self._server} {self._why_not(error)}") from error
        except ssl.SSLCertVerificationError as error:
            [(host, _)] = self._address.hosts
            problem = certificate_problem(
                error, host, settings.store_ca_file, "IOT_STORE_CA_FILE", "IOT_STORE_URL"
            )
            raise SinkUnavailable(f"{self._server}: {problem}") from error
        except TimeoutError as error:
            raise _Slow(
                f"{self._server} is slow: no answer within {settings.store_timeout:g} s "
                "(IOT_STORE_TIMEOUT)"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            tls = "on" if self._address.tls else "off"
            raise SinkUnavailable(
                f"{self._server} is not reachable, with TLS {tls}: {_why_away(error)} "
                "(IOT_STORE_URL)"
            ) from error
        except (couchdb.http.HTTPError, *UNREADABLE) as error:
            raise SinkUnavailable(f"{self._server} answers unlike CouchDB: {error}") from error

    def _why_not(self, error: _Refusal) -> str:
        """What the server does not do, and what is to be done about it."""
        user = self._settings.store_user
        if error.status == http.HTTPStatus.UNAUTHORIZED:
            return "wants a user: IOT_STORE_USER and IOT_STORE_PASSWORD_FILE"
        if error.status == http.HTTPStatus.FORBIDDEN:
            if LOCKED in error.reason:
                return (
                    f"has locked user {user!r} for up to 5 minutes, as 5 logins from this host's "
                    "address failed. It goes on by itself; look who tries a wrong password "
                    "(IOT_STORE_PASSWORD_FILE)"
                )
            return (
                f"does not let user {user!r} use database {self.name}: make it a member "
                f"(IOT_STORE_USER); it says: {error.reason}"
            )
        if error.status == http.HTTPStatus.NOT_FOUND:
            return f"has no database {self.name}: create it, or name another in IOT_STORE_URL"
        return f"fails: {error}"


def _why_away(error: OSError | http.client.HTTPException) -> str:
    """Why there is no answer, as far as one can tell."""
    if isinstance(error, http.client.BadStatusLine) and str(error).startswith(TLS_ALERT):
        return "it speaks TLS alone; add ?tls=true"
    if isinstance(error, ssl.SSLError) and error.reason in NO_TLS:
        return f"it does not speak TLS at this port ({error.reason})"
    # The library raises an error's number alone.
    if error.args and isinstance(error.args[0], int) and not getattr(error, "strerror", None):
        return os.strerror(error.args[0])
    return str(error) or type(error).__name__


def _reason(body: bytes) -> str:
    """What an answer says of its failure: an object, a row for each document, or a text."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")[:SHOWN_CHARACTERS]
    rows = answer if isinstance(answer, list) else [answer]
    failed = [row for row in rows if isinstance(row, dict) and "error" in row]
    if not failed:
        return str(answer)[:SHOWN_CHARACTERS]
    text = f"{failed[0]['error']}: {failed[0].get('reason')}"[:SHOWN_CHARACTERS]
    return text if len(failed) == 1 else f"{text} ({len(failed)} documents)"


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        # Others may have added what only the slow way can write, such as integers of over 64 bits.
        return json.dumps(value).encode()
