"""`iot-pipeline restore`: a backup merged into the database, or compared with it.

Documents are merged as storage merges messages (`schema.merge`), so it makes no difference in which
order storage and restores write: what the database holds beyond the backup stays, and nothing comes
twice. A restore that was cut off is done again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from iot_pipeline.backup import BackupFile, Contents, say
from iot_pipeline.errors import Exit, PipelineError
from iot_pipeline.progress import Progress
from iot_pipeline.schema import Document, content, merge
from iot_pipeline.service import set_up_logging
from iot_pipeline.settings import RestoreSettings
from iot_pipeline.stores import READ_DOCUMENTS, Store, chunks, open_store

SHOWN = 10

Refused = dict[str, str]
"""Why the database does not take a document, by id."""


@dataclass
class Comparison:
    """How the database stands to a backup, in documents of the backup."""

    documents: int = 0
    identical: int = 0
    newer: int = 0
    """The database holds more: the restore would change nothing."""
    missing: int = 0
    different: int = 0
    """The restore would change them."""

    def add(self, saved: Document, stored: Document | None) -> None:
        """Count a document of the backup and what the database has under its id."""
        self.documents += 1
        if stored is None:
            self.missing += 1
            return
        found = content(stored)
        if found == saved:
            self.identical += 1
        elif merge(found, saved) == found:
            self.newer += 1
        else:
            self.different += 1

    @property
    def is_all_there(self) -> bool:
        """Whether a restore would change nothing."""
        return not self.missing and not self.different


def compare(backup: BackupFile, store: Store, progress: Progress) -> Comparison:
    """Look up each document of the backup in the database.

    Raises:
        SinkUnavailable: the database does not answer.
        DamagedBackup: the file is not whole.
    """
    comparison = Comparison()
    for chunk in chunks(backup.documents()):
        for start in range(0, len(chunk), READ_DOCUMENTS):
            few = chunk[start : start + READ_DOCUMENTS]
            stored = store.read([document["_id"] for document in few])
            for document in few:
                comparison.add(document, stored.get(document["_id"]))
            progress.show(f"compared {comparison.documents} documents")
    return comparison


def merge_into(store: Store, backup: BackupFile, progress: Progress) -> Refused:
    """Merge all documents of the backup into the database.

    Raises:
        SinkUnavailable: not all of them are written; do it again.
        PipelineError: the database refuses the first ones all alike.
        DamagedBackup: the file is not whole.
    """
    refused: Refused = {}
    count = 0
    for chunk in chunks(backup.documents()):
        outcome = store.merge_in({state["_id"]: state for state in chunk}, lambda: None)
        refused |= {identifier: str(why) for identifier, why in outcome.refused.items()}
        count += len(chunk)
        if len(refused) == count:
            # A right that is lacking, more likely than documents that are all wrong.
            raise PipelineError(next(iter(refused.values())))
        progress.show(f"restored {count} documents")
    return refused


def run(settings: RestoreSettings) -> int:
    """Check the file, then restore or compare, and return the exit status.

    Raises:
        PipelineError: with the exit status to end with.
    """
    set_up_logging("warning")
    path = Path(settings.file)
    backup = BackupFile(path)
    progress = Progress()
    try:
        contents = backup.check(lambda count: progress.show(f"checked {count} documents"))
        if settings.check:
            found: Comparison | Refused | None = None
        elif settings.compare:
            with open_store(settings) as store:
                found = compare(backup, store, progress)
        else:
            with open_store(settings) as store:
                found = merge_into(store, backup, progress)
    finally:
        progress.clear()
    if found is None:
        say(contents, path, settings.json)
        return Exit.OK
    if isinstance(found, Comparison):
        return _say_how_they_compare(found, contents, settings)
    return _say_what_was_done(found, contents, settings)


def _say_how_they_compare(found: Comparison, contents: Contents, settings: RestoreSettings) -> Exit:
    if settings.json:
        print(json.dumps(asdict(contents) | asdict(found)))
    else:
        print(
            f"Of {found.documents} documents of {settings.file}, {settings.store_address.name} has "
            f"{found.identical} as they are and {found.newer} with more in them; {found.missing} "
            f"are missing and {found.different} differ."
        )
    return Exit.OK if found.is_all_there else Exit.FAILED


def _say_what_was_done(refused: Refused, contents: Contents, settings: RestoreSettings) -> Exit:
    restored = contents.documents - len(refused)
    if settings.json:
        print(json.dumps(asdict(contents) | {"restored": restored, "refused": len(refused)}))
    else:
        print(f"{restored} documents of {settings.file} are in {settings.store_address.name}")
    for identifier, why in list(refused.items())[:SHOWN]:
        sys.stderr.write(f"iot-pipeline restore: {identifier} is refused: {why}\n")
    if len(refused) > SHOWN:
        sys.stderr.write(f"iot-pipeline restore: … and {len(refused) - SHOWN} more\n")
    return Exit.FAILED if refused else Exit.OK
