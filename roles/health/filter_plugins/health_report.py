"""What is wrong, from what hosts and brokers have told, and how a person reads it.

Nothing here asks anybody anything: the same data give the same report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

CRITICAL, WARNING, OK = "critical", "warning", "ok"

Data = Mapping[str, Any]

# What to do, by the name of a finding. docs/operations.md says it at length, in this order.
HINTS = {
    "host-unreachable": "is it on, and does ssh answer? A host that is made anew: site.yml",
    "service-down": "on {host}: sudo journalctl -u {unit} -n 50",
    "broker-lost": "on {host}: sudo systemctl status kafka; sudo journalctl -u kafka -n 50",
    "offline-partitions": "bring back the brokers that are lost; nothing else brings back the data",
    "under-min-isr": "bring back the brokers that are lost; nobody can write until then",
    "under-replicated-partitions": "wait if a broker has just come back; else see broker-lost",
    "quorum-voter-lost": "on {host}: systemctl status kafka; more than half must be there",
    "quorum-lag": "on {host}: is its disk or its network slow? sudo journalctl -u kafka -n 50",
    "group-stalled": "on its hosts: systemctl status {group}; sudo journalctl -u {group} -n 50",
    "consumer-lag": "it catches up, or the stage needs another host; see Lag",
    "database-down": "on its host: systemctl status couchdb mongod; df -h; nothing is lost",
    "disk-full": "on {host}: sudo du -xh --max-depth=2 {folder} | sort -h | tail",
    "certificate-expires": "run site.yml; ca.pem needs a new authority: docs/security.md",
    "audit-missing": "on {host}: sudo iot-pipeline audit",
    "audit-stale": "on {host}: systemctl status iot-audit.timer; sudo journalctl -u iot-audit",
    "clock-offset": "on {host}: timedatectl; is a time server reachable?",
    "dead-letters": "on {host}: sudo iot-pipeline dead-letters list",
    "not-known": "look again; if it lasts, ask where the detail says",
}
NAMES = tuple(HINTS)
# Those of them that say that something is away altogether.
AWAY = ("host-unreachable", "broker-lost", "quorum-voter-lost", "database-down")
SHOWN = 4  # of what may be many
AUDITED = ("produced", "missing", "duplicated")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, at one host; at none where it is the cluster's."""

    name: str
    severity: str
    host: str
    detail: str
    hint: str


def find(name: str, severity: str, host: str, detail: str, **words: str) -> Finding:
    """Make a finding, with the hint for its name."""
    hint = HINTS[name].format(host=host or "a broker", **words)
    return Finding(name, severity, host, detail, hint)


def some(words: Iterable[str]) -> str:
    """Name the first of many."""
    known = list(words)
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return ", ".join(known[:SHOWN]) + more


def host_of(server: str) -> str:
    """Return a server's name without its port."""
    return server.rpartition(":")[0]


def judge_hosts(looks: Mapping[str, Data], limits: Data) -> Iterator[Finding]:
    """Judge each host by itself."""
    for host, look in looks.items():
        if "services" not in look:
            said = str(look.get("msg") or "it was not asked").strip().splitlines()
            yield find("host-unreachable", CRITICAL, host, said[-1])
            continue
        yield from judge_services(host, look["services"], limits["sinks"])
        yield from judge_disks(host, look["disks"], limits)
        yield from judge_certificates(host, look["certificates"], limits)
        yield from judge_clock(host, look.get("clock"), limits)
        if look["database"] and look["database"]["problem"]:
            problem = f"{look['database']['url']}: {look['database']['problem']}"
            yield find("database-down", CRITICAL, host, problem)


def judge_services(
    host: str, services: Iterable[Data], sinks: Mapping[str, str]
) -> Iterator[Finding]:
    """Judge units. One that was stopped by a signal is active for systemd, but answers nobody."""
    for each in services:
        unit = each["unit"]
        if each["state"] != "active":
            yield find("service-down", CRITICAL, host, f"{unit} is {each['state']}", unit=unit)
        elif each["problem"]:
            detail = f"{unit} runs, but gives {each['problem']}"
            yield find("service-down", CRITICAL, host, detail, unit=unit)
        elif sinks.get(unit) and "iot_sink_up" not in each["metrics"]:
            detail = f"whether {unit} can write: its metrics have no iot_sink_up"
            yield find("not-known", WARNING, host, detail)


def judge_disks(host: str, disks: Iterable[Data], limits: Data) -> Iterator[Finding]:
    """Judge file systems."""
    for disk in disks:
        used = max(disk["used_percent"], disk["inodes_used_percent"])
        what = "" if used == disk["used_percent"] else " of its inodes"
        if used >= limits["disk_warning_percent"]:
            severity = CRITICAL if used >= limits["disk_critical_percent"] else WARNING
            detail = (
                f"{disk['folder']}: {used:.0f} %{what} used, {disk['free'] / 2**30:.1f} GiB left"
            )
            yield find("disk-full", severity, host, detail, folder=disk["folder"])


def judge_certificates(host: str, certificates: Iterable[Data], limits: Data) -> Iterator[Finding]:
    """Judge certificates by the days that they have left."""
    for each in certificates:
        days = each["days"]
        if days is None:
            yield find(
                "certificate-expires", CRITICAL, host, f"{each['file']} holds no certificate"
            )
        elif days < limits["certificate_warning_days"]:
            severity = CRITICAL if days < limits["certificate_critical_days"] else WARNING
            when = "has expired on" if days < 0 else f"ends in {days:.0f} days, on"
            detail = f"{each['file']} ({each['subject']}) {when} {each['not_after'][:10]}"
            yield find("certificate-expires", severity, host, detail)


def judge_clock(host: str, clock: Data | None, limits: Data) -> Iterator[Finding]:
    """Judge the clock by what is certain of it."""
    if not clock:
        return
    limit = limits["clock_offset_seconds"]
    for seconds, where in ((clock["least"], "ahead of"), (-clock["most"], "behind")):
        if seconds > limit:
            detail = f"its clock is {seconds:.1f} s or more {where} the control host's"
            yield find("clock-offset", WARNING, host, detail)


def best_view(states: Mapping[str, Data]) -> tuple[str, Data]:
    """Return the host that reaches most of the cluster, with what it sees."""
    views = [(host, state) for host, state in states.items() if "answers" in state]
    return max(
        views,
        key=lambda view: (
            sum(not problem for problem in view[1]["answers"].values()),
            len(view[1]["brokers"]),
            "leader" in view[1]["quorum"],
        ),
        default=("", {}),
    )


def lost_brokers(view: Data, limits: Data) -> dict[str, str]:
    """Return what keeps brokers from their work, by host."""
    present = {broker["host"] for broker in view["brokers"]}
    lost = {}
    for server in limits["brokers"]:
        host = host_of(server)
        if view["answers"].get(server):
            lost[host] = f"{server}: {view['answers'][server]}"
        elif host not in present:
            lost[host] = f"{server} answers, but is not in the cluster"
    return lost


def judge_kafka(states: Mapping[str, Data], limits: Data) -> Iterator[Finding]:
    """Judge the cluster, as the host sees it that reaches most of it."""
    if not limits["brokers"]:
        return
    viewer, view = best_view(states)
    if not view:
        for server in limits["brokers"]:
            said = last_line(states.get(host_of(server), {}))
            detail = f"nobody could ask the cluster, nor this host: {said}"
            yield find("broker-lost", CRITICAL, host_of(server), detail)
        return
    lost = lost_brokers(view, limits)
    for host, problem in lost.items():
        own = states.get(host, {}).get("answers", {})
        itself = any(host_of(server) == host and not own[server] for server in own)
        detail = f"{problem} (asked from {viewer}{'; it answers its own host' * itself})"
        yield find("broker-lost", CRITICAL, host, detail)
    gone = {broker["id"] for broker in view["brokers"] if broker["host"] in lost}
    yield from judge_partitions(view["partitions"], gone)
    yield from judge_quorum(view["quorum"], limits)
    for group in view["groups"]:
        yield from judge_group(group, limits)
    # What a broker that is lost does not tell is no second thing to mend.
    if not lost:
        yield from judge_gaps(view)


def judge_gaps(view: Data) -> Iterator[Finding]:
    """Judge what brokers were asked for and did not tell: what is not known is not well."""
    present = {broker["id"] for broker in view["brokers"]}
    # Nobody asks for those of Kafka's own topics.
    asked = [
        each
        for each in view["partitions"]
        if each["leader"] in present and not each["topic"].startswith("__")
    ]
    for figure, what in (("end", "the last offset"), ("min_isr", "min.insync.replicas")):
        names = [f"{p['topic']}-{p['partition']}" for p in asked if p[figure] is None]
        if names:
            yield find(
                "not-known", WARNING, "", f"{what} of {some(names)}: kafka-topics --describe"
            )
    for group in view["groups"]:
        waiting = [each["seconds"] for each in group["partitions"] if each["lag"]]
        if waiting and not any(seconds is not None for seconds in waiting):
            detail = f"for how long records wait for {group['name']}: its hosts' journals"
            yield find("not-known", WARNING, "", detail)


def last_line(result: Data) -> str:
    """Return what a failed task said at its end."""
    said = str(result.get("msg") or "not asked").strip().splitlines()
    return said[-1] if said else ""


def judge_partitions(partitions: Iterable[Data], gone: set[int]) -> Iterator[Finding]:
    """Judge partitions. Brokers that are gone are, whatever their cluster still thinks."""
    known = list(partitions)
    offline, below, short = [], [], []
    for each in known:
        name = f"{each['topic']}-{each['partition']}"
        in_sync = set(each["isr"]) - gone
        if each["leader"] < 0 or each["leader"] in gone:
            offline.append(name)
        if each["min_isr"] and len(in_sync) < each["min_isr"]:
            below.append(name)
        if len(in_sync) < len(each["replicas"]):
            short.append(name)
    for name, severity, found in (
        ("offline-partitions", CRITICAL, offline),
        ("under-min-isr", CRITICAL, below),
        ("under-replicated-partitions", WARNING, short),
    ):
        if found:
            yield find(name, severity, "", f"{len(found)} of {len(known)}: {some(found)}")


def judge_quorum(quorum: Data, limits: Data) -> Iterator[Finding]:
    """Judge the controllers."""
    voters = quorum["voters"]
    if "leader" not in quorum:
        detail = f"no leader among the controllers ({quorum['error']})"
        yield find("quorum-voter-lost", CRITICAL, "", detail)
        return
    for voter in voters:
        host = voter["host"] or f"controller {voter['id']}"
        if voter["silent"] is None or voter["silent"] > limits["voter_silent_seconds"]:
            since = "never" if voter["silent"] is None else f"not for {voter['silent']:.0f} s"
            detail = f"has {since} asked the leader of {len(voters)} controllers"
            yield find("quorum-voter-lost", CRITICAL, host, detail)
        elif voter["lag"] > limits["quorum_lag_records"]:
            yield find("quorum-lag", WARNING, host, f"{voter['lag']} records behind the leader")
    wanted = len(limits["controllers"])
    missing = wanted - len(voters)
    if missing > 0:
        detail = f"{missing} of {wanted} controllers do not vote"
        yield find("quorum-voter-lost", WARNING, "", detail)


def judge_group(group: Data, limits: Data) -> Iterator[Finding]:
    """Judge a consumer group by its members, by what waits for it, and by whether it moves."""
    name = group["name"]
    if group.get("error"):
        yield find("group-stalled", CRITICAL, "", f"{name}: {group['error']}", group=name)
        return
    lag, seconds = backlog(group)
    waiting = f"{lag:,} records wait, the oldest for {seconds:.0f} s"
    stuck = stalled(group["partitions"], limits)
    if not group["members"]:
        detail = f"{name} has no members; {waiting}"
        yield find("group-stalled", CRITICAL, "", detail, group=name)
    elif stuck:
        detail = f"{name}: {waiting}, and nobody works on {some(stuck)}"
        yield find("group-stalled", CRITICAL, "", detail, group=name)
    elif seconds > limits["lag_seconds"] or lag > limits["lag_records"]:
        yield find("consumer-lag", WARNING, "", f"{name}: {waiting}")


def stalled(partitions: Iterable[Data], limits: Data) -> list[str]:
    """Name the partitions in which records wait and nothing moves.

    One partition may have to wait for its turn while others are caught up on. So it takes longer
    to be called stalled than all that wait together.
    """
    old = [each for each in partitions if each["moved"] is not None]
    limit = limits["stalled_seconds"]
    if any(each["moved"] for each in old):
        limit = max(limit, 2 * limits["lag_seconds"])
    still = [each for each in old if not each["moved"] and each["seconds"] > limit]
    return [f"{each['topic']}-{each['partition']}" for each in still]


def backlog(group: Data) -> tuple[int, float]:
    """Return how many records wait for a group, and the age of the oldest in seconds."""
    partitions = group["partitions"]
    return (
        sum(each["lag"] for each in partitions),
        max((each["seconds"] or 0.0 for each in partitions), default=0.0),
    )


def dead_letters(looks: Mapping[str, Data]) -> tuple[str, int | None]:
    """Return who counted the open dead letters, and how many; None where nobody could."""
    asked = {host: look["dead_letters"] for host, look in looks.items() if "dead_letters" in look}
    counted = ((host, count) for host, count in asked.items() if count is not None)
    return next(counted, (next(iter(asked), ""), None))


def judge_letters(looks: Mapping[str, Data], limits: Data) -> Iterator[Finding]:
    """Judge the open dead letters."""
    host, count = dead_letters(looks)
    if host and count is None:
        detail = "they could not be counted in time: there are very many, or no broker answers"
        yield find("dead-letters", WARNING, host, detail)
    elif count and count > limits["dead_letters"]:
        detail = f"{count} records could not be handled, and nobody has looked after them"
        yield find("dead-letters", WARNING, host, detail)


def judge_sight(
    looks: Mapping[str, Data], so_far: Sequence[Finding], limits: Data
) -> Iterator[Finding]:
    """Judge what hosts do not reach, though it is there for others."""
    down = {finding.host for finding in so_far if finding.name in AWAY}
    for host, look in looks.items():
        unreached = {
            server: problem
            for server, problem in look.get("unreached", {}).items()
            if host_of(server) not in down
        }
        for name in AWAY:
            servers = [server for server in unreached if kind(server, limits) == name]
            if servers:
                detail = f"it does not reach {some(servers)} ({unreached[servers[0]]})"
                yield find(name, CRITICAL, host, detail)
        for each in look.get("services", []):
            if each["metrics"].get("iot_sink_up") == 0 and each["state"] == "active":
                sink = limits["sinks"].get(each["unit"], "")
                name = "database-down" if sink == "database" else "broker-lost"
                waits = each["metrics"].get("iot_oldest_unhandled_seconds", 0.0)
                detail = f"{each['unit']} cannot write, its oldest record waits for {waits:.0f} s"
                yield find(name, CRITICAL, host, detail)


def kind(server: str, limits: Data) -> str:
    """Return what it is called when a server is away."""
    if server in limits["brokers"]:
        return "broker-lost"
    return "quorum-voter-lost" if server in limits["controllers"] else "database-down"


def last_audit(looks: Mapping[str, Data]) -> tuple[str, Data | None]:
    """Return where the newest audit is, and it.

    It is empty where none has been made yet, and None where none is made.
    """
    found = [(host, look["audit"]) for host, look in looks.items() if look.get("audit") is not None]
    return max(found, key=lambda each: str(each[1].get("at", "")), default=("", None))


def judge_audit(looks: Mapping[str, Data], limits: Data, at: datetime) -> Iterator[Finding]:
    """Judge the last audit."""
    host, audit = last_audit(looks)
    if audit is None:
        return
    if not audit:
        yield find("audit-stale", WARNING, host, "no audit has been recorded yet")
        return
    if not all(isinstance(audit.get(name), int) for name in AUDITED) or not audit.get("at"):
        yield find("not-known", WARNING, host, "what the last audit found: sudo iot-pipeline audit")
        return
    hours = (at - datetime.fromisoformat(audit["at"])).total_seconds() / 3600
    if hours > limits["audit_age_hours"]:
        detail = f"the last audit that came to an end was {hours:.1f} hours ago"
        yield find("audit-stale", WARNING, host, detail)
    # A release from before they were counted knows none that are lost.
    counts = {"missing": audit["missing"], "lost unread": audit.get("lost", 0)}
    counts["twice"] = audit["duplicated"]
    if any(counts.values()):
        texts = [f"{count} {name}" for name, count in counts.items()]
        detail = f"{', '.join(texts)}, at {audit['at']}"
        yield find("audit-missing", CRITICAL, host, detail)


def report(
    looks: Mapping[str, Data], states: Mapping[str, Data], limits: Data, at: str
) -> dict[str, Any]:
    """Judge all that was told.

    Args:
        looks: what the module health_host has returned, by host.
        states: what the module kafka_state has returned, by the host that it ran on.
        limits: what is still well, and what there ought to be; the role's variables.
        at: the present time, as RFC 3339.
    """
    moment = datetime.fromisoformat(at)
    found = [*judge_hosts(looks, limits), *judge_kafka(states, limits)]
    told = {(finding.name, finding.host) for finding in found}
    found += [f for f in judge_sight(looks, found, limits) if (f.name, f.host) not in told]
    found += judge_audit(looks, limits, moment)
    found += judge_letters(looks, limits)
    found.sort(key=lambda f: (f.severity != CRITICAL, NAMES.index(f.name), f.host))
    viewer, view = best_view(states)
    severities = {finding.severity for finding in found}
    return {
        "status": CRITICAL if CRITICAL in severities else WARNING if severities else OK,
        "at": at,
        "findings": [asdict(finding) for finding in found],
        "hosts": {
            host: {name: value for name, value in look.items() if name in SHOWN_OF_HOSTS}
            for host, look in looks.items()
        },
        "kafka": {
            "asked_from": viewer,
            **{name: value for name, value in view.items() if name in SHOWN_OF_KAFKA},
        },
        "dead_letters": dead_letters(looks)[1],
        "audit": last_audit(looks)[1],
    }


SHOWN_OF_HOSTS = ("services", "disks", "certificates", "unreached", "database", "clock")
SHOWN_OF_KAFKA = ("answers", "brokers", "quorum", "partitions", "groups")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows in aligned columns, the first of which is their head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def duration(seconds: float | None) -> str:
    """Return seconds as a person says them, roughly."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def text(found: Data) -> str:
    """Return a report as a person reads it: what is wrong first."""
    lines = [f"{found['status'].upper()} at {found['at']}"]
    findings = found["findings"]
    if not findings:
        lines[0] += ": nothing is wrong"
    for each in findings:
        where = f" {each['host']}" if each["host"] else ""
        lines += ["", f"{each['severity'].upper()} {each['name']}{where}: {each['detail']}"]
        lines.append(f"    {each['hint']}")
    rows = [["HOST", "DISK", "CERTIFICATE", "CLOCK"]]
    services = [["SERVICE", "HOST", "STATE", "FOR", "RESTARTS"]]
    for host, look in found["hosts"].items():
        rows.append([host, *host_row(look)])
        services += [[*service_row(host, each)] for each in look.get("services", [])]
    lines += ["", *table(rows), "", *table(services)]
    kafka = found["kafka"]
    if kafka.get("quorum"):
        lines += ["", *kafka_lines(kafka)]
    letters = "not known" if found["dead_letters"] is None else found["dead_letters"]
    lines += ["", f"  Open dead letters: {letters}"]
    audit = found["audit"]
    if audit and all(name in audit for name in ("at", *AUDITED)):
        counts = f"{audit['produced']} produced, {audit['missing']} missing"
        lines += [f"  Last audit at {audit['at']}: {counts}, {audit['duplicated']} twice"]
    return "\n".join(lines)


def host_row(look: Data) -> list[str]:
    """Return a host's disks, the days that its certificate has left, and its clock."""
    if "services" not in look:
        return ["no answer", "", ""]
    days = [each["days"] for each in look["certificates"] if each["days"] is not None]
    clock = look.get("clock")
    return [
        ", ".join(f"{disk['folder']} {disk['used_percent']:.0f} %" for disk in look["disks"]),
        f"{min(days):.0f} days" if days else "-",
        f"{clock['least']:+.1f} to {clock['most']:+.1f} s" if clock else "-",
    ]


def service_row(host: str, service: Data) -> list[str]:
    """Return a service, and how it is."""
    state = "running" if service["state"] == "active" else service["state"]
    return [
        service["unit"].removesuffix(".service"),
        host,
        "no answer" if service["problem"] else state,
        duration(service["seconds"]),
        str(service["restarts"]),
    ]


def kafka_lines(kafka: Data) -> list[str]:
    """Return the controllers, the topics and the groups."""
    quorum = kafka["quorum"]
    names = {broker["id"]: broker["host"] for broker in kafka["brokers"]}
    names |= {voter["id"]: voter["host"] for voter in quorum["voters"] if voter["host"]}
    rows = [["GROUP", "MEMBERS", "STATE", "LAG", "OLDEST"]]
    for group in kafka["groups"]:
        lag, seconds = backlog(group)
        rows.append(
            [group["name"], "-", group["error"], "-", "-"]
            if group.get("error")
            else [
                group["name"],
                str(group["members"]),
                group["state"],
                f"{lag:,}",
                duration(seconds),
            ]
        )
    voters = len(quorum["voters"])
    lag = max((voter["lag"] for voter in quorum["voters"]), default=0)
    leader = names.get(quorum.get("leader"), "nobody")
    return [
        f"  Controllers: {leader} leads {voters}, the last is {lag} records behind",
        f"  Partitions: {len(kafka['partitions'])} on {len(kafka['brokers'])} brokers",
        "",
        *table(rows),
    ]


class FilterModule:
    """What templates call these functions."""

    def filters(self) -> dict[str, Any]:
        """Return them by name."""
        return {"health_report": report, "health_text": text}
