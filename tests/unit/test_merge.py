"""Merging documents: any order, any grouping, any repetition, one result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iot_pipeline import stores
from iot_pipeline.audit import Ledger
from iot_pipeline.backup import documents_of
from iot_pipeline.restore import Comparison
from iot_pipeline.schema import (
    IMAGE_FIELDS,
    PREDICTION_FIELDS,
    STORED_AT,
    Document,
    ImageMessage,
    PredictionMessage,
    document,
    format_time,
    is_complete,
    merge,
)
from iot_pipeline.settings import BackupSettings, load
from iot_pipeline.stores import Outcome, Store, chunks

ID = "01a1fbf0-4cba-7c80-bfd1-405e91c541a0"
START = datetime(2026, 1, 1, tzinfo=UTC)

# Few values, so that equal times and equal contents are met often.
moments = st.integers(0, 3).map(lambda minutes: START + timedelta(minutes=minutes))
images = st.builds(
    ImageMessage,
    id=st.just(ID),
    ground_truth=st.sampled_from(["cat", "dog"]),
    data=st.sampled_from([b"one", b"two"]),
    content_type=st.just("image/png"),
    produced_at=moments,
    source=st.just("here"),
)
predictions = st.builds(
    PredictionMessage,
    id=st.just(ID),
    inferred_value=st.sampled_from(["cat", "dog"]),
    confidence=st.sampled_from([0.25, 0.75]),
    model=st.sampled_from(["old", "new"]),
    inferred_at=moments,
)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
foreign = st.dictionaries(
    st.sampled_from(["ID", *IMAGE_FIELDS, *PREDICTION_FIELDS, STORED_AT]) | st.text(min_size=1),
    anything,
    max_size=6,
).map(lambda fields: {name: fields[name] for name in fields if name[0] != "_"} | {"_id": ID})


def same(one: Document, other: Document) -> bool:
    """As JSON: Python takes 1, 1.0 and True for equal."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


class Memory(Store):
    """A database of one document, which someone else has left there."""

    def __init__(self, stored: Document) -> None:
        super().__init__(load(BackupSettings, {"file": "-"}, {}), "memory")
        self.stored = stored | {"_rev": "1-a"}

    def close(self) -> None:
        pass

    def _write(
        self, documents: Sequence[Document], outcome: Outcome, alive: Callable[[], None]
    ) -> list[str]:
        alive()
        conflicts = []
        for each in documents:
            if each.get("_rev") == self.stored["_rev"]:
                outcome.stored[each["_id"]] = each
                number = int(self.stored["_rev"].split("-")[0])
                self.stored = each | {"_rev": f"{number + 1}-a"}
            else:
                conflicts.append(each["_id"])
        return conflicts

    def read(self, identifiers: Sequence[str]) -> dict[str, Document]:
        return {ID: dict(self.stored)} if ID in identifiers else {}

    def _page(self, start: str, limit: int) -> tuple[list[Document], str | None]:
        del limit
        return [dict(self.stored)] if start <= ID else [], None


@st.composite
def states(draw: st.DrawFn) -> Document:
    """A message's document, or one as the database may hold it after whoever touched it."""
    state = document(draw(images | predictions))
    for name in draw(st.sets(st.sampled_from([*IMAGE_FIELDS, *PREDICTION_FIELDS]), max_size=3)):
        state.pop(name, None)
    if draw(st.booleans()):
        state[STORED_AT] = format_time(draw(moments))
    if draw(st.booleans()):
        state["Note"] = draw(st.sampled_from(["a", "b", 1, None, ["x"]]))
    return state


@given(states(), states())
def test_the_order_makes_no_difference(one: Document, other: Document) -> None:
    assert merge(one, other) == merge(other, one)


@given(states(), states(), states())
def test_the_grouping_makes_no_difference(one: Document, two: Document, three: Document) -> None:
    assert merge(merge(one, two), three) == merge(one, merge(two, three))


@given(states(), states())
def test_repetition_makes_no_difference(one: Document, other: Document) -> None:
    merged = merge(one, other)
    assert merge(merged, one) == merged
    assert merge(merged, other) == merged
    assert merge(merged, merged) == merged


@given(foreign, foreign | states(), foreign | states())
def test_whatever_stands_in_any_field_is_merged_alike(
    one: Document, two: Document, three: Document
) -> None:
    merged = merge(one, two)
    assert same(merged, merge(two, one))
    assert same(merge(merged, three), merge(one, merge(two, three)))
    assert same(merge(merged, one), merged)


@given(foreign, st.lists(images | predictions, min_size=1, max_size=3))
def test_whatever_is_stored_takes_messages_and_is_read(
    stored: Document, messages: list[ImageMessage | PredictionMessage]
) -> None:
    store = Memory(stored)
    for message in messages:
        outcome = store.merge_in({ID: document(message)}, lambda: None)
        assert list(outcome.stored) == [ID]
    for name in stored.keys() - {"ID", *IMAGE_FIELDS, *PREDICTION_FIELDS, STORED_AT}:
        assert same({"": store.stored[name]}, {"": stored[name]})
    ledger = Ledger()
    for found in store.scan():
        ledger.saw_document(found)
    assert ledger.report(60, START).produced in (0, 1)  # none where it claims to be another image
    assert len(list(documents_of(store, 0, lambda _: None))) == 1
    assert [len(chunk) for chunk in chunks([stored, store.stored])] == [2]
    comparison = Comparison()
    comparison.add(stored, store.stored)
    assert comparison.missing == 0


def test_what_others_added_counts_into_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WRITE_BYTES", 10_000)
    large = ({"_id": str(number), "Data": None, "More": "x" * 9000} for number in range(3))
    assert [len(chunk) for chunk in chunks(large)] == [1, 1, 1]


@given(st.lists(images | predictions, min_size=1, max_size=6), st.randoms())
def test_messages_in_any_order_twice_make_one_document(
    messages: list[ImageMessage | PredictionMessage], random: object
) -> None:
    shuffled = [document(message) for message in messages * 2]
    random.shuffle(shuffled)  # type: ignore[attr-defined] # hypothesis's own kind of Random
    expected = reduce(merge, (document(message) for message in messages), document(messages[0]))
    assert reduce(merge, shuffled) == expected


@given(images, predictions)
def test_a_prediction_that_comes_first_makes_the_document(
    image: ImageMessage, prediction: PredictionMessage
) -> None:
    first = document(prediction)
    assert not is_complete(first)
    whole = merge(first, document(image))
    assert is_complete(whole)
    assert whole == {"_id": ID} | image.fields() | prediction.fields()


@given(predictions, predictions)
def test_a_confidence_stays_with_its_answer(
    one: PredictionMessage, other: PredictionMessage
) -> None:
    merged = merge(document(one), document(other))
    kept = {name: merged[name] for name in PREDICTION_FIELDS}
    assert kept in [
        {name: message.fields()[name] for name in PREDICTION_FIELDS} for message in (one, other)
    ]
    assert merged["InferredAt"] == format_time(max(one.inferred_at, other.inferred_at))


def test_the_first_completion_is_remembered() -> None:
    early = {"_id": ID, STORED_AT: format_time(START)}
    late = {"_id": ID, STORED_AT: format_time(START + timedelta(seconds=9))}
    assert merge(late, early)[STORED_AT] == format_time(START)


def test_a_revision_is_the_database_s() -> None:
    assert "_rev" not in merge({"_id": ID, "_rev": "1-a"}, {"_id": ID})


def test_two_images_are_not_merged() -> None:
    with pytest.raises(ValueError, match="two images"):
        merge({"_id": ID}, {"_id": ID.replace("a", "b")})
