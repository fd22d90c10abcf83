"""The module kafka_rebalance against three real brokers, called by Ansible as a play calls it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from iot_lab.processes import Broker, wait_for

TOPIC = "much"
OFFSETS = "__consumer_offsets"  # of four partitions, as the nodes are set
PARTITIONS = 6
RECORD = b"x" * 10_000
FILLED = 300  # records
# In bytes per second. Slow is less than comes in, also on a busy machine: what moves keeps moving.
SLOW, FAST = 20_000, 1_000_000_000


class Node(Broker):
    """One of several brokers; the first is the controller too."""

    def __init__(self, folder: Path, number: int, first: "Node | None" = None) -> None:
        super().__init__(folder)
        self.number = number
        self._first = first

    def _properties(self) -> dict[str, str]:
        own = {
            **super()._properties(),
            "node.id": str(self.number),
            "offsets.topic.replication.factor": "2",
            # A throttled broker fetches once, then waits. Once must not be all there is.
            "replica.fetch.response.max.bytes": "100000",
        }
        if self._first is None:
            return own
        listener = f"PLAINTEXT://{self.bootstrap_servers}"
        return {
            **own,
            "process.roles": "broker",
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{self._first._controller_port}",
            "listeners": listener,
            "advertised.listeners": listener,
        }

    def _format_arguments(self) -> list[str]:
        how = "--no-initial-controllers" if self._first else "--standalone"
        return [how, "--cluster-id=rebalance-of-test-idsA"]


class Cluster:
    """Three nodes, and a topic that two of them keep; records are sent to it until it is closed."""

    def __init__(self, folder: Path) -> None:
        first = Node(folder / "1", 1)
        self.nodes = [first, Node(folder / "2", 2, first), Node(folder / "3", 3, first)]
        self.confirmed: Counter[int] = Counter()
        self.errors: list[BaseException] = []
        self._stop = Event()
        self._sender = Thread(target=self._send)

    @property
    def servers(self) -> str:
        return ",".join(node.bootstrap_servers for node in self.nodes)

    def fill(self) -> None:
        assignments = {number: [1, 2] if number % 2 else [2, 1] for number in range(PARTITIONS)}
        with self.admin() as admin:
            admin.create_topics({TOPIC: {"assignments": assignments}}, wait_for_metadata=True)
        self._sender.start()
        wait_for(lambda: self.errors or sum(self.confirmed.values()) >= FILLED, "some records")

    def _send(self) -> None:
        producer = KafkaProducer(bootstrap_servers=self.servers, acks="all", linger_ms=5)
        try:
            # Quickly what there is to move, then more than SLOW and no more: all of it is copied.
            while not self._stop.wait(0.05 if sum(self.confirmed.values()) < FILLED else 0.5):
                sent = [producer.send(TOPIC, RECORD, partition=n) for n in range(PARTITIONS)]
                for future in sent:
                    self.confirmed[future.get(timeout=30).partition] += 1
        except BaseException as error:  # noqa: BLE001 - the test shows it
            self.errors.append(error)
        finally:
            producer.close()

    def close(self) -> None:
        self._stop.set()
        if self._sender.ident:
            self._sender.join()

    def admin(self) -> Any:
        return self.nodes[0].admin()

    def up(self) -> int:
        with self.admin() as admin:
            return sum(not each["is_fenced"] for each in admin.describe_cluster()["brokers"])

    def replicas(self, name: str = TOPIC) -> dict[int, list[int]]:
        with self.admin() as admin:
            (topic,) = admin.describe_topics([name])
        return {each["partition_index"]: each["replica_nodes"] for each in topic["partitions"]}

    def moving(self) -> Mapping[Any, Any]:
        with self.admin() as admin:
            found: Mapping[Any, Any] = admin.list_partition_reassignments()
            return found

    def throttled(self) -> list[str]:
        asked = [ConfigResource(ConfigResourceType.TOPIC, TOPIC)]
        asked += [ConfigResource(ConfigResourceType.BROKER, str(number)) for number in (1, 2, 3)]
        with self.admin() as admin:
            found = admin.describe_configs(asked)
        return [
            f"{name} {key}"
            for kind in found.values()
            for name, settings in kind.items()
            for key in settings
            if "throttled" in key
        ]


def kept(replicas: Mapping[int, list[int]]) -> Counter[int]:
    return Counter(broker for each in replicas.values() for broker in each)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"))
        for node in cluster.nodes:
            stack.callback(node.kill)
            node.start()
        for node in cluster.nodes:
            node.wait_ready()
        wait_for(lambda: cluster.up() == 3, "three brokers")
        stack.callback(cluster.close)
        cluster.fill()
        yield cluster


@pytest.fixture
def rebalance(cluster: Cluster, ansible_module: Callable[..., dict[str, Any]]) -> Any:
    def call(check: bool = False, until: Any = None, **options: Any) -> dict[str, Any]:
        parameters = {"bootstrap_servers": cluster.servers, "timeout": 10, "patience": 60}
        return ansible_module("kafka_rebalance", parameters | options, check=check, until=until)

    return call


def test_a_third_broker_gets_its_share_and_gives_it_back(
    cluster: Cluster, rebalance: Callable[..., dict[str, Any]]
) -> None:
    before = cluster.replicas()
    plan = rebalance()
    assert plan["plan"][0].startswith("4 replicas to copy, "), plan["output"]
    assert plan["changed"] is False
    assert rebalance(state="moved", check=True)["changed"] is True
    assert (cluster.replicas(), cluster.moving()) == (before, {})

    # Throttled, and cut off while partitions move: the brokers go on, and the throttle stays.
    rebalance(state="moved", throttle=SLOW, until=cluster.moving)
    assert len(cluster.moving()) == 4
    assert len(cluster.throttled()) == 8
    assert "4 partitions are on their way" in rebalance()["msg"]

    done = rebalance(state="moved", throttle=FAST)
    assert done["done"] is True, done["output"]
    assert "4 partitions are on their way" in done["output"], "no progress was shown"
    after = cluster.replicas()
    assert kept(after) == {1: 4, 2: 4, 3: 4}
    assert Counter(replicas[0] for replicas in after.values()) == {1: 2, 2: 2, 3: 2}
    assert (cluster.moving(), cluster.throttled()) == ({}, [])
    assert rebalance(state="moved")["changed"] is False

    # Slower than records come in: it is given up, and what is under way can be taken back.
    stuck = rebalance(state="moved", throttle=SLOW, retire=["3"], patience=5)
    assert "No progress for " in stuck["msg"], stuck["output"]
    assert cluster.moving()
    assert rebalance(state="cancelled")["changed"] is True
    assert kept(cluster.replicas()) == kept(after)
    assert (cluster.moving(), cluster.throttled()) == ({}, [])

    plan = rebalance(retire=["3"])
    retired = rebalance(state="moved", throttle=FAST, retire=["3"])
    assert retired["done"] is True, retired["output"]
    assert plan["shares"][2].startswith("127.0.0.1: replicas 4 → 0, ")
    assert kept(cluster.replicas()) == {1: 6, 2: 6}
    assert cluster.throttled() == []

    cluster.close()
    assert cluster.errors == []
    assert Counter(each.partition for each in cluster.nodes[0].records(TOPIC)) == cluster.confirmed


def test_a_topic_gets_the_replicas_that_are_declared(
    cluster: Cluster, rebalance: Callable[..., dict[str, Any]]
) -> None:
    wanted = {TOPIC: 3, "unknown": 3}
    consumer = KafkaConsumer(bootstrap_servers=cluster.servers, group_id="group")
    consumer.commit({TopicPartition(TOPIC, 0): OffsetAndMetadata(1, "", -1)})
    consumer.close()
    done = rebalance(state="moved", replication_factors=wanted | {OFFSETS: 1})
    assert done["done"] is True, done["output"]
    assert kept(cluster.replicas()) == {1: 6, 2: 6, 3: 6}
    assert sum(kept(cluster.replicas(OFFSETS)).values()) == 4

    # Of Kafka's own topics the brokers' settings say it.
    assert rebalance(state="moved", replication_factors=wanted)["done"] is True
    assert sum(kept(cluster.replicas(OFFSETS)).values()) == 8


def test_what_cannot_be_is_refused(
    cluster: Cluster, rebalance: Callable[..., dict[str, Any]]
) -> None:
    assert "9 cannot retire: this cluster's brokers are " in rebalance(retire=["9"])["msg"]
    few = rebalance(state="moved", retire=["1", "2"])
    assert f"1 brokers cannot keep the replicas of {OFFSETS} (2 each), {TOPIC} (3" in few["msg"]
    strange = rebalance(brokers=["1", "2"])
    assert "127.0.0.1 (3) is a broker of this cluster and not of the inventory" in strange["msg"]
    new = rebalance(brokers=["1", "2", "3", "4"])
    assert "4 is no broker of this cluster yet" in new["msg"]

    cluster.nodes[2].kill()
    told = "127.0.0.1 (3) is down: start it, or retire it"
    wait_for(lambda: told in rebalance(state="moved")["msg"], "the loss to be noticed")
    # It has lost its host; its partitions get other replicas.
    dead = rebalance(state="moved", retire=["3"], replication_factors={TOPIC: 2})
    assert dead["done"] is True, dead["output"]
    assert kept(cluster.replicas()) == {1: 6, 2: 6}
