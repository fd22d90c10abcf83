"""Merging documents: any order, any grouping, any repetition, one result."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
