"""Ansible module: give each broker of a Kafka cluster its share of the partitions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kafka_access import Access, open_access, serve
from ansible.module_utils.kafka_partitions import (
    Layout,
    Partition,
    Replicas,
    copies,
    plan_layout,
    shares,
)

DOCUMENTATION = """
module: kafka_rebalance
short_description: Give each broker of a Kafka cluster its share of the partitions
description:
  - Plans which replicas have to move so that each broker keeps as many and leads as many partitions
    as the others, in as many racks as possible, and moves no more than that needs. Kafka's own
    topics are included.
  - Brokers that are to retire keep nothing. Topics get the replication factor that is declared.
  - Moves all at once, throttled. A run that was cut off leaves the moves to the brokers; the next
    one waits for them, removes the throttle, and sees what is left to do.
  - Refuses what cannot be, such as fewer brokers than replicas, and to move anything while a broker
    is down that is to stay.
  - With I(state=moved) it takes one step and says how far things are. In a play, an action plugin
    of the same name has it take steps until all is done, and prints what each says.
  - Needs the Python package kafka-python (3.0 or newer) on the host it runs on.
options:
  bootstrap_servers:
    description: Brokers to ask first, as C(host:port), separated by commas.
    type: str
    required: true
  client:
    description: How to connect. C(security_protocol) is C(PLAINTEXT), C(SSL) or C(SASL_SSL);
      C(sasl_mechanism) is C(SCRAM-SHA-512) or C(PLAIN), with C(username) and C(password);
      C(ca_file) names the authorities that are trusted, else it is those of the system;
      C(certificate_file) and C(key_file) show who we are to brokers that ask for a certificate.
    type: dict
    default: {}
  state:
    description: C(planned) says what would move. C(moved) moves it. C(cancelled) takes back what is
      under way; what has arrived stays. The last two remove the throttle in the end.
    type: str
    choices: [planned, moved, cancelled]
    default: planned
  brokers:
    description: The hosts of all brokers, as they are advertised. Each must be up, and no other one
      be there, but for those that retire. Empty takes the cluster as it is.
    type: list
    elements: str
    default: []
  retire:
    description: Brokers that are to keep nothing, each by its host or its id. They may be down.
    type: list
    elements: str
    default: []
  replication_factors:
    description: How many replicas each partition of a topic shall have, by the topic's name. Others
      keep what they have; Kafka's own topics get what the brokers' settings say.
    type: dict
    default: {}
  throttle:
    description: Bytes per second that moves may take of each broker, in and out; 0 sets no limit.
    type: int
    default: 50000000
  patience:
    description: Seconds without any progress after which a play gives up.
    type: int
    default: 600
  timeout:
    description: Seconds to wait for a broker, and for each change.
    type: int
    default: 30
"""

EXAMPLES = """
- name: Take all partitions off a broker
  kafka_rebalance:
    bootstrap_servers: broker-1:9092,broker-2:9092
    retire: [broker-4]
    state: moved
"""

RETURN = """
done:
  description: Whether nothing is left to do.
  type: bool
remaining:
  description: While partitions move, how many still do, and the bytes to be copied yet.
  type: list
plan:
  description: What has to move, each as one line.
  type: list
shares:
  description: How many replicas each broker keeps and leads, now and then, each as one line.
  type: list
"""

RATES = ("leader.replication.throttled.rate", "follower.replication.throttled.rate")
"""Of a broker: bytes per second, for the partitions that its topics name."""
THROTTLED = ("leader.replication.throttled.replicas", "follower.replication.throttled.replicas")
"""Of a topic: from which and to which of its replicas the rates count."""

FACTORS = {
    "__consumer_offsets": "offsets.topic.replication.factor",
    "__transaction_state": "transaction.state.log.replication.factor",
    "__share_group_state": "share.coordinator.state.topic.replication.factor",
}
"""Kafka's own topics, and what says how many replicas they shall have."""

LINES = 60
"""More moves than these are not worth reading one by one."""


@dataclass(frozen=True)
class Broker:
    """One that the cluster knows; it may be down."""

    host: str
    rack: str
    is_up: bool


@dataclass(frozen=True)
class Move:
    """What is under way with a partition."""

    adding: frozenset[int]
    removing: frozenset[int]


@dataclass(frozen=True)
class Cluster:
    """What the brokers say."""

    brokers: Mapping[int, Broker]
    replicas: Layout
    in_sync: Mapping[Partition, frozenset[int]]
    leaders: Mapping[Partition, int]
    """Of those that have one."""
    moves: Mapping[Partition, Move] = field(default_factory=dict)
    sizes: Mapping[Partition, Mapping[int, int]] = field(default_factory=dict)
    """In bytes, by broker."""

    def name(self, broker: int) -> str:
        """The broker's host, or its id where that is all there is."""
        return self.brokers[broker].host if broker in self.brokers else str(broker)

    def names(self, brokers: Iterable[int]) -> str:
        """The same of several, in their order."""
        return ", ".join(map(self.name, brokers))

    def settled(self) -> Layout:
        """Where the partitions are once all that is under way has arrived."""
        return {
            at: tuple(each for each in replicas if each not in self.moves[at].removing)
            if at in self.moves
            else replicas
            for at, replicas in self.replicas.items()
        }

    def size(self, at: Partition) -> int:
        """Of the largest replica, in bytes."""
        return max(self.sizes.get(at, {}).values(), default=0)

    def up(self) -> list[str]:
        """The ids of the brokers that are."""
        return [str(broker) for broker, each in self.brokers.items() if each.is_up]

    def down(self) -> list[int]:
        """The ids of the brokers that are."""
        return [broker for broker, each in self.brokers.items() if not each.is_up]

    def lacking(self) -> list[Partition]:
        """The partitions of which a replica is not in sync."""
        return [at for at, replicas in self.replicas.items() if set(replicas) - self.in_sync[at]]

    def astray(self) -> list[Partition]:
        """The partitions that another one leads than should."""
        return [at for at, replicas in self.replicas.items() if self.leaders.get(at) != replicas[0]]


def of_host(cluster: Cluster, name: str) -> int | None:
    """The id of the broker with that host, or that id."""
    for broker, each in cluster.brokers.items():
        if name in {each.host, str(broker)}:
            return broker
    return None


def retiring(cluster: Cluster, expected: Collection[str], retire: Collection[str]) -> set[int]:
    """The ids of the brokers that are to retire, if the cluster is fit to move anything.

    Raises:
        ValueError: with all that stands against it.
    """
    known = ", ".join(f"{each.host} ({broker})" for broker, each in sorted(cluster.brokers.items()))
    found = {name: of_host(cluster, name) for name in (*expected, *retire)}
    leaving = {broker for name in retire if (broker := found[name]) is not None}
    problems = [
        f"{name} cannot retire: this cluster's brokers are {known}."
        for name in retire
        if found[name] is None
    ]
    problems += [
        f"{name} is no broker of this cluster yet ({known}): run playbooks/kafka.yml first."
        for name in expected
        if found[name] is None and name not in retire
    ]
    if expected:
        strangers = cluster.brokers.keys() - leaving - {found[name] for name in expected}
        problems += [
            f"{cluster.name(broker)} ({broker}) is a broker of this cluster and not of the "
            "inventory: put it there, or retire it."
            for broker in sorted(strangers)
        ]
    problems += [
        f"{cluster.name(broker)} ({broker}) is down: start it, or retire it."
        for broker in sorted(set(cluster.down()) - leaving)
    ]
    offline = sorted(cluster.replicas.keys() - cluster.leaders.keys())
    if offline:
        problems.append(
            f"{', '.join(map(str, offline[:5]))}{' …' if offline[5:] else ''}: no broker has the "
            "data of these partitions at the moment, so they cannot be copied."
        )
    if problems:
        raise ValueError(" ".join(problems))
    return leaving


def make_plan(
    cluster: Cluster, leaving: Collection[int], factors: Mapping[str, int]
) -> dict[Partition, Replicas]:
    """What has to move once all that is under way has arrived. Raises ValueError."""
    racks = {broker: each.rack for broker, each in cluster.brokers.items() if broker not in leaving}
    sizes = {at: cluster.size(at) for at in cluster.replicas}
    plan: dict[Partition, Replicas] = plan_layout(racks, cluster.settled(), factors, sizes)
    return plan


def described(cluster: Cluster, plan: Layout) -> list[str]:
    """The plan in lines: how much, and each move."""
    if not plan:
        return ["Each broker has its share: nothing has to move"]
    now = cluster.settled()
    added = copies(now, plan)
    bytes_ = sum(cluster.size(at) * len(brokers) for at, brokers in added.items())
    moves = [
        f"{at}: {cluster.names(now[at])} → {cluster.names(replicas)}"
        + (f" ({as_size(cluster.size(at) * len(added[at]))})" if added[at] else " (no copy)")
        for at, replicas in sorted(plan.items())
    ]
    copied = sum(map(len, added.values()))
    rest = sum(not each for each in added.values())
    more = [f"… and {len(moves) - LINES} more"] if len(moves) > LINES else []
    return [
        f"{copied} replicas to copy, {as_size(bytes_)}; {rest} partitions change without a copy",
        *moves[:LINES],
        *more,
    ]


def shares_of(cluster: Cluster, plan: Layout) -> list[str]:
    """What each broker has, now and then, in lines."""
    now = cluster.settled()
    brokers = sorted(cluster.brokers)
    before, after = shares(now, brokers), shares({**now, **plan}, brokers)
    return [
        f"{cluster.name(broker)}: replicas {before[broker][0]} → {after[broker][0]}, "
        f"leads {before[broker][1]} → {after[broker][1]}"
        for broker in brokers
    ]


def left(cluster: Cluster) -> int:
    """How many bytes are to be copied yet."""
    return sum(
        max(0, cluster.size(at) - cluster.sizes.get(at, {}).get(broker, 0))
        for at, move in cluster.moves.items()
        for broker in move.adding
    )


def progress(cluster: Cluster) -> str:
    """How far the moves that are under way are."""
    text = f"{len(cluster.moves)} partitions are on their way, {as_size(left(cluster))} are left"
    if cluster.down():
        text += f"; {cluster.names(cluster.down())} is down"
    return text


def as_size(bytes_: float) -> str:
    """Bytes, as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes_ < 1000:
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.1f} TB"


def read_cluster(admin: Any) -> Cluster:
    """Ask the brokers for all of it. Raises KafkaError."""
    brokers = {
        each["broker_id"]: Broker(
            each["host"], each["rack"] or "", not each.get("is_fenced", False)
        )
        for each in admin.describe_cluster()["brokers"]
    }
    found = {
        Partition(topic["name"], each["partition_index"]): each
        for topic in admin.describe_topics()
        for each in topic["partitions"]
    }
    moves = {
        Partition(at.topic, at.partition): Move(
            frozenset(each["adding_replicas"]), frozenset(each["removing_replicas"])
        )
        for at, each in admin.list_partition_reassignments().items()
    }
    sizes: dict[Partition, dict[int, int]] = {}
    up = [broker for broker, each in brokers.items() if each.is_up]
    for answer in admin.describe_log_dirs(brokers=up):
        for folder in answer["log_dirs"]:
            for topic in folder["topics"]:
                for each in topic["partitions"]:
                    at = Partition(topic["name"], each["partition_index"])
                    sizes.setdefault(at, {})[answer["broker"]] = each["partition_size"]
    return Cluster(
        brokers,
        {at: tuple(each["replica_nodes"]) for at, each in found.items()},
        {at: frozenset(each["isr_nodes"]) for at, each in found.items()},
        {at: each["leader_id"] for at, each in found.items() if each["leader_id"] >= 0},
        moves,
        sizes,
    )


def wanted_factors(admin: Any, cluster: Cluster, declared: Mapping[str, int]) -> dict[str, int]:
    """How many replicas topics shall have that are declared or Kafka's own. Raises KafkaError."""
    from kafka.admin import ConfigResource, ConfigResourceType

    topics = {at.topic for at in cluster.replicas}
    factors = {name: factor for name, factor in declared.items() if name in topics and factor > 0}
    own = {name: FACTORS[name] for name in FACTORS.keys() & topics - factors.keys()}
    if own:
        broker = cluster.up()[0]
        asked = ConfigResource(ConfigResourceType.BROKER, broker, dict.fromkeys(own.values()))
        settings = admin.describe_configs([asked], config_filter="all")["broker"][broker]
        for name, key in own.items():
            have = max(
                len(replicas) for at, replicas in cluster.settled().items() if at.topic == name
            )
            # Kafka's own default may be more than there are brokers; fewer nobody asked for.
            factors[name] = max(have, min(int(settings[key]["value"]), len(cluster.brokers)))
    return factors


@dataclass
class Throttle:
    """What is throttled: the settings as they are, of topics and of brokers."""

    topics: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    brokers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def is_empty(self) -> bool:
        """Whether nothing is."""
        return not (self.topics or self.brokers)


def read_throttle(admin: Any, cluster: Cluster) -> Throttle:
    """Ask for it; brokers that are down have no say. Raises KafkaError."""
    from kafka.admin import ConfigResource, ConfigResourceType

    names = {
        (ConfigResourceType.TOPIC, THROTTLED): sorted({at.topic for at in cluster.replicas}),
        (ConfigResourceType.BROKER, RATES): cluster.up(),
    }
    found = admin.describe_configs(
        [
            ConfigResource(kind, name, dict.fromkeys(keys))
            for (kind, keys), of_kind in names.items()
            for name in of_kind
        ]
    )

    def of(kind: str) -> dict[str, dict[str, str]]:
        values = {
            name: {key: each["value"] for key, each in settings.items() if each["value"]}
            for name, settings in found.get(kind, {}).items()
        }
        return {name: settings for name, settings in values.items() if settings}

    return Throttle(of("topic"), of("broker"))


def throttle_for(
    cluster: Cluster, adding: Mapping[Partition, Collection[int]], rate: int
) -> Throttle:
    """What has to be throttled while these partitions are copied to these brokers."""
    topics: dict[str, dict[str, str]] = {}
    for at, targets in sorted(adding.items()):
        sources = [broker for broker in cluster.replicas[at] if broker not in targets]
        settings = topics.setdefault(at.topic, dict.fromkeys(THROTTLED, "")) if targets else {}
        for key, brokers in zip(settings, (sources, sorted(targets)), strict=False):
            entries = [settings[key], *(f"{at.number}:{broker}" for broker in brokers)]
            settings[key] = ",".join(filter(None, entries))
    if not topics or not rate:
        return Throttle()
    return Throttle(topics, {name: dict.fromkeys(RATES, str(rate)) for name in cluster.up()})


def set_throttle(admin: Any, present: Throttle, wanted: Throttle) -> bool:
    """Make the throttle what is wanted, and tell whether that changed it.

    Raises:
        ValueError: the brokers refuse.
        KafkaError: they do not answer, or wrongly.
    """
    from kafka.admin import AlterConfigOp, ConfigResource, ConfigResourceType

    def changes(now: Mapping[str, str], then: Mapping[str, str]) -> dict[str, Any]:
        gone = dict.fromkeys(now.keys() - then.keys(), (AlterConfigOp.DELETE, None))
        return gone | {key: value for key, value in then.items() if now.get(key) != value}

    resources = [
        ConfigResource(kind, name, changed)
        for kind, now, then in (
            (ConfigResourceType.TOPIC, present.topics, wanted.topics),
            (ConfigResourceType.BROKER, present.brokers, wanted.brokers),
        )
        for name in sorted(now.keys() | then.keys())
        if (changed := changes(now.get(name, {}), then.get(name, {})))
    ]
    if resources:
        results = admin.alter_configs(resources, raise_on_unknown=False)
        refused = [
            f"{kind} {name}: {text}"
            for kind, of_kind in results.items()
            for name, text in of_kind.items()
            if text != "OK"
        ]
        if refused:
            raise ValueError("; ".join(refused))
    return bool(resources)


def submit(admin: Any, plan: Mapping[Partition, Replicas | None]) -> None:
    """Have the brokers move partitions; None takes back what is under way. Raises ValueError."""
    from kafka import TopicPartition

    answers = admin.alter_partition_reassignments(
        {TopicPartition(at.topic, at.number): replicas for at, replicas in plan.items()}
    )
    refused = sorted(
        f"{at.topic}-{at.partition}: {error.__name__}"
        for at, error in answers.items()
        # Those to take back may have arrived in the meantime.
        if error is not None and error.__name__ != "NoReassignmentInProgressError"
    )
    if refused:
        raise ValueError("; ".join(refused))


def elect(admin: Any, partitions: Iterable[Partition]) -> None:
    """Have the first replica lead. Raises KafkaError."""
    by_topic: dict[str, list[int]] = {}
    for at in partitions:
        by_topic.setdefault(at.topic, []).append(at.number)
    # One that cannot be led yet is tried again with the next step.
    admin.elect_leaders(0, by_topic, raise_errors=False)


def go_on(admin: Any, cluster: Cluster, throttle: int) -> dict[str, Any]:
    """Watch what is under way. Raises ValueError and KafkaError."""
    adding = {at: move.adding for at, move in cluster.moves.items()}
    wanted = throttle_for(cluster, adding, throttle)
    changed = ensure_throttle(admin, read_throttle(admin, cluster), wanted)
    remaining = [len(cluster.moves), left(cluster)]
    return {"changed": changed, "done": False, "msg": progress(cluster), "remaining": remaining}


def next_step(
    admin: Any, cluster: Cluster, plan: Mapping[Partition, Replicas], throttle: int
) -> dict[str, Any]:
    """Do what is next to be done while nothing is under way. Raises ValueError and KafkaError."""
    present = read_throttle(admin, cluster)
    if plan:
        added = copies(cluster.replicas, plan)
        set_throttle(admin, present, throttle_for(cluster, added, throttle))
        submit(admin, plan)
        return {"changed": True, "done": False, "msg": f"{len(plan)} partitions set out"}
    if not present.is_empty():
        set_throttle(admin, present, Throttle())
        return {"changed": True, "done": False, "msg": "All have arrived, the throttle is removed"}
    if lacking := cluster.lacking():
        text = f"{len(lacking)} partitions have replicas that are not in sync yet"
        return {"changed": False, "done": False, "msg": text}
    if astray := cluster.astray():
        elect(admin, astray)
        text = f"{len(astray)} partitions go back to their first replica"
        return {"changed": True, "done": False, "msg": text}
    return {"changed": False, "done": True, "msg": "Each broker has its share"}


def ensure_throttle(admin: Any, present: Throttle, wanted: Throttle) -> bool:
    """Throttle what is under way, which may be another run's, and leave what that has throttled."""
    missing = {
        topic: settings
        for topic, settings in wanted.topics.items()
        if any(
            set(settings[key].split(","))
            - set(present.topics.get(topic, {}).get(key, "").split(","))
            for key in THROTTLED
        )
    }
    return set_throttle(
        admin,
        Throttle({topic: present.topics.get(topic, {}) for topic in missing}, present.brokers),
        Throttle(missing, wanted.brokers),
    )


def cancel(access: Access, cluster: Cluster) -> bool:
    """Take back what is under way, and remove the throttle. Raises ValueError and KafkaError."""
    if cluster.moves:
        submit(access.admin, dict.fromkeys(cluster.moves))
        access.wait_until(
            lambda: not access.admin.list_partition_reassignments(), "the moves are taken back"
        )
    present = read_throttle(access.admin, cluster)
    return set_throttle(access.admin, present, Throttle()) or bool(cluster.moves)


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do the module's work and return its result. Raises ValueError and KafkaError."""
    wanted = module.params
    state = wanted["state"]
    with open_access(wanted, "kafka-rebalance") as access:
        admin = access.admin
        access.require("DESCRIBE", "ALTER", "DESCRIBE_CONFIGS", "ALTER_CONFIGS")
        cluster = read_cluster(admin)
        if state == "cancelled":
            changed = bool(cluster.moves) if module.check_mode else cancel(access, cluster)
            return {"changed": changed, "done": True, "msg": "Nothing is under way"}
        if state == "moved" and cluster.moves and not module.check_mode:
            return go_on(admin, cluster, wanted["throttle"])
        leaving = retiring(cluster, wanted["brokers"], wanted["retire"])
        declared = {name: int(factor) for name, factor in wanted["replication_factors"].items()}
        plan = make_plan(cluster, leaving, wanted_factors(admin, cluster, declared))
        result = {"plan": described(cluster, plan), "shares": shares_of(cluster, plan)}
        if state == "moved" and not module.check_mode:
            return result | next_step(admin, cluster, plan, wanted["throttle"])
        said = [progress(cluster)] if cluster.moves else ["Nothing is under way"]
        throttled = not read_throttle(admin, cluster).is_empty()
        said += ["a throttle is in place"] if throttled else []
        todo = bool(plan or cluster.moves or throttled or cluster.astray())
    changed = todo and state == "moved"
    return result | {"changed": changed, "done": not todo, "msg": ", ".join(said)}


def main() -> None:
    """Run as an Ansible module."""
    serve(
        "Partitions",
        {
            "state": {
                "type": "str",
                "choices": ["planned", "moved", "cancelled"],
                "default": "planned",
            },
            "brokers": {"type": "list", "elements": "str", "default": []},
            "retire": {"type": "list", "elements": "str", "default": []},
            "replication_factors": {"type": "dict", "default": {}},
            "throttle": {"type": "int", "default": 50_000_000},
            "patience": {"type": "int", "default": 600},
        },
        run,
    )


if __name__ == "__main__":
    main()
