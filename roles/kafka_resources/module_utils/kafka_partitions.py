"""Which broker keeps which partitions, so that all have their share. No broker is asked here.

Brokers are numbers, as Kafka counts them. The replicas of a partition are their brokers in order;
the first one leads it where it can.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

Replicas = tuple[int, ...]


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.number}"


Layout = Mapping[Partition, Replicas]
Rank = tuple[int, int, int, Partition]


def plan_layout(
    racks: Mapping[int, str],
    now: Layout,
    factors: Mapping[str, int] | None = None,
    sizes: Mapping[Partition, int] | None = None,
) -> dict[Partition, Replicas]:
    """Give every broker its share of replicas and of leaders, and move as little as that needs.

    In the result no broker that is not among `racks` keeps anything, the replicas of a partition
    stand in as many racks as they can, and the brokers' numbers of replicas are as even as that
    allows, and then those of partitions that they lead. What is so already stays: a plan for the
    result is empty. Meant for tens of brokers and thousands of partitions.

    Args:
        racks: the brokers that may keep partitions, each with its rack. One without a rack ("")
            counts as a rack of its own.
        now: where the partitions are.
        factors: how many replicas a topic shall have; one that is not named keeps its number.
        sizes: in bytes. Of moves that are equally good the smaller one is planned.

    Returns:
        The replicas of the partitions that change.

    Raises:
        ValueError: a topic has, or shall have, more replicas than there are brokers.
    """
    factors = factors or {}
    wanted = {at: factors.get(at.topic, len(replicas)) for at, replicas in now.items()}
    excessive = sorted({at.topic for at, number in wanted.items() if number > len(racks)})
    if excessive:
        raise ValueError(
            f"{len(racks)} brokers cannot keep the replicas of "
            + ", ".join(f"{topic} ({_most(wanted, topic)} each)" for topic in excessive)
            + "."
        )
    planner = _Planner(racks, now, wanted, sizes or {})
    planner.place()
    planner.spread_replicas()
    planner.spread_leaders()
    return {at: replicas for at, replicas in planner.layout().items() if replicas != now[at]}


def _most(wanted: Mapping[Partition, int], topic: str) -> int:
    return max(number for at, number in wanted.items() if at.topic == topic)


class _Planner:
    def __init__(
        self,
        racks: Mapping[int, str],
        now: Layout,
        wanted: Mapping[Partition, int],
        sizes: Mapping[Partition, int],
    ) -> None:
        self._rack = {broker: rack or f"broker {broker}" for broker, rack in racks.items()}
        self._now = now
        self._wanted = wanted
        self._sizes = sizes
        self._racks = len(set(self._rack.values()))
        self._replicas = {
            at: [broker for broker in now[at] if broker in racks] for at in sorted(now)
        }
        self._kept: dict[int, set[Partition]] = {broker: set() for broker in racks}
        self._of_topic: Counter[tuple[int, str]] = Counter()
        for at, replicas in self._replicas.items():
            for broker in replicas:
                self._kept[broker].add(at)
                self._of_topic[broker, at.topic] += 1

    def layout(self) -> dict[Partition, Replicas]:
        return {at: tuple(replicas) for at, replicas in self._replicas.items()}

    def place(self) -> None:
        """Give each partition its number of replicas, in as many racks as it can."""
        for at, replicas in self._replicas.items():
            while len(replicas) > self._wanted[at]:
                self._drop(at)
            while len(replicas) < self._wanted[at]:
                self._add(at)
            while not self._is_spread(at, replicas):
                self._drop(at)
                self._add(at)

    def spread_replicas(self) -> None:
        """Even out how many replicas the brokers keep."""

        def movable(giver: int, taker: int) -> Iterator[Partition]:
            for at in self._kept[giver] - self._kept[taker]:
                if self._is_spread(at, self._exchanged(at, giver, taker)):
                    yield at

        def rank(at: Partition, giver: int, taker: int) -> Rank:
            # What goes back home, or was about to move anyhow, costs nothing more.
            cost = (giver in self._now[at]) - (taker in self._now[at])
            excess = self._of_topic[giver, at.topic] - self._of_topic[taker, at.topic]
            return cost, -excess, self._sizes.get(at, 0), at

        def move(at: Partition, giver: int, taker: int) -> None:
            self._replicas[at] = self._exchanged(at, giver, taker)
            self._count(at, giver, -1)
            self._count(at, taker, 1)

        counts = {broker: len(kept) for broker, kept in self._kept.items()}
        _even_out(counts, movable, rank, move)

    def spread_leaders(self) -> None:
        """Even out how many partitions the brokers lead, by the order of replicas alone."""
        led: dict[int, set[Partition]] = {broker: set() for broker in self._kept}
        of_topic: Counter[tuple[int, str]] = Counter()
        for at, replicas in self._replicas.items():
            led[replicas[0]].add(at)
            of_topic[replicas[0], at.topic] += 1

        def movable(giver: int, taker: int) -> Iterator[Partition]:
            return iter(led[giver] & self._kept[taker])

        def rank(at: Partition, giver: int, taker: int) -> Rank:
            first = self._now[at][0]
            excess = of_topic[giver, at.topic] - of_topic[taker, at.topic]
            return (giver == first) - (taker == first), -excess, 0, at

        def move(at: Partition, giver: int, taker: int) -> None:
            replicas = self._replicas[at]
            other = replicas.index(taker)
            replicas[0], replicas[other] = taker, giver
            led[giver].remove(at)
            led[taker].add(at)
            of_topic[giver, at.topic] -= 1
            of_topic[taker, at.topic] += 1

        counts = {broker: len(partitions) for broker, partitions in led.items()}
        _even_out(counts, movable, rank, move)

    def _is_spread(self, at: Partition, replicas: list[int]) -> bool:
        racks = {self._rack[broker] for broker in replicas}
        return len(racks) == min(self._wanted[at], self._racks)

    def _exchanged(self, at: Partition, giver: int, taker: int) -> list[int]:
        return [taker if broker == giver else broker for broker in self._replicas[at]]

    def _add(self, at: Partition) -> None:
        replicas = self._replicas[at]
        racks = {self._rack[broker] for broker in replicas}

        def rank(broker: int) -> tuple[bool, int, int, int]:
            of_topic = self._of_topic[broker, at.topic]
            return self._rack[broker] in racks, len(self._kept[broker]), of_topic, broker

        broker = min(self._kept.keys() - set(replicas), key=rank)
        replicas.append(broker)
        self._count(at, broker, 1)

    def _drop(self, at: Partition) -> None:
        replicas = self._replicas[at]
        racks = Counter(self._rack[broker] for broker in replicas)

        def rank(broker: int) -> tuple[bool, int, int]:
            return racks[self._rack[broker]] > 1, len(self._kept[broker]), replicas.index(broker)

        broker = max(replicas, key=rank)
        replicas.remove(broker)
        self._count(at, broker, -1)

    def _count(self, at: Partition, broker: int, change: int) -> None:
        (self._kept[broker].add if change > 0 else self._kept[broker].remove)(at)
        self._of_topic[broker, at.topic] += change


def _even_out(
    counts: dict[int, int],
    movable: Callable[[int, int], Iterator[Partition]],
    rank: Callable[[Partition, int, int], Rank],
    move: Callable[[Partition, int, int], None],
) -> None:
    """Move one after another from who has most to who has least, as long as that evens counts out.

    Where no partition may go straight from one to the other, it goes by way of others: along a
    shortest path each step may be taken as if it were the only one, since two steps that share a
    partition could be one. When no path is left, the sum of the squares is as small as can be.
    """

    def is_open(giver: int, taker: int) -> bool:
        return next(movable(giver, taker), None) is not None

    while path := _shortest_path(counts, is_open):
        steps = [
            (min(movable(giver, taker), key=lambda at: rank(at, giver, taker)), giver, taker)
            for giver, taker in pairwise(path)
        ]
        for step in steps:
            move(*step)
        counts[path[0]] -= 1
        counts[path[-1]] += 1


def _shortest_path(counts: Mapping[int, int], is_open: Callable[[int, int], bool]) -> list[int]:
    """The brokers from one to another that has at least two less; of the shortest, who has most."""
    by_count = sorted(counts, key=lambda broker: (counts[broker], broker))
    least = counts[by_count[0]]
    sources = [broker for broker in reversed(by_count) if counts[broker] - least >= 2]
    for source in sources:
        for target in by_count:
            if counts[source] - counts[target] < 2:
                break
            if is_open(source, target):
                return [source, target]
    paths = [_path_from(source, by_count, counts, is_open) for source in sources]
    return min(filter(None, paths), key=len, default=[])


def _path_from(
    source: int,
    takers: Sequence[int],
    counts: Mapping[int, int],
    is_open: Callable[[int, int], bool],
) -> list[int]:
    """The shortest one to a broker that has at least two less, or none: to the least of them."""
    came_from = {source: source}
    queue = deque([source])
    while queue:
        giver = queue.popleft()
        for taker in takers:
            if taker in came_from or not is_open(giver, taker):
                continue
            came_from[taker] = giver
            if counts[source] - counts[taker] >= 2:
                return _back(taker, came_from)
            queue.append(taker)
    return []


def _back(end: int, came_from: Mapping[int, int]) -> list[int]:
    path = [end]
    while came_from[path[-1]] != path[-1]:
        path.append(came_from[path[-1]])
    return path[::-1]


def copies(now: Layout, plan: Layout) -> dict[Partition, set[int]]:
    """The brokers that each partition of a plan is copied to; none where only its order changes."""
    return {at: set(replicas) - set(now[at]) for at, replicas in plan.items()}


def shares(layout: Layout, brokers: Iterable[int]) -> dict[int, tuple[int, int]]:
    """How many replicas each broker keeps, and of how many partitions it is the first."""
    kept = Counter(broker for replicas in layout.values() for broker in replicas)
    first = Counter(replicas[0] for replicas in layout.values())
    return {broker: (kept[broker], first[broker]) for broker in brokers}
