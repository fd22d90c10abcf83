"""`iot-pipeline store`: write images and predictions to the database, one document an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iot_pipeline.errors import Exit, InvalidMessage
from iot_pipeline.pipeline import Beat
from iot_pipeline.schema import (
    Document,
    ImageMessage,
    PredictionMessage,
    Record,
    decode_record,
    document,
    is_complete,
    merge,
)
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import StoreSettings
from iot_pipeline.stores import Store, open_store
from iot_pipeline.worker import run_stage

log = Log("store")

# Above this many documents at once, a log line for each is too much.
LOGGED_ONE_BY_ONE = 10


@dataclass(frozen=True, slots=True)
class MergedBatch:
    """The documents that a batch comes to, and which message went into which."""

    identifiers: list[str]
    documents: dict[str, Document]


class StoreStage:
    """Images and predictions in, merged documents out; see `pipeline.Stage`."""

    def __init__(self, settings: StoreSettings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self.topics: Sequence[str] = (settings.image_topic, settings.prediction_topic)
        self.sink = store.name

    def decode(self, record: Record) -> Document:
        """Read an image or a prediction, as the topic says."""
        limit = self._settings.max_record_bytes
        if record.topic == self._settings.prediction_topic:
            return document(decode_record(PredictionMessage, record, limit))
        return document(decode_record(ImageMessage, record, limit))

    def handle(self, items: Sequence[Document], beat: Beat) -> MergedBatch:
        """Merge messages of the same image, so that it is written once where both are at hand."""
        documents: dict[str, Document] = {}
        for state in items:
            beat()
            identifier = state["_id"]
            known = documents.get(identifier)
            documents[identifier] = state if known is None else merge(known, state)
        return MergedBatch([state["_id"] for state in items], documents)

    def deliver(self, result: MergedBatch, beat: Beat) -> Mapping[int, InvalidMessage]:
        """Merge the documents into the database."""
        outcome = self._store.merge_in(result.documents, beat)
        self._report(outcome.stored)
        return {
            place: outcome.refused[identifier]
            for place, identifier in enumerate(result.identifiers)
            if identifier in outcome.refused
        }

    @staticmethod
    def _report(stored: Mapping[str, Document]) -> None:
        if len(stored) > LOGGED_ONE_BY_ONE:
            complete = sum(map(is_complete, stored.values()))
            log.info("stored batch", documents=len(stored), complete=complete)
            return
        for identifier, state in stored.items():
            log.info("stored", id=identifier, complete=str(is_complete(state)).lower())


def run(settings: StoreSettings) -> int:
    """Store images and predictions until SIGTERM.

    Raises:
        PipelineError: with the exit status to end with.
    """
    with Service(settings) as service, open_store(settings) as store:
        run_stage(lambda _sender: StoreStage(settings, store), settings, service)
    return Exit.OK
