"""The database: documents merged into CouchDB and read back.

It uses what CouchDB 3 and its stand-in in the lab both do alike: `_bulk_docs`, `_all_docs` by keys
and by range, and Basic authentication.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import ssl
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import couchdb
import couchdb.http
import orjson

from iot_pipeline.access import Tls, certificate_problem
from iot_pipeline.errors import ConfigError, InvalidMessage, Reason, SinkUnavailable
from iot_pipeline.passwords import PasswordFile
from iot_pipeline.schema import (
    STORED_AT,
    Document,
    format_time,
    is_complete,
    merge,
    now,
)
from iot_pipeline.service import Log
from iot_pipeline.settings import CouchSettings

log = Log("couch")

# Documents asked for at once: enough to make requests rare, few enough to hold in memory when every
# image is a photograph.
READ_DOCUMENTS = 250
WRITE_BYTES = 8 * 1024 * 1024
PAGE_BYTES = 8 * 1024 * 1024
FIRST_PAGE_DOCUMENTS = 20
LARGEST_PAGE_DOCUMENTS = 2000

# Someone else changes a document between our reading and our writing it. More than a few times in a
# row is no coincidence.
CONFLICT_ROUNDS = 8

# What the client raises over an answer that is not CouchDB's, for instance a proxy's page.
_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError)

ResultT = TypeVar("ResultT")


@dataclass
class Outcome:
    """What became of documents that were to be merged in."""

    stored: dict[str, Document] = field(default_factory=dict)
    """Documents as they stand in the database now, by id."""
    refused: dict[str, InvalidMessage] = field(default_factory=dict)
    """Documents the database will never take, by id."""


class _Connections(couchdb.http.ConnectionPool):  # type: ignore[misc] # it has no types
    """Connections to the server; those over TLS trust the authorities that the settings name."""

    def __init__(self, settings: CouchSettings) -> None:
        super().__init__(settings.couchdb_timeout)
        self._tls = Tls(settings.couchdb_ca_file)

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


def _is_closed(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed an idle connection: it has nothing else to say on one."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


class CouchDatabase:
    """One database of one CouchDB server."""

    def __init__(self, settings: CouchSettings) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            ConfigError: the password file cannot be read.
        """
        self._settings = settings
        self._name = f"CouchDB at {settings.couchdb_url}"
        # Ours is the only retry: it also keeps the watchdog fed and the group joined.
        session = couchdb.http.Session(timeout=settings.couchdb_timeout)
        session.connection_pool = _Connections(settings)
        url = f"{settings.couchdb_url.rstrip('/')}/{settings.couchdb_database}"
        self._database = couchdb.Database(couchdb.http.Resource(url, session))
        self._passwords = PasswordFile(settings.couchdb_password_file)
        self._read_credentials()

    def _read_credentials(self) -> None:
        """Take the password whose turn it is."""
        if not self._settings.couchdb_user:
            return
        try:
            _, password = self._passwords.choose()
        except (OSError, ValueError) as error:
            raise ConfigError(f"IOT_COUCHDB_PASSWORD_FILE: {error}") from error
        self._database.resource.credentials = (self._settings.couchdb_user, password)

    def merge_in(self, documents: Mapping[str, Document], alive: Callable[[], None]) -> Outcome:
        """Merge documents into what the database holds, and write what that changes.

        Doing it again, or in another order, ends in the same documents (see `schema.merge`).

        Args:
            documents: documents by id.
            alive: called between requests, to feed the watchdog.

        Raises:
            SinkUnavailable: not everything is written; merge the same documents in again.
        """
        outcome = Outcome()
        waiting = dict(documents)
        # An image is nearly always the first that is heard of its id. It is written without a look
        # at what is there, and a conflict tells when something is.
        new = {name for name, state in documents.items() if "Data" in state}
        for _ in range(CONFLICT_ROUNDS):
            changed = self._changed(waiting, new, outcome, alive)
            new, waiting = set(), {}
            for chunk in chunks(changed):
                alive()
                for identifier in self._write(chunk, outcome):
                    waiting[identifier] = documents[identifier]
            if not waiting:
                return outcome
            log.debug("conflicts", documents=len(waiting))
        raise SinkUnavailable(
            f"{self._name}: {len(waiting)} documents were changed by others each time"
        )

    def _changed(
        self,
        waiting: Mapping[str, Document],
        new: Collection[str],
        outcome: Outcome,
        alive: Callable[[], None],
    ) -> list[Document]:
        """The documents that have to be written, in the order of their ids."""
        existing: dict[str, Document] = {}
        identifiers = sorted(waiting)
        known = [identifier for identifier in identifiers if identifier not in new]
        for start in range(0, len(known), READ_DOCUMENTS):
            alive()
            existing |= self.read(known[start : start + READ_DOCUMENTS])
        changed = []
        stored_at = format_time(now())
        for identifier in identifiers:
            before, state = existing.get(identifier), waiting[identifier]
            after = dict(state) if before is None else merge(before, state)
            if is_complete(after):
                after.setdefault(STORED_AT, stored_at)
            if before is not None:
                after["_rev"] = before["_rev"]
            if after == before:
                outcome.stored[identifier] = after
            else:
                changed.append(after)
        return changed

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
            raise SinkUnavailable(f"{self._name}: _bulk_docs did not answer for each document")
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
                    Reason.REFUSED_BY_DATABASE, f"{self._name}: {problem}: {row.get('reason')}"
                )
            else:
                raise SinkUnavailable(f"{self._name}: {problem}: {row.get('reason')}")
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

    def scan(self, first: str = "") -> Iterator[Document]:
        """All documents from an id on, in the order of ids, without design documents.

        Pages are as large as their documents allow, so that photographs fit into memory too.

        Raises:
            SinkUnavailable: the database does not answer.
        """
        limit = FIRST_PAGE_DOCUMENTS
        last: str | None = None
        while True:
            start = first if last is None else last
            # One more than the page: the last one seen comes first again, unless it is gone.
            rows = self._rows(startkey=start, limit=limit + 1, include_docs=True)
            fresh = [row["doc"] for row in rows if row["id"] != last and row.get("doc")]
            yield from (document for document in fresh if not document["_id"].startswith("_"))
            if len(rows) <= limit:
                return
            last = rows[-1]["id"]
            size = sum(_size(document) for document in fresh) // max(1, len(fresh))
            limit = max(1, min(LARGEST_PAGE_DOCUMENTS, PAGE_BYTES // size))

    def _rows(self, **options: Any) -> list[dict[str, Any]]:
        return self._ask(lambda: list(self._database.view("_all_docs", **options).rows))

    def _with_any_password(self, request: Callable[[], ResultT]) -> ResultT:
        """Send a request with each password that the file has by now, until one is taken."""
        refused = set()
        while True:
            try:
                return request()
            except couchdb.http.Unauthorized:
                refused.add(self._database.resource.credentials)
                if not self._find_password_not_in(refused):
                    raise

    def _find_password_not_in(self, refused: Collection[tuple[str, str] | None]) -> bool:
        with contextlib.suppress(ConfigError, OSError, ValueError):
            for _ in self._passwords.read():
                self._read_credentials()
                if self._database.resource.credentials not in refused:
                    return True
        return False

    def _ask(self, request: Callable[[], ResultT], *, may_refuse: bool = False) -> ResultT:
        """Send a request and turn what may go wrong into what is to be done about it."""
        settings = self._settings
        try:
            return self._with_any_password(request)
        except couchdb.http.Unauthorized as error:
            raise SinkUnavailable(
                f"{self._name} refuses user {settings.couchdb_user!r}: check IOT_COUCHDB_USER and "
                "IOT_COUCHDB_PASSWORD_FILE"
            ) from error
        except couchdb.http.Forbidden as error:
            raise SinkUnavailable(
                f"{self._name}: user {settings.couchdb_user!r} may not use database "
                f"{settings.couchdb_database}: make it a member (IOT_COUCHDB_USER)"
            ) from error
        except couchdb.http.ResourceNotFound as error:
            raise SinkUnavailable(
                f"{self._name} has no database {settings.couchdb_database}: create it, or set "
                "IOT_COUCHDB_DATABASE"
            ) from error
        except couchdb.http.ServerError as error:
            status = error.args[0][0] if error.args and isinstance(error.args[0], tuple) else 0
            if may_refuse and status in (400, 413):
                raise InvalidMessage(
                    Reason.REFUSED_BY_DATABASE, f"{self._name} refuses the document: {error}"
                ) from error
            raise SinkUnavailable(f"{self._name} fails: {error}") from error
        except ssl.SSLCertVerificationError as error:
            host = urlsplit(settings.couchdb_url).hostname or ""
            problem = certificate_problem(
                error, host, settings.couchdb_ca_file, "IOT_COUCHDB_CA_FILE", "IOT_COUCHDB_URL"
            )
            raise SinkUnavailable(f"{self._name}: {problem}") from error
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
            raise SinkUnavailable(
                f"{self._name} is not reachable: {problem} (IOT_COUCHDB_URL)"
            ) from error
        except (couchdb.http.HTTPError, *_UNREADABLE) as error:
            raise SinkUnavailable(f"{self._name} answers unlike CouchDB: {error}") from error


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        # Others may have added what only the slow way can write, such as integers of over 64 bits.
        return json.dumps(value).encode()


def _size(document: Document) -> int:
    return 500 + len(document.get("Data", ""))


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lots that fit into memory and into a request."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        if chunk and size + _size(document) > WRITE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(document)
        size += _size(document)
    if chunk:
        yield chunk
