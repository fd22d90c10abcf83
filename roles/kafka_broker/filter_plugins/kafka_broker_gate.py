"""What speaks against a restart, from what Kafka's tools tell of a cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

PARTITION = re.compile(
    r"Topic: (?P<topic>\S+)\s+Partition: (?P<number>\d+)\s+Leader: (?P<leader>\S+)"
    r"\s+Replicas: (?P<replicas>[\d,]+)\s+Isr: (?P<isr>[\d,]*)"
)

MOST_RECORDS_BEHIND = 1000  # of the metadata log


def ids(text: str) -> set[int]:
    """Return the numbers of brokers."""
    return {int(number) for number in text.split(",") if number}


def lacking(partition: re.Match[str]) -> set[int]:
    """Return the brokers that a partition lacks: all of its own where none of them leads."""
    led = partition["leader"] != "none"
    return ids(partition["replicas"]) - (ids(partition["isr"]) if led else set())


def kafka_broker_lacking(described: str, spared: int | str = -1) -> list[str]:
    """Name the partitions that lack a replica, and the brokers that they lack.

    `described` is what `kafka-topics.sh --describe` prints with `--under-replicated-partitions` or
    `--unavailable-partitions`. A partition that lacks the broker `spared` alone is left out: it
    loses nothing by a restart of that one. A line of another form is returned as it is.
    """
    found = []
    for line in filter(None, map(str.strip, described.splitlines())):
        partition = PARTITION.search(line)
        if not partition:
            found.append(line)
        elif (missing := lacking(partition)) != {int(spared)}:
            # The leader it has may be away.
            brokers = ", ".join(map(str, sorted(missing))) or "its leader"
            found.append(f"{partition['topic']}-{partition['number']} lacks {brokers}")
    return found


def kafka_broker_missing(described: str) -> list[int]:
    """Return the brokers that partitions lack, of what `kafka-topics.sh --describe` prints."""
    return sorted(set().union(*map(lacking, PARTITION.finditer(described))))


def kafka_broker_behind(described: str, spared: int | str = -1) -> list[str]:
    """Name the controllers that do not follow their leader, or say that there is none.

    `described` is what `kafka-metadata-quorum.sh describe --replication` prints: a line for each
    controller and broker. The controller `spared` is left out.
    """
    head, *lines = [line.split() for line in described.splitlines() if line.strip()] or [[]]
    rows = [dict(zip(head, line, strict=False)) for line in lines]
    if "Leader" not in [row.get("Status") for row in rows]:
        return ["the controllers have no leader"]
    return [
        f"controller {row['NodeId']} is {row['Lag']} records behind its leader"
        for row in rows
        if row["Status"] == "Follower"
        and int(row["Lag"]) >= MOST_RECORDS_BEHIND
        and int(row["NodeId"]) != int(spared)
    ]


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by their names."""
        named = (kafka_broker_lacking, kafka_broker_missing, kafka_broker_behind)
        return {each.__name__: each for each in named}
