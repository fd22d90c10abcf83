"""MongoDB: one collection of one database.

A document's `_rev` is ours here: each write gives it a new one, on condition that it still has the
one that was read. Documents are read and written as JSON. What others have added of types that only
MongoDB has, such as dates, is read as its Extended JSON and becomes the same again when written.
"""

from __future__ import annotations

import re
import secrets
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bson
import pymongo
from bson import json_util
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument
from pymongo import InsertOne, MongoClient, ReadPreference, ReplaceOne
from pymongo.collection import Collection
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)

from iot_pipeline.access import Tls, certificate_problem
from iot_pipeline.errors import ConfigError, InvalidMessage, Reason, SinkUnavailable
from iot_pipeline.schema import REVISION, Document
from iot_pipeline.settings import DatabaseSettings
from iot_pipeline.stores import UNREADABLE, Outcome, PasswordRefused, ResultT, Store

# https://www.mongodb.com/docs/manual/reference/limits/: BSON Document Size
MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
# The longest wait for a server to be found: we try again anyway, and can tell meanwhile. PyMongo
# itself would wait as long as a request may take.
FIND_SECONDS = 5.0
CLOSE_SECONDS = 2.0
SHOWN_CHARACTERS = 300

# https://www.mongodb.com/docs/manual/reference/error-codes/
UNAUTHORIZED = 13
AUTHENTICATION_FAILED = 18
DUPLICATE_KEY = 11000
# What a row is refused with for what it holds, which never changes.
REFUSALS = frozenset(
    {
        2,  # BadValue
        9,  # FailedToParse
        14,  # TypeMismatch
        15,  # Overflow
        22,  # InvalidBSON
        52,  # DollarPrefixedFieldName
        55,  # InvalidDBRef
        56,  # EmptyFieldName
        57,  # DottedFieldName
        121,  # DocumentValidationFailure
        10334,  # BSONObjectTooLarge
        DUPLICATE_KEY,  # in an index of others
        17419,  # the document after the update is too large
        17420,  # the document to insert in an update's place is too large
    }
)
BY_ID = {"_id": 1}

# PyMongo's texts end with its settings.
_TIMEOUTS = re.compile(r"\s*\(configured timeouts:[^)]*\)")
_JSON = json_util.RELAXED_JSON_OPTIONS
# Texts that are no UTF-8, which the server takes from others, are read too. They are never written.
_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True,
    unicode_decode_error_handler="surrogateescape",
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)
_SAME_IN_JSON = frozenset({str, int, float, bool, type(None)})
# What BSON cannot hold: integers of over 64 bits, texts that are no UTF-8, names with a zero byte.
_NO_BSON = (ArithmeticError, BSONError, RecursionError, *UNREADABLE)


class MongoStore(Store):
    """One collection of a MongoDB server or replica set."""

    def __init__(self, settings: DatabaseSettings) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            ConfigError: an option of the URL cannot be used, or the password file cannot be read.
        """
        super().__init__(settings, "MongoDB")
        self._client = self._connect()
        self._client_password: str | None = self._password

    def _connect(self) -> MongoClient[dict[str, Any]]:
        settings, address = self._settings, self._address
        if address.options.get("w") == "0":
            raise ConfigError("IOT_STORE_URL: w=0 confirms nothing, and what is stored has to be")
        milliseconds = round(settings.store_timeout * 1000)
        options: dict[str, Any] = {
            "appname": settings.SERVICE,
            "connect": False,
            # All that one request may take, with the tries that PyMongo makes of it.
            "timeoutMS": milliseconds,
            "connectTimeoutMS": milliseconds,
            "tls": address.tls,
            "w": "majority",
            # A number in the URL would do without the disk.
            "journal": True,
            # What was read may be taken for stored, so no later election may undo it.
            "readConcernLevel": "majority",
        }
        if address.tls and settings.store_ca_file:
            options["tlsCAFile"] = settings.store_ca_file
        if settings.store_user:
            options |= {"username": settings.store_user, "password": self._password}
            options["authSource"] = address.database
        try:
            client: MongoClient[dict[str, Any]] = MongoClient(
                address.place.split(","), **{**options, **address.options}
            )
        except OSError as error:
            raise ConfigError(f"IOT_STORE_CA_FILE: {error}") from error
        except (PyMongoError, TypeError, ValueError) as error:
            raise ConfigError(f"IOT_STORE_URL: {error}") from error
        return client

    def close(self) -> None:
        """Give its connections back. It can be used again, with new ones."""
        # It tells the server, which may be gone, and would look for it for 30 seconds.
        with pymongo.timeout(CLOSE_SECONDS):
            self._client.close()
        self._client_password = None

    def _collection(self) -> Collection[dict[str, Any]]:
        # A client keeps its password, its authorities, and whether it was closed.
        if self._client_password != self._password:
            self._client.close()
            self._client = self._connect()
            self._client_password = self._password
        if not self._client.topology_description.has_writable_server():
            with pymongo.timeout(min(FIND_SECONDS, self._settings.store_timeout)):
                self._client.admin.command("ping")
        database = self._client[self._address.database]
        return database.get_collection(
            self._address.collection, _CODEC, read_preference=ReadPreference.PRIMARY
        )

    def read(self, identifiers: Sequence[str]) -> dict[str, Document]:
        """The documents with these ids, by id; those that do not exist are left out.

        Raises:
            SinkUnavailable: the database does not answer.
        """
        wanted = {"_id": {"$in": list(identifiers)}}
        documents = self._ask(lambda collection: list(collection.find(wanted)))
        return {document["_id"]: _from_bson(document) for document in documents}

    def _page(self, start: str, limit: int) -> tuple[list[Document], str | None]:
        # Only texts compare with a text: ids of other types are not ours.
        wanted = {"_id": {"$gte": start}}
        documents = self._ask(
            lambda collection: list(collection.find(wanted).sort("_id").limit(limit))
        )
        last = documents[-1]["_id"] if len(documents) == limit else None
        return [_from_bson(document) for document in documents], last

    def _write(
        self, documents: Sequence[Document], outcome: Outcome, alive: Callable[[], None]
    ) -> list[str]:
        """Write documents with one bulk; see `Store._write`."""
        alive()
        sent, operations = [], []
        for document in documents:
            try:
                operations.append(_operation(document))
            except InvalidMessage as error:
                outcome.refused[document["_id"]] = error
            else:
                sent.append(document)
        if not sent:
            return []
        failed = self._ask(lambda collection: _bulk_write(collection, operations))
        conflicts: list[str] = []
        for place, document in enumerate(sent):
            identifier, row = document["_id"], failed.get(place)
            if row is None:
                outcome.stored[identifier] = document
            elif row.get("code") == DUPLICATE_KEY and row.get("keyPattern", BY_ID) == BY_ID:
                conflicts.append(identifier)
            elif row.get("code") in REFUSALS:
                problem = f"{self._server} refuses the document: {_text_of(row)}"
                outcome.refused[identifier] = InvalidMessage(Reason.REFUSED_BY_DATABASE, problem)
            else:
                raise SinkUnavailable(f"{self._server} fails: {_text_of(row)}")
        return conflicts

    def _send(self, request: Callable[[Collection[dict[str, Any]]], ResultT]) -> ResultT:
        """Send a request with the password whose turn it is."""
        try:
            return request(self._collection())
        except OperationFailure as error:
            if error.code == AUTHENTICATION_FAILED:
                raise PasswordRefused from error
            raise

    def _ask(self, request: Callable[[Collection[dict[str, Any]]], ResultT]) -> ResultT:
        """Send a request and turn what may go wrong into what is to be done about it."""
        try:
            return self._with_any_password(lambda: self._send(request))
        except ConfigError as error:
            # It worked before: a file is being changed.
            raise SinkUnavailable(str(error)) from error
        except AutoReconnect as error:
            raise SinkUnavailable(self._why_not_reachable(error)) from error
        except OperationFailure as error:
            if error.code == UNAUTHORIZED:
                # A user who was made anew is not the one that a connection has logged in as.
                self.close()
                raise SinkUnavailable(self._why_not_allowed()) from error
            details = error.details or {}
            reason, *_ = details.get("writeConcernErrors") or [details]
            raise SinkUnavailable(f"{self._server} fails: {_text_of(reason) or error}") from error
        except PyMongoError as error:
            raise SinkUnavailable(f"{self._server} fails: {error}") from error
        except UNREADABLE as error:
            raise SinkUnavailable(f"{self._server} answers unlike MongoDB: {error!r}") from error

    def _why_not_allowed(self) -> str:
        user = self._settings.store_user
        if not user:
            return f"{self._server} wants a user: IOT_STORE_USER and IOT_STORE_PASSWORD_FILE"
        return (
            f"{self._server}: user {user!r} may not use {self.name}: grant it a role there "
            "(IOT_STORE_USER, IOT_STORE_URL)"
        )

    def _why_not_reachable(self, error: AutoReconnect) -> str:
        text = str(error)
        if isinstance(error, ServerSelectionTimeoutError):
            servers = self._client.topology_description.server_descriptions().values()
            texts = dict.fromkeys(str(server.error) for server in servers if server.error)
            text = "; ".join(texts) or text.partition(", Timeout:")[0]
        if "CERTIFICATE_VERIFY_FAILED" in text:
            problem = self._certificate_problem()
            if problem:
                # The next connection takes the authorities as they are then.
                self.close()
                return f"{self._server}: {problem}"
        text = _TIMEOUTS.sub("", text)
        tls = "on" if self._address.tls else "off"
        return f"{self._server} is not reachable, with TLS {tls}: {text} (IOT_STORE_URL)"

    def _certificate_problem(self) -> str:
        """Which certificate is refused and why: PyMongo keeps a text of it alone."""
        ca_file = self._settings.store_ca_file
        for host, port in self._address.hosts:
            try:
                with (
                    socket.create_connection((host, port), FIND_SECONDS) as plain,
                    Tls(ca_file).context().wrap_socket(plain, server_hostname=host),
                ):
                    pass
            except ssl.SSLCertVerificationError as error:
                return certificate_problem(
                    error, host, ca_file, "IOT_STORE_CA_FILE", "IOT_STORE_URL"
                )
            except OSError:
                continue
        return ""


def _operation(document: Document) -> InsertOne[RawBSONDocument] | ReplaceOne[RawBSONDocument]:
    """What writes a document, if nobody has changed it since it was read.

    Raises:
        InvalidMessage: MongoDB has no way to hold it.
    """
    seen = document.get(REVISION)
    try:
        body = bson.encode(
            {name: _to_bson(value) for name, value in document.items()}
            | {REVISION: _next_revision(seen)}
        )
    except _NO_BSON as error:
        problem = str(error)[:SHOWN_CHARACTERS]
        raise InvalidMessage(
            Reason.REFUSED_BY_DATABASE, f"MongoDB cannot hold the document: {problem}"
        ) from error
    if len(body) > MAX_DOCUMENT_BYTES:
        raise InvalidMessage(
            Reason.REFUSED_BY_DATABASE,
            f"the document has {len(body)} bytes, and MongoDB takes {MAX_DOCUMENT_BYTES}",
        )
    if REVISION not in document:
        return InsertOne(RawBSONDocument(body))
    # Changed meanwhile, it is not found, and what would be inserted instead meets its _id.
    unchanged = {"_id": document["_id"], REVISION: _to_bson(seen)}
    return ReplaceOne(unchanged, RawBSONDocument(body), upsert=True)


def _next_revision(seen: object) -> str:
    """As CouchDB's: how many writes there were, and what tells one from another."""
    number = str(seen).partition("-")[0]
    writes = int(number) if number.isascii() and number.isdigit() else 0
    return f"{writes + 1}-{secrets.token_hex(8)}"


def _bulk_write(
    collection: Collection[dict[str, Any]], operations: Sequence[Any]
) -> dict[int, Mapping[str, Any]]:
    """Write all that can be written. Returns the error of each that was not, by its place."""
    try:
        collection.bulk_write(operations, ordered=False)
    except BulkWriteError as error:
        if error.details["writeConcernErrors"]:
            raise
        return {row["index"]: row for row in error.details["writeErrors"]}
    return {}


def _text_of(error: Mapping[str, Any]) -> str:
    return _TIMEOUTS.sub("", str(error.get("errmsg", "")))[:SHOWN_CHARACTERS]


def _from_bson(document: Mapping[str, Any]) -> Document:
    """A document as it is read, with a revision, if only None, since it exists."""
    return {REVISION: None} | {name: _to_json(value) for name, value in document.items()}


def _to_json(value: Any) -> Any:
    kind = type(value)
    if kind in _SAME_IN_JSON:
        return value
    if kind is Int64:
        return int(value)
    if kind is dict:
        return {name: _to_json(each) for name, each in value.items()}
    if kind is list:
        return [_to_json(each) for each in value]
    return json_util.default(value, _JSON)


def _to_bson(value: Any) -> Any:
    if isinstance(value, dict):
        converted = {name: _to_bson(each) for name, each in value.items()}
        try:
            return json_util.object_hook(converted, _JSON)
        except (ArithmeticError, BSONError, *UNREADABLE):
            return converted  # only its names look like Extended JSON
    if isinstance(value, list):
        return [_to_bson(each) for each in value]
    return value
