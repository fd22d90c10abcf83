"""The database: documents merged into it and read back, whichever server keeps them.

`open_store` gives the store that a URL names. Each has a module of its own here, and all merge
alike: read what is there, merge, and write it on condition that nobody else has changed it
meanwhile. A document's field `_rev` stands for the state that was read. It is the server's own in
CouchDB and ours in MongoDB, and no part of the image's document anywhere; see `schema.content`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

from iot_pipeline.errors import ConfigError, InvalidMessage, SinkUnavailable
from iot_pipeline.passwords import PasswordFile
from iot_pipeline.schema import (
    REVISION,
    STORED_AT,
    Document,
    format_time,
    is_complete,
    merge,
    now,
)
from iot_pipeline.service import Log
from iot_pipeline.settings import DatabaseSettings

log = Log("stores")

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

# What a client raises over an answer that is not its server's, for instance a proxy's page.
UNREADABLE = (AttributeError, LookupError, TypeError, ValueError)

ResultT = TypeVar("ResultT")


@dataclass
class Outcome:
    """What became of documents that were to be merged in."""

    stored: dict[str, Document] = field(default_factory=dict)
    """Documents as they stand in the database now, by id."""
    refused: dict[str, InvalidMessage] = field(default_factory=dict)
    """Documents the database will never take, by id."""


class PasswordRefused(Exception):
    """The server does not let us in with this password. Another in the file may do."""


def open_store(settings: DatabaseSettings) -> Store:
    """The store that IOT_STORE_URL names. Nothing is sent yet. Close it, or use it in a `with`.

    Raises:
        ConfigError: a setting cannot be used, or the password file cannot be read.
    """
    if settings.store_address.scheme == "mongodb":
        from iot_pipeline.stores.mongodb import MongoStore

        return MongoStore(settings)
    from iot_pipeline.stores.couchdb import CouchStore

    return CouchStore(settings)


class Store(ABC):
    """One database, or collection, of one server or cluster. For one thread at a time."""

    refusal_pause = 0.0
    """Seconds from one login with a password that was refused to the next: servers may lock out who
    fails often."""

    def __init__(self, settings: DatabaseSettings, product: str) -> None:
        """Prepare; nothing is sent yet.

        Args:
            settings: where it is and who we are.
            product: what messages call the server.

        Raises:
            ConfigError: the password file cannot be read.
        """
        self._settings = settings
        self._address = settings.store_address
        self._server = f"{product} at {self._address.place}"
        self._passwords = PasswordFile(settings.store_password_file)
        self._password = ""
        # The one that was taken last, and when others were refused.
        self._accepted: str | None = None
        self._refused: dict[str, float] = {}
        if settings.store_user:
            try:
                self._password = self._passwords.read()[0]
            except (OSError, ValueError) as error:
                raise ConfigError(f"IOT_STORE_PASSWORD_FILE: {error}") from error

    @property
    def name(self) -> str:
        """What logs, metrics and backups call it."""
        return self._address.name

    @abstractmethod
    def close(self) -> None:
        """Give its connections back. It can be used again, with new ones."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
                for identifier in self._write(chunk, outcome, alive):
                    waiting[identifier] = documents[identifier]
            if not waiting:
                return outcome
            log.debug("conflicts", documents=len(waiting))
        raise SinkUnavailable(
            f"{self._server}: {len(waiting)} documents were changed by others each time"
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
                after[REVISION] = before[REVISION]
            if after == before:
                outcome.stored[identifier] = after
            else:
                changed.append(after)
        return changed

    @abstractmethod
    def _write(
        self, documents: Sequence[Document], outcome: Outcome, alive: Callable[[], None]
    ) -> list[str]:
        """Write documents whose `_rev` is the one that was read, or that have none, being new.

        Adds to the outcome what is stored and what will never be. Calls `alive` between requests.

        Returns:
            The ids of those that someone else changed since they were read.

        Raises:
            SinkUnavailable: not everything is written.
        """

    @abstractmethod
    def read(self, identifiers: Sequence[str]) -> dict[str, Document]:
        """The documents with these ids, by id; those that do not exist are left out.

        Raises:
            SinkUnavailable: the database does not answer.
        """

    def scan(self, first: str = "") -> Iterator[Document]:
        """All documents from an id on, in the order of ids.

        Pages are as large as their documents allow, so that photographs fit into memory too.

        Raises:
            SinkUnavailable: the database does not answer.
        """
        start, limit = first, FIRST_PAGE_DOCUMENTS
        seen: str | None = None
        while True:
            # One more than the page: the last one seen comes first again, unless it is gone.
            page, last = self._page(start, limit + 1)
            fresh = [document for document in page if document["_id"] != seen]
            yield from fresh
            if last is None:
                return
            start = seen = last
            size = sum(map(_size, fresh)) // max(1, len(fresh))
            limit = max(1, min(LARGEST_PAGE_DOCUMENTS, PAGE_BYTES // max(1, size)))

    @abstractmethod
    def _page(self, start: str, limit: int) -> tuple[list[Document], str | None]:
        """At most so many documents from an id on, in order.

        Returns:
            The documents, and the id that the next page starts with; None at the end.

        Raises:
            SinkUnavailable: the database does not answer.
        """

    def _with_any_password(self, request: Callable[[], ResultT]) -> ResultT:
        """Send a request with each password that the file has by now, until one is taken.

        It begins with the one that was taken last. One that was refused is tried again after the
        pause; once after a tenth of it if it had been taken before: the server may just have
        started.

        Raises:
            SinkUnavailable: none is.
        """
        refused = self._refused_lately()
        if self._password in refused and not self._take_password_not_in(refused):
            raise self._shut_out()
        while True:
            try:
                result = request()
            except PasswordRefused as error:
                refused.add(self._password)
                self._refused[self._password] = time.monotonic()
                if not self._take_password_not_in(refused):
                    raise self._shut_out() from error
            else:
                self._accepted = self._password
                self._refused.clear()
                return result

    def _refused_lately(self) -> set[str]:
        """The passwords that it is too early to try again."""
        now, pause = time.monotonic(), self.refusal_pause * len(self._refused)
        lately = {password for password, at in self._refused.items() if now - at < pause}
        if self._accepted in lately and now - self._refused[self._accepted] > pause / 10:
            lately.remove(self._accepted)
            self._accepted = None
        return lately

    def _shut_out(self) -> SinkUnavailable:
        return SinkUnavailable(
            f"{self._server} refuses user {self._settings.store_user!r}: check IOT_STORE_USER and "
            "IOT_STORE_PASSWORD_FILE"
        )

    def _take_password_not_in(self, refused: Collection[str]) -> bool:
        with suppress(OSError, ValueError):
            for password in self._passwords.read():
                if password not in refused:
                    self._password = password
                    return True
        return False


def _size(document: Document) -> int:
    """Bytes, roughly. What is long in a document is text: images, and what others have added."""
    return 500 + sum(len(value) for value in document.values() if isinstance(value, str))


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
