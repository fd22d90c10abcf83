"""Ansible module: tell how a Kafka cluster is, though part of it may not answer."""

from __future__ import annotations

import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.kafka_access import (
    ARGUMENTS,
    Client,
    Connection,
    Refused,
    explain_connection,
)

DOCUMENTATION = """
module: kafka_state
short_description: Tell how a Kafka cluster is
description:
  - Asks every broker by itself, all at the same time, so that those that do not answer keep nobody
    waiting for longer than C(timeout) for each of a few questions.
  - Changes nothing, and fails only where its settings are wrong.
  - Needs the Python package kafka-python (3.0 or newer) on the host it runs on.
options:
  bootstrap_servers:
    description: All brokers, as C(host:port), separated by commas. The first that answers tells
      what the cluster's brokers and partitions are.
    type: str
    required: true
  client:
    description: How to connect, see the module kafka_topics.
    type: dict
    default: {}
  groups:
    description: Consumer groups, and the topics that each reads.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The group's name.
        type: str
        required: true
      topics:
        description: Topics that it reads.
        type: list
        elements: str
        required: true
  timeout:
    description: Seconds to wait for an answer.
    type: int
    default: 30
"""

EXAMPLES = """
- name: Look at the cluster
  kafka_state:
    bootstrap_servers: broker-1:9092,broker-2:9092
    groups:
      - name: iot-storage
        topics: [iot-topic, iot-predictions]
    timeout: 2
"""

RETURN = """
answers:
  description: What keeps each broker from answering, by C(host:port); empty for one that does.
  type: dict
brokers:
  description: Brokers that are in the cluster, each with C(id) and C(host).
  type: list
quorum:
  description: C(leader) by its id, C(voters), each with C(id), C(host), C(lag) in records and
    C(silent) in seconds, or an C(error).
  type: dict
partitions:
  description: Partitions, each with C(topic), C(partition), C(leader), C(replicas), C(isr),
    C(min_isr), and, where the leader answers, C(begin) and C(end), its first offset and the one
    after its last.
  type: list
groups:
  description: Groups, each with C(name), C(state), C(members), or an C(error), and C(partitions),
    each with C(topic), C(partition), the committed C(offset), C(lag) in records, C(seconds), the
    age of the oldest of these, and C(moved), whether the offset grew within two seconds, asked only
    where records are old.
  type: list
"""

METADATA_LOG = "__cluster_metadata"
TOPIC = 2  # a kind of resource of DescribeConfigs
EARLIEST, LATEST = -2, -1  # what ListOffsets takes for a time
# Enough for the head of a batch of records, which has the time of its first one.
HEAD_BYTES = 1024
BASE_TIMESTAMP = 27  # its place in the head, in bytes

# Where records are older than this, whether anybody works on them shows within a pause.
OLD_SECONDS = 5.0
PAUSE_SECONDS = 2.0

Partition = tuple[str, int]
"""Topic and number."""


class Brokers:
    """Connections to all brokers that answer, by server."""

    def __init__(self, client: Client, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._connections: dict[str, Connection] = {}
        self._pool = ThreadPoolExecutor(max_workers=32)
        self.problems: dict[str, str] = {}
        """What keeps servers from answering; empty for those that do."""

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections.values():
            connection.close()
        self._pool.shutdown()

    def connect(self, servers: Iterable[str]) -> None:
        """Log in at those that are new. Raises ValueError where a setting is wrong."""
        new = [server for server in servers if server not in self.problems]
        self.problems |= dict.fromkeys(new, "")
        list(self._pool.map(self._connect, new))

    def _connect(self, server: str) -> None:
        client = self._client
        try:
            connection = Connection(server, client.tls(), self._timeout)
            self._connections[server] = connection
            if client.has_users:
                connection.log_in(client.sasl_mechanism, client.username, client.password)
        except Refused as error:
            self._give_up(server, f"it does not let in {client.username}: {error}")
        except OSError as error:
            self._give_up(server, explain(error))

    def _give_up(self, server: str, problem: str) -> None:
        """Ask a server nothing more: its next answer would be that to the last question."""
        self.problems[server] = problem
        connection = self._connections.pop(server, None)
        if connection:
            connection.close()

    def ask(self, questions: Mapping[str, Any]) -> dict[str, Any]:
        """Ask each server its question, all at once. Returns the answers of those that answer."""

        def ask(server: str) -> Any:
            try:
                return self._connections[server].ask(questions[server]).to_dict(json=False)
            except OSError as error:
                self._give_up(server, explain(error))
                return None

        servers = [server for server in questions if server in self._connections]
        answers = zip(servers, self._pool.map(ask, servers), strict=True)
        return {server: answer for server, answer in answers if answer is not None}

    def ask_all(self, make: Callable[[], Any]) -> dict[str, Any]:
        """Ask all servers the same."""
        return self.ask({server: make() for server in self._connections})

    def ask_first(self, make: Callable[[], Any]) -> Any:
        """Ask one server after the other, and return the first answer, or None."""
        for server in list(self._connections):
            for answer in self.ask({server: make()}).values():
                return answer
        return None


def explain(error: OSError) -> str:
    """Say why a server does not answer; TLS has many words for one that says nothing."""
    return "timed out" if isinstance(error, TimeoutError) else explain_connection(error)


def error_name(code: int) -> str:
    """Return what Kafka calls an error; empty for none."""
    from kafka.errors import for_code

    return for_code(code).__name__ if code else ""


def metadata_request() -> Any:
    """Ask for brokers and partitions."""
    from kafka.protocol.metadata import MetadataRequest

    return MetadataRequest(topics=None, allow_auto_topic_creation=False, version=9)


def quorum_request() -> Any:
    """Ask for the controllers; a broker asks their leader."""
    from kafka.protocol.admin import DescribeQuorumRequest as Request

    partition = Request.TopicData.PartitionData(partition_index=0)
    topic = Request.TopicData(topic_name=METADATA_LOG, partitions=[partition])
    return Request(topics=[topic], version=2)


def quorum(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the first of the answers with a leader says of the controllers."""
    error = "no broker answers"
    for answer in answers:
        partitions = [p for topic in answer["topics"] for p in topic["partitions"]]
        code = answer["error_code"] or next((p["error_code"] for p in partitions), 0)
        if code or not partitions or partitions[0]["leader_id"] < 0:
            error = error_name(code) or "the controllers have no leader"
            continue
        found = partitions[0]
        hosts = {
            node["node_id"]: node["listeners"][0]["host"]
            for node in answer["nodes"]
            if node["listeners"]
        }
        voters = found["current_voters"]
        leader = next(v for v in voters if v["replica_id"] == found["leader_id"])
        # By the leader's clock, which it shows as the time at which it itself has caught up.
        now = leader["last_caught_up_timestamp"]
        return {
            "leader": found["leader_id"],
            "voters": [
                {
                    "id": voter["replica_id"],
                    "host": hosts.get(voter["replica_id"], ""),
                    "lag": leader["log_end_offset"] - max(0, voter["log_end_offset"]),
                    "silent": silence(voter, now) if voter is not leader else 0.0,
                }
                for voter in voters
            ],
        }
    return {"error": error, "voters": []}


def ask_quorum(brokers: Brokers, servers: Iterable[str]) -> dict[str, Any]:
    """Ask the brokers for the controllers."""
    brokers.connect(servers)
    return quorum(brokers.ask_all(quorum_request).values())


def silence(voter: Mapping[str, Any], now: int) -> float | None:
    """Return the seconds since a voter last asked its leader, or None if it never has."""
    asked: int = voter["last_fetch_timestamp"]
    return None if asked < 0 else max(0.0, (now - asked) / 1000)


def min_isr_request(topics: Iterable[str]) -> Any:
    """Ask for the number of replicas that must be in sync."""
    from kafka.protocol.admin import DescribeConfigsRequest as Request

    resources = [
        Request.DescribeConfigsResource(
            resource_type=TOPIC, resource_name=name, configuration_keys=["min.insync.replicas"]
        )
        for name in topics
    ]
    return Request(resources=resources, version=4)


def min_isr(answer: Mapping[str, Any]) -> dict[str, int]:
    """Return it by topic."""
    return {
        resource["resource_name"]: int(config["value"])
        for resource in answer["results"]
        for config in resource["configs"]
    }


def by_topic(partitions: Iterable[Partition]) -> dict[str, list[int]]:
    """Return the numbers of partitions by topic."""
    found = defaultdict(list)
    for topic, number in partitions:
        found[topic].append(number)
    return found


def offsets_request(partitions: Iterable[Partition], moment: int) -> Any:
    """Ask for the offsets of partitions at a time."""
    from kafka.protocol.consumer import ListOffsetsRequest as Request

    topics = [
        Request.ListOffsetsTopic(
            name=topic,
            partitions=[
                Request.ListOffsetsTopic.ListOffsetsPartition(
                    partition_index=number, timestamp=moment
                )
                for number in numbers
            ],
        )
        for topic, numbers in by_topic(partitions).items()
    ]
    return Request(replica_id=-1, topics=topics, version=5)


def offsets(answers: Iterable[Mapping[str, Any]]) -> dict[Partition, int]:
    """Return the offsets by partition; a broker that has just lost one tells none of it."""
    return {
        (topic["name"], partition["partition_index"]): partition["offset"]
        for answer in answers
        for topic in answer["topics"]
        for partition in topic["partitions"]
        if not partition["error_code"]
    }


def heads_request(places: Mapping[Partition, int]) -> Any:
    """Ask for the head of the batch that holds the record at an offset, of partitions."""
    from kafka.protocol.consumer import FetchRequest as Request

    topics = [
        Request.FetchTopic(
            topic=topic,
            partitions=[
                Request.FetchTopic.FetchPartition(
                    partition=number,
                    fetch_offset=places[topic, number],
                    partition_max_bytes=HEAD_BYTES,
                )
                for number in numbers
            ],
        )
        for topic, numbers in by_topic(places).items()
    ]
    return Request(
        replica_id=-1,
        max_wait_ms=0,
        min_bytes=0,
        max_bytes=HEAD_BYTES * len(places),
        topics=topics,
        version=11,
    )


def times(answers: Iterable[Mapping[str, Any]]) -> dict[Partition, float]:
    """Return when the records were sent, as seconds since 1970, by partition.

    It is that of the first record of the same batch, which no slow network can make much older.
    """
    return {
        (topic["topic"], partition["partition_index"]): struct.unpack_from(
            ">q", partition["records"], BASE_TIMESTAMP
        )[0]
        / 1000
        for answer in answers
        for topic in answer["responses"]
        for partition in topic["partitions"]
        if partition["records"] and len(partition["records"]) >= BASE_TIMESTAMP + 8
    }


def coordinators_request(groups: Iterable[str]) -> Any:
    """Ask which brokers keep groups."""
    from kafka.protocol.metadata import FindCoordinatorRequest

    return FindCoordinatorRequest(key_type=0, coordinator_keys=list(groups), version=4)


def members_request(groups: Iterable[str]) -> Any:
    """Ask who is in groups."""
    from kafka.protocol.admin import DescribeGroupsRequest

    return DescribeGroupsRequest(groups=list(groups), version=5)


def committed_request(group: str) -> Any:
    """Ask where a group stands, in all of its topics."""
    from kafka.protocol.consumer import OffsetFetchRequest

    return OffsetFetchRequest(group_id=group, topics=None, version=5)


def committed(answer: Mapping[str, Any]) -> dict[Partition, int]:
    """Return the offsets that a group will go on from, by partition."""
    return {
        (topic["name"], partition["partition_index"]): partition["committed_offset"]
        for topic in answer["topics"]
        for partition in topic["partitions"]
        if partition["committed_offset"] >= 0
    }


class Cluster:
    """What is asked of the brokers, in the order in which one answer needs another."""

    def __init__(self, brokers: Brokers, groups: Mapping[str, list[str]]) -> None:
        self._brokers = brokers
        self._wanted = groups
        self._servers: dict[int, str] = {}
        self._leaders: dict[Partition, int] = {}
        self._begins: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}

    def look(self) -> dict[str, Any]:
        """Return the module's result."""
        brokers = self._brokers
        metadata = next(iter(brokers.ask_all(metadata_request).values()), None)
        if metadata is None:
            return {"answers": brokers.problems, "brokers": [], "partitions": [], "groups": []}
        self._servers = {
            node["node_id"]: f"{node['host']}:{node['port']}" for node in metadata["brokers"]
        }
        # Where brokers are known by other names than those that we were given.
        brokers.connect(self._servers.values())
        topics = [topic for topic in metadata["topics"] if not topic["error_code"]]
        names = [topic["name"] for topic in topics]
        in_sync = min_isr(brokers.ask_first(lambda: min_isr_request(names)) or {"results": []})
        self._leaders = {
            (topic["name"], partition["partition_index"]): partition["leader_id"]
            for topic in topics
            if not topic["is_internal"]
            for partition in topic["partitions"]
        }
        self._begins = offsets(self._ask_leaders(self._leaders, EARLIEST))
        self._ends = offsets(self._ask_leaders(self._leaders, LATEST))
        groups = self._groups()
        return {
            "answers": brokers.problems,
            "brokers": [
                {"id": node["node_id"], "host": node["host"]} for node in metadata["brokers"]
            ],
            "partitions": [
                {
                    "topic": topic["name"],
                    "partition": partition["partition_index"],
                    "leader": partition["leader_id"],
                    "replicas": partition["replica_nodes"],
                    "isr": partition["isr_nodes"],
                    "min_isr": in_sync.get(topic["name"]),
                    "begin": self._begins.get((topic["name"], partition["partition_index"])),
                    "end": self._ends.get((topic["name"], partition["partition_index"])),
                }
                for topic in topics
                for partition in topic["partitions"]
            ],
            "groups": groups,
        }

    def _by_server(self, leaders: Mapping[Any, int]) -> dict[str, list[Any]]:
        """Return things by the server that is to be asked for them."""
        found = defaultdict(list)
        for thing, node in leaders.items():
            if node in self._servers:
                found[self._servers[node]].append(thing)
        return found

    def _ask_leaders(self, leaders: Mapping[Partition, int], moment: int) -> list[Any]:
        questions = {
            server: offsets_request(partitions, moment)
            for server, partitions in self._by_server(leaders).items()
        }
        return list(self._brokers.ask(questions).values())

    def _groups(self) -> list[dict[str, Any]]:
        if not self._wanted:
            return []
        answer = self._brokers.ask_first(lambda: coordinators_request(self._wanted))
        found = {c["key"]: c for c in (answer or {"coordinators": []})["coordinators"]}
        keepers = {name: c["node_id"] for name, c in found.items() if not c["error_code"]}
        questions = {
            server: members_request(names) for server, names in self._by_server(keepers).items()
        }
        members = {
            group["group_id"]: group
            for answer in self._brokers.ask(questions).values()
            for group in answer["groups"]
        }
        places = self._committed(keepers)
        groups = [
            self._group(name, members.get(name), places[name])
            if name in places
            else {
                "name": name,
                "error": error_name(found[name]["error_code"] if name in found else 0)
                or "the broker that keeps it does not answer",
                "partitions": [],
            }
            for name in self._wanted
        ]
        self._look_again(groups, keepers)
        return groups

    def _committed(self, keepers: Mapping[str, int]) -> dict[str, dict[Partition, int]]:
        """Return where groups stand, of those whose brokers answer."""
        places = {}
        for name, node in keepers.items():
            server = self._servers.get(node, "")
            for answer in self._brokers.ask({server: committed_request(name)}).values():
                if not answer["error_code"]:
                    places[name] = committed(answer)
        return places

    def _look_again(self, groups: list[dict[str, Any]], keepers: Mapping[str, int]) -> None:
        """See a little later which of the partitions with old records were worked on."""
        old = [
            (group["name"], partition)
            for group in groups
            for partition in group["partitions"]
            if (partition["seconds"] or 0.0) > OLD_SECONDS
        ]
        if not old:
            return
        time.sleep(PAUSE_SECONDS)
        places = self._committed({name: keepers[name] for name, _ in old})
        for name, partition in old:
            if name in places:
                place = places[name].get((partition["topic"], partition["partition"]), 0)
                partition["moved"] = place > partition["offset"]

    def _group(
        self, name: str, group: Mapping[str, Any] | None, at: Mapping[Partition, int]
    ) -> dict[str, Any]:
        # Where a group has never been, it begins with what there is.
        places = {
            partition: max(at.get(partition, begin), begin)
            for partition, begin in self._begins.items()
            if partition[0] in self._wanted[name] and partition in self._ends
        }
        waiting = {p: place for p, place in places.items() if place < self._ends[p]}
        leaders = self._by_server({p: self._leaders[p] for p in waiting})
        questions = {
            server: heads_request({p: waiting[p] for p in partitions})
            for server, partitions in leaders.items()
        }
        sent = times(self._brokers.ask(questions).values())
        now = time.time()

        def age(partition: Partition) -> float | None:
            if partition in sent:
                return round(max(0.0, now - sent[partition]), 1)
            return None if partition in waiting else 0.0

        return {
            "name": name,
            "state": group["group_state"] if group else "",
            "members": len(group["members"]) if group else 0,
            "partitions": [
                {
                    "topic": partition[0],
                    "partition": partition[1],
                    "offset": place,
                    "lag": max(0, self._ends[partition] - place),
                    "seconds": age(partition),
                    "moved": None,
                }
                for partition, place in sorted(places.items())
            ],
        }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            **ARGUMENTS,
            "groups": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "topics": {"type": "list", "elements": "str", "required": True},
                },
            },
        },
        supports_check_mode=True,
    )
    try:
        import kafka  # noqa: F401
    except ImportError as error:
        module.fail_json(msg=missing_required_lib("kafka-python"), exception=str(error))
    parameters = module.params
    servers = [server.strip() for server in parameters["bootstrap_servers"].split(",")]
    groups = {group["name"]: group["topics"] for group in parameters["groups"]}
    try:
        client = Client(**{key: value for key, value in parameters["client"].items() if value})
        # Apart: a broker that waits in vain for the controllers does answer all other questions.
        brokers, others = (Brokers(client, parameters["timeout"]) for _ in range(2))
        with closing(brokers), closing(others), ThreadPoolExecutor(max_workers=1) as pool:
            asked = pool.submit(ask_quorum, others, servers)
            brokers.connect(servers)
            state = Cluster(brokers, groups).look()
            state["quorum"] = asked.result()
    except ValueError as error:
        module.fail_json(msg=f"The cluster at {', '.join(servers)} was not looked at: {error}")
    module.exit_json(changed=False, **state)


if __name__ == "__main__":
    main()
