"""What the module kafka_topics makes of declared and existing topics."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ansible.module_utils
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROLE = Path(__file__).parents[2] / "roles/kafka_resources"


def load() -> ModuleType:
    # Where Ansible puts what a role's modules share.
    ansible.module_utils.__path__.append(str(ROLE / "module_utils"))
    spec = importlib.util.spec_from_file_location("kafka_topics", ROLE / "library/kafka_topics.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["kafka_topics"] = module
    spec.loader.exec_module(module)
    return module


kafka_topics = load()
Topic = kafka_topics.Topic


def plan(declared: Any, existing: Any = None, *, grow: bool = False) -> Any:
    present = {} if existing is None else {existing.name: existing}
    return kafka_topics.make_plan([declared], present, grow_partitions=grow)


def test_a_missing_topic_is_created() -> None:
    topic = Topic("images", 4, 1, {"retention.ms": "1"})
    assert plan(topic).create == [topic]


def test_an_equal_topic_is_left_alone() -> None:
    topic = Topic("images", 4, 1, {"retention.ms": "1"})
    assert plan(topic, topic).is_empty()


def test_what_is_not_named_is_left_alone() -> None:
    existing = Topic("images", 4, 3, {"retention.ms": "1", "segment.ms": "2"})
    assert plan(Topic("images", 4, -1, {"retention.ms": "1"}), existing).is_empty()


def test_partitions_are_never_lowered() -> None:
    for grow in (False, True):
        found = plan(Topic("images", 2), Topic("images", 4), grow=grow)
        assert found.is_empty()
        assert "images has 4 partitions and 2 are declared" in found.problems[0]


def test_partitions_grow_only_when_allowed() -> None:
    declared, existing = Topic("images", 6), Topic("images", 4)
    refused = plan(declared, existing)
    assert refused.is_empty()
    assert "kafka_resources_grow_partitions" in refused.problems[0]
    assert plan(declared, existing, grow=True).grow == {"images": 6}


def test_replicas_are_not_moved() -> None:
    found = plan(Topic("images", 4, 3), Topic("images", 4, 1))
    assert found.is_empty()
    assert "playbooks/rebalance.yml" in found.problems[0]


def test_configuration_is_set_changed_and_reset() -> None:
    declared = Topic("images", 4, -1, {"a": "new", "b": "same", "c": "added", "d": None})
    existing = Topic("images", 4, 1, {"a": "old", "b": "same", "d": "set", "e": "kept"})
    found = plan(declared, existing)
    assert found.configure == {"images": {"a": "new", "c": "added", "d": None}}
    assert dict(kafka_topics.after(found, {"images": existing})["images"].config) == {
        "a": "new",
        "b": "same",
        "c": "added",
        "e": "kept",
    }


def test_resetting_what_is_not_set_changes_nothing() -> None:
    assert plan(Topic("images", 4, -1, {"a": None}), Topic("images", 4, 1)).is_empty()


@pytest.mark.parametrize(
    "value, text", [(604800000, "604800000"), (True, "true"), ("gzip", "gzip"), (None, None)]
)
def test_values_are_compared_as_kafka_writes_them(value: object, text: str | None) -> None:
    assert kafka_topics.as_text(value) == text


names = st.sampled_from(["a", "b", "c"])
configs = st.dictionaries(st.sampled_from(["k", "l"]), st.sampled_from(["1", "2"]), max_size=2)
topics = st.builds(Topic, names, st.integers(1, 4), st.integers(1, 3), configs)
declarations = st.dictionaries(names, topics).map(
    lambda found: [
        Topic(name, t.partitions, t.replication_factor, t.config) for name, t in found.items()
    ]
)


@given(declarations, declarations, st.booleans())
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(
    declared: list[Any], present: list[Any], grow: bool
) -> None:
    existing = {topic.name: topic for topic in present}
    found = kafka_topics.make_plan(declared, existing, grow_partitions=grow)
    result = kafka_topics.after(found, existing)
    again = kafka_topics.make_plan(declared, result, grow_partitions=grow)
    assert again.is_empty()
    assert again.problems == found.problems
    for name, topic in existing.items():
        assert result[name].partitions >= topic.partitions


def test_the_diff_shows_only_what_changes() -> None:
    existing = {"a": Topic("a", 1, 1), "b": Topic("b", 1, 1)}
    declared = [Topic("a", 1), Topic("b", 1, -1, {"k": "v"}), Topic("c", 2)]
    found = kafka_topics.make_plan(declared, existing, grow_partitions=False)
    diff = kafka_topics.diff_of(found, existing)
    assert '"a"' not in diff["before"] + diff["after"]
    assert '"k": "v"' in diff["after"]
    assert '"k": "v"' not in diff["before"]
    assert '"c"' in diff["after"]
    nothing = kafka_topics.make_plan([Topic("a", 1)], existing, grow_partitions=False)
    assert kafka_topics.diff_of(nothing, existing) == {"before": "", "after": ""}


@pytest.mark.parametrize(
    "parameter, said",
    [
        ([{"name": "a", "partitions": 1}] * 2, "more than once: a"),
        ([{"name": "a", "partitions": 0}], "at least one partition"),
    ],
)
def test_wrong_declarations_are_told(parameter: list[dict[str, Any]], said: str) -> None:
    entries = [{"replication_factor": -1, "config": {}} | entry for entry in parameter]
    with pytest.raises(ValueError, match=said):
        kafka_topics.declared_topics(entries)


def test_what_brokers_refuse_is_told() -> None:
    results = [
        {"name": "a", "error_code": 0, "error_message": None},
        {"name": "b", "error_code": 38, "error_message": "only 1 broker"},
    ]
    with pytest.raises(ValueError, match="b: only 1 broker"):
        kafka_topics.refuse_errors(results)
