"""`iot-pipeline backup`: all documents of the database in one file, and how that file looks.

It is zstd (RFC 8878) over lines of JSON, so `zstdcat FILE | jq` reads it too: a header, one
document a line, and a trailer with their number and the SHA-256 of all lines before it. A file that
was cut off or has changed since is told from a whole one by that.

The pipeline goes on meanwhile. A document that is new while the backup reads may or may not be in
it. One that is young and lacks its image or its prediction is left to the end, and given time to
get it, so that the backup of a pipeline that works holds no halves.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from iot_pipeline.errors import DamagedBackup, Exit, FileError, UsageError
from iot_pipeline.progress import Progress
from iot_pipeline.schema import (
    Document,
    content,
    format_time,
    is_complete,
    is_uuid7,
    now,
    uuid7_time,
)
from iot_pipeline.service import set_up_logging
from iot_pipeline.settings import BackupSettings
from iot_pipeline.stores import READ_DOCUMENTS, Store, open_store

FORMAT = "iot-pipeline backup"
VERSION = 1
# A damaged file may be one endless line. No database takes a document as large as this.
MAX_LINE_BYTES = 64 * 1024 * 1024
BUFFER_BYTES = 1024 * 1024
LOOK_AGAIN_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backup holds."""

    database: str
    made_at: str
    documents: int
    bytes: int
    """Size of the documents as JSON: what they take in a database, roughly."""


@contextlib.contextmanager
def new_backup(path: Path, database: str) -> Iterator[Callable[[Document], None]]:
    """Give what adds a document to a new backup; the file appears under its name once it is whole.

    Raises:
        UsageError: there is such a file already.
        FileError: the file cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} exists already: name another file")
    try:
        # Beside it, so that it can be renamed; readable by its owner alone.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False
        ) as file:
            try:
                yield from _write(file, database)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).rename(path)
            except BaseException:
                Path(file.name).unlink()
                raise
        _sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}") from error


def _write(file: Any, database: str) -> Iterator[Callable[[Document], None]]:
    digest = hashlib.sha256()
    documents = 0
    with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:

        def write_line(content: object) -> None:
            line = json.dumps(content, separators=(",", ":")).encode("ascii") + b"\n"
            digest.update(line)
            stream.write(line)

        def add(document: Document) -> None:
            nonlocal documents
            documents += 1
            write_line(content(document))

        made_at = format_time(now())
        write_line({"format": FORMAT, "version": VERSION, "database": database, "made_at": made_at})
        yield add
        write_line({"documents": documents, "sha256": digest.hexdigest()})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BackupFile:
    """A backup to read, as often as one likes. It is never in memory as a whole."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path

    def check(self, progress: Callable[[int], None] = lambda _: None) -> Contents:
        """Read all of it.

        Args:
            progress: called with the number of documents so far.

        Raises:
            DamagedBackup: it is no backup, or not whole.
            FileError: there is no such file, or we may not read it.
        """
        with self._lines() as lines:
            header = self._header(next(lines, b""))
        count = size = 0
        for line, _ in self._documents():
            count += 1
            size += len(line)
            progress(count)
        return Contents(header["database"], header["made_at"], count, size)

    def documents(self) -> Iterator[Document]:
        """All documents, in the order of the file. Only after the last one it is known to be whole.

        Raises:
            DamagedBackup, FileError: as `check`.
        """
        return (document for _, document in self._documents())

    def _documents(self) -> Iterator[tuple[bytes, Document]]:
        with self._lines() as lines:
            digest = hashlib.sha256()
            first = next(lines, b"")
            self._header(first)
            digest.update(first)
            for number, line in enumerate(lines):
                content = self._object(line, f"line {number + 2}")
                if "_id" not in content:
                    trailer = {"documents": number, "sha256": digest.hexdigest()}
                    self._check_end(content, trailer, next(lines, None))
                    return
                if not isinstance(content["_id"], str):
                    raise self._damaged(f"line {number + 2} has an _id that is no text")
                digest.update(line)
                yield line, content
        raise self._damaged("it ends before its last line: it was cut off")

    def _check_end(self, found: object, expected: object, after: bytes | None) -> None:
        if found != expected:
            raise self._damaged(f"it ends with {found}, but what is before that gives {expected}")
        if after is not None:
            raise self._damaged("something follows its last line")

    @contextlib.contextmanager
    def _lines(self) -> Iterator[Iterator[bytes]]:
        try:
            with self.path.open("rb") as file:
                yield self._split(file)
        except OSError as error:
            raise FileError(f"the backup cannot be read: {error}") from error

    def _split(self, file: BinaryIO) -> Iterator[bytes]:
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        with io.BufferedReader(stream, BUFFER_BYTES) as lines:
            try:
                while line := lines.readline(MAX_LINE_BYTES):
                    if not line.endswith(b"\n"):
                        raise self._damaged("it ends within a line: it was cut off")
                    yield line
            except zstandard.ZstdError as error:
                raise self._damaged(f"it cannot be decompressed: {error}") from error

    def _header(self, line: bytes) -> dict[str, Any]:
        header = self._object(line, "its first line")
        if header.get("format") != FORMAT:
            raise self._damaged("it does not begin as one")
        if header.get("version") != VERSION:
            raise DamagedBackup(
                f"{self.path} is of format {header.get('version')}, and this release reads "
                f"{VERSION}: use the release that wrote it, or a newer one"
            )
        return {"database": "", "made_at": ""} | header

    def _object(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            content = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise self._damaged(f"{where} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise self._damaged(f"{where} is no object")
        return content

    def _damaged(self, problem: str) -> DamagedBackup:
        return DamagedBackup(f"{self.path} is no whole backup: {problem}")


def documents_of(store: Store, grace: float, progress: Callable[[str], None]) -> Iterator[Document]:
    """Every document of the database, once.

    Args:
        store: the database.
        grace: age in seconds up to which a document is given time for the half it lacks.
        progress: called with words on what is waited for.

    Raises:
        SinkUnavailable: the database does not answer.
    """
    young = now() - timedelta(seconds=grace)
    waiting: list[str] = []
    for document in store.scan():
        identifier = document["_id"]
        if is_complete(document) or not is_uuid7(identifier) or uuid7_time(identifier) < young:
            yield document
        else:
            waiting.append(identifier)
    deadline = time.monotonic() + grace
    while waiting:
        is_last = time.monotonic() >= deadline
        progress(f"waiting for the other half of {len(waiting)} documents")
        halves = []
        for start in range(0, len(waiting), READ_DOCUMENTS):
            # Those that someone has deleted meanwhile are not found.
            for document in store.read(waiting[start : start + READ_DOCUMENTS]).values():
                if is_last or is_complete(document):
                    yield document
                else:
                    halves.append(document["_id"])
        waiting = halves
        if waiting:
            time.sleep(LOOK_AGAIN_SECONDS)


def run(settings: BackupSettings) -> int:
    """Write the backup, and say what is in it.

    Raises:
        PipelineError: with the exit status to end with.
    """
    set_up_logging("warning")
    path = Path(settings.file)
    progress = Progress()
    attachments = 0
    try:
        with open_store(settings) as store, new_backup(path, store.name) as add:
            documents = documents_of(store, settings.grace, progress.show)
            for count, document in enumerate(documents, start=1):
                add(document)
                attachments += "_attachments" in document
                progress.show(f"reading {store.name}: {count} documents")
        contents = BackupFile(path).check()
    finally:
        progress.clear()
    if attachments:
        sys.stderr.write(
            f"iot-pipeline backup: {attachments} documents have attachments, which are not in it\n"
        )
    say(contents, path, settings.json)
    return Exit.OK


def say(contents: Contents, path: Path, as_json: bool) -> None:
    """Tell what a backup holds."""
    if as_json:
        print(json.dumps(asdict(contents)))
    else:
        print(
            f"{path}: {contents.documents} documents of {contents.database}, as of "
            f"{contents.made_at}, {path.stat().st_size} bytes"
        )
