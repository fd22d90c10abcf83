"""`iot-pipeline store`: write images and predictions to the database, one document an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from iot_pipeline.couch import CouchDatabase
from iot_pipeline.errors import Exit, InvalidMessage
from iot_pipeline.schema import (
    Document,
    ImageMessage,
    Message,
    PredictionMessage,
    Record,
    decode_record,
    document,
    is_complete,
    merge,
)
from iot_pipeline.service import Log, Service
from iot_pipeline.settings import StoreSettings
from iot_pipeline.worker import run_stage

log = Log("store")

# Above this many documents at once, a log line for each is too much.
LOGGED_ONE_BY_ONE = 10


class StoreStage:
    """Images and predictions in, merged documents out; see `worker.Stage`."""

    def __init__(self, settings: StoreSettings, database: CouchDatabase, service: Service) -> None:
        self._settings = settings
        self._database = database
        self._service = service
        self.topics: Sequence[str] = (settings.image_topic, settings.prediction_topic)
        self.sink = settings.couchdb_database

    def decode(self, record: Record) -> Message:
        """Read an image or a prediction, as the topic says."""
        limit = self._settings.max_record_bytes
        if record.topic == self._settings.prediction_topic:
            return decode_record(PredictionMessage, record, limit)
        return decode_record(ImageMessage, record, limit)

    def handle(self, batch: Sequence[Message]) -> Mapping[int, InvalidMessage]:
        """Merge the messages into their documents."""
        documents: dict[str, Document] = {}
        for message in batch:
            state = document(message)
            documents[message.id] = merge(documents.get(message.id, state), state)
        outcome = self._database.merge_in(documents, self._service.alive)
        self._report(outcome.stored)
        return {
            place: outcome.refused[message.id]
            for place, message in enumerate(batch)
            if message.id in outcome.refused
        }

    @staticmethod
    def _report(stored: Mapping[str, Document]) -> None:
        each = log.info if len(stored) <= LOGGED_ONE_BY_ONE else log.debug
        for identifier, state in stored.items():
            each("stored", id=identifier, complete=str(is_complete(state)).lower())
        if len(stored) > LOGGED_ONE_BY_ONE:
            complete = sum(map(is_complete, stored.values()))
            log.info("stored batch", documents=len(stored), complete=complete)


def run(settings: StoreSettings) -> int:
    """Store images and predictions until SIGTERM.

    Raises:
        PipelineError: with the exit status to end with.
    """
    with Service(settings) as service:
        database = CouchDatabase(settings)
        run_stage(
            lambda service, _sender: StoreStage(settings, database, service), settings, service
        )
    return Exit.OK
