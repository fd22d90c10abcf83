"""Which broker keeps which partitions: what the planner promises, for any cluster."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

FILE = Path(__file__).parents[2] / "roles/kafka_resources/module_utils/kafka_partitions.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kafka_partitions", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kafka_partitions"] = module
    spec.loader.exec_module(module)
    return module


kafka_partitions: Any = load()
Partition = kafka_partitions.Partition
plan_layout = kafka_partitions.plan_layout

Layout = dict[Any, tuple[int, ...]]


def topic(name: str, *replicas: tuple[int, ...]) -> Layout:
    return {Partition(name, index): each for index, each in enumerate(replicas)}


@st.composite
def layouts(draw: st.DrawFn, racks: bool = True, one_factor: bool = False, leaving: int = 2) -> Any:
    """Racks of the brokers that stay, and partitions on those and on others that leave."""
    staying = range(1, 1 + draw(st.integers(1, 6)))
    names = st.sampled_from(["", "a", "b", "c"]) if racks else st.just("")
    rack = {broker: draw(names) for broker in staying}
    everybody = [*staying, *range(10, 10 + draw(st.integers(0, leaving)))]
    limit = min(len(staying), 4)
    all_alike = draw(st.integers(1, limit)) if one_factor else None
    now: Layout = {}
    for name in draw(st.lists(st.sampled_from("tuv"), min_size=1, max_size=3, unique=True)):
        factor = all_alike or draw(st.integers(1, limit))
        for index in range(draw(st.integers(1, 9))):
            order = draw(st.permutations(everybody))
            now[Partition(name, index)] = tuple(order[:factor])
    return rack, now


def result_of(rack: dict[int, str], now: Layout, **options: Any) -> Layout:
    then: Layout = now | plan_layout(rack, now, **options)
    return then


def racks_of(rack: dict[int, str], replicas: tuple[int, ...]) -> set[str]:
    return {rack[broker] or f"broker {broker}" for broker in replicas}


def spread(counts: Counter[int], rack: dict[int, str]) -> int:
    return max(counts[broker] for broker in rack) - min(counts[broker] for broker in rack)


def kept(layout: Layout) -> Counter[int]:
    return Counter(broker for replicas in layout.values() for broker in replicas)


def led(layout: Layout) -> Counter[int]:
    return Counter(replicas[0] for replicas in layout.values())


def copies(now: Layout, then: Layout) -> int:
    return sum(len(set(then[at]) - set(now[at])) for at in now)


@given(layouts())
def test_each_partition_keeps_its_number_of_replicas_on_brokers_that_stay(drawn: Any) -> None:
    rack, now = drawn
    for at, replicas in result_of(rack, now).items():
        assert len(set(replicas)) == len(replicas) == len(now[at])
        assert set(replicas) <= set(rack)


@given(layouts())
def test_replicas_stand_in_as_many_racks_as_they_can(drawn: Any) -> None:
    rack, now = drawn
    there_are = len(racks_of(rack, tuple(rack)))
    for replicas in result_of(rack, now).values():
        assert len(racks_of(rack, replicas)) == min(len(replicas), there_are)


@given(layouts())
def test_a_plan_for_the_result_is_empty(drawn: Any) -> None:
    rack, now = drawn
    assert plan_layout(rack, result_of(rack, now)) == {}


@given(layouts())
def test_a_plan_names_only_what_changes(drawn: Any) -> None:
    rack, now = drawn
    assert all(now[at] != replicas for at, replicas in plan_layout(rack, now).items())


@given(layouts(racks=False))
def test_without_racks_brokers_keep_the_same_number_but_for_one(drawn: Any) -> None:
    rack, now = drawn
    assert spread(kept(result_of(rack, now)), rack) <= 1


@given(layouts(racks=False, one_factor=True))
def test_leaders_too_where_all_topics_have_the_same_number_of_replicas(drawn: Any) -> None:
    rack, now = drawn
    assert spread(led(result_of(rack, now)), rack) <= 1


@given(st.integers(1, 3), st.data())
def test_racks_of_the_same_size_are_as_even(size: int, data: st.DataObject) -> None:
    rack = {broker: "abc"[broker % 3] for broker in range(3 * size)}
    now: Layout = {}
    factor = data.draw(st.integers(1, 3))
    for index in range(data.draw(st.integers(1, 12))):
        now[Partition("t", index)] = tuple(data.draw(st.permutations(list(rack)))[:factor])
    then = result_of(rack, now)
    assert spread(kept(then), rack) <= 1
    assert spread(led(then), rack) <= 1


@given(layouts(racks=False, leaving=0))
def test_without_racks_no_plan_moves_less(drawn: Any) -> None:
    """Who has most now keeps the larger share; all above its share has to go somewhere."""
    rack, now = drawn
    share, rest = divmod(sum(map(len, now.values())), len(rack))
    counts = sorted((kept(now)[broker] for broker in rack), reverse=True)
    targets = [share + 1] * rest + [share] * (len(rack) - rest)
    needed = sum(max(0, target - count) for count, target in zip(counts, targets, strict=True))
    assert copies(now, result_of(rack, now)) == needed


@given(layouts(), st.data())
def test_a_topic_gets_the_number_of_replicas_that_it_shall_have(
    drawn: Any, data: st.DataObject
) -> None:
    rack, now = drawn
    factor = data.draw(st.integers(1, len(rack)))
    then = result_of(rack, now, factors={"t": factor})
    for at, replicas in then.items():
        assert len(set(replicas)) == (factor if at.topic == "t" else len(now[at]))
    assert plan_layout(rack, then, factors={"t": factor}) == {}


def test_a_new_broker_takes_its_share_of_each_topic() -> None:
    rings = [(1, 2, 3), (2, 3, 1), (3, 1, 2)]
    now = topic("many", *rings * 4) | topic("few", *rings, rings[0])
    then = result_of(dict.fromkeys((1, 2, 3, 4), ""), now)
    assert kept(then) == {1: 12, 2: 12, 3: 12, 4: 12}
    assert led(then) == {1: 4, 2: 4, 3: 4, 4: 4}
    assert kept({at: now for at, now in then.items() if at.topic == "few"})[4] == 3
    assert copies(now, then) == 12


def test_a_new_broker_of_a_rack_relieves_that_rack() -> None:
    now = topic("t", (1, 2, 3), (2, 3, 1), (3, 1, 2), (1, 3, 2))
    then = result_of({1: "a", 2: "b", 3: "c", 4: "a"}, now)
    assert kept(then) == {1: 2, 2: 4, 3: 4, 4: 2}
    assert copies(now, then) == 2


def test_what_leaves_a_broker_is_all_that_moves() -> None:
    now = topic("t", (1, 2), (2, 3), (3, 4), (4, 1))
    then = result_of(dict.fromkeys((1, 2, 3), ""), now)
    assert copies(now, then) == 2
    assert {at for at in now if set(now[at]) != set(then[at])} == {
        Partition("t", 2),
        Partition("t", 3),
    }


def test_smaller_partitions_go_first() -> None:
    now = topic("t", (1,), (1,), (1,))
    sizes = {Partition("t", 0): 5, Partition("t", 1): 3, Partition("t", 2): 4}
    assert plan_layout({1: "", 2: ""}, now, sizes=sizes) == {Partition("t", 1): (2,)}


def test_leaders_move_without_their_data() -> None:
    now = topic("t", (1, 2), (1, 2))
    assert plan_layout({1: "", 2: ""}, now) == {Partition("t", 0): (2, 1)}


def test_more_replicas_than_brokers_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"1 brokers cannot keep the replicas of t \(2 each\)"):
        plan_layout({1: ""}, topic("t", (1, 2)))


def test_a_tenth_broker_gets_its_share_of_900_partitions() -> None:
    rack = {broker: "abc"[broker % 3] for broker in range(1, 11)}
    now = topic("t", *[(1 + i % 9, 1 + (i + 1) % 9, 1 + (i + 2) % 9) for i in range(900)])
    then = result_of(rack, now)
    # Of the 900 of its rack, which has four brokers now.
    assert (copies(now, then), kept(then)[10]) == (225, 225)
    assert spread(led(then), rack) <= 1
