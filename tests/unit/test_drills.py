"""What drills are made of. What they do is seen on a running lab: make drill."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from iot_lab import artifacts, hosts, paths
from iot_lab.drills import drill, faults, page, run
from iot_lab.drills.watch import STAGES, Watch
from iot_lab.hosts import Machine
from iot_lab.shell import LabError


def machine(name: str, *groups: str) -> Machine:
    return Machine(name, "192.168.56.9", 512, 1, "debian13", groups)


FOLDER = paths.ROOT / "molecule"
LAB = [
    machine("p", "producers"),
    machine("b1", "kafka_brokers"),
    machine("b2", "kafka_brokers"),
    machine("i", "inference_nodes"),
    machine("s", "storage_nodes"),
]


@pytest.mark.parametrize("name", drill.names())
def test_a_drill_can_be_run_somewhere(name: str) -> None:
    found = drill.load(name)
    assert found.steps
    assert set(found.artifacts) <= artifacts.ARTIFACTS.keys()
    able = [t for t in hosts.topologies() if not found.lacks(hosts.machines(t))]
    assert able, "no topology has what it needs"
    groups = {g for t in able for m in hosts.machines(t) for g in (m.name, *m.groups)}
    for step in found.steps:
        assert set(step.hosts) <= groups
        # A step is none for a topology that has not its hosts.
        assert step.action == "play" or any(list(step.rounds(hosts.machines(t))) for t in able)
        # What lasts says for how long, and what is named while it lasts has to last.
        if step.action in {"stop", "freeze", "power_off", "cut_off", "fill"}:
            assert step.seconds > 0
        assert step.seconds > 0 or not step.health
        for playbook in step.argument["playbooks"] if step.action == "play" else ():
            assert (drill.FOLDER.parents[1] / playbook).is_file()


def test_every_action_is_known_how_to_do_and_documented() -> None:
    assert set(drill.ACTIONS) == set(faults.FAULTS)
    words = page.PAGE.read_text()
    assert [action for action in drill.ACTIONS if f"`{action}:" not in words] == []


def test_some_are_short() -> None:
    short = [found for name in drill.names() if (found := drill.load(name)).short]
    assert short
    assert sum(step.seconds for found in short for step in found.steps) <= 120


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"summary": "x"}, "steps"),
        ({"summary": "x", "steps": [{"hosts": "producers"}]}, "a step does one of kill"),
        ({"summary": "x", "steps": [{"kill": "a", "stop": "b"}]}, "['kill', 'stop']"),
        ({"summary": "x", "steps": [{"kill": "a", "host": "b"}]}, "host"),
        ({"summary": "x", "steps": [], "fast": True}, "fast"),
        (["x"], "sequence"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, content: object, reason: str) -> None:
    file = tmp_path / "odd.yml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(LabError, match=r"odd\.yml: ") as error:
        drill.parse(file)
    assert reason in str(error.value)


def test_hosts_are_hit_in_turn_or_together() -> None:
    step = drill.Step("kill", "kafka.service", hosts=["kafka_brokers", "s"])
    assert [[m.name for m in hit] for hit in step.rounds(LAB)] == [["b1"], ["b2"], ["s"]]
    step = drill.Step("kill", "kafka.service", hosts=["kafka_brokers"], together=True)
    assert [[m.name for m in hit] for hit in step.rounds(LAB)] == [["b1", "b2"]]
    assert list(drill.Step("play", {}).rounds(LAB)) == [[]]


@pytest.mark.parametrize("settled", [run.SETTLED, run.SETTLED_BUSY])
def test_what_stands_still_is_never_steady(settled: float) -> None:
    assert Watch(LAB).steady_since(0, settled) is None


def test_a_busy_machine_is_judged_by_the_audit_alone() -> None:
    step = drill.Step("stop", "x", health=["broker-lost"], back_within=1, no_failures=True)
    kept = drill.Step("stop", "x", unsaid="refused", sends_dead_letters=3)
    found = drill.judged_by_the_audit(drill.Drill("x", "x", [step, kept]))
    assert found.steps == [drill.Step("stop", "x"), kept]
    assert found.rate == drill.BUSY_RATE < drill.Drill("x", "x", []).rate
    assert found.busy


def test_dead_letters_of_before_are_expected_unless_all_brokers_are_lost() -> None:
    assert [name for name in drill.names() if drill.load(name).loses_brokers] == ["rebuild"]


@pytest.mark.parametrize("scenario", sorted(FOLDER.glob("*/molecule.yml")), ids=str)
def test_molecule_runs_drills_that_there_are(scenario: Path) -> None:
    said = yaml.safe_load(scenario.read_text())
    named = said["ansible"].get("env", {}).get("DRILLS", "").split()
    assert set(named) <= set(drill.names())
    sequence = said["scenario"]["test_sequence"]
    assert bool(named) == ("side_effect ../shared/drill.yml" in sequence)


def test_what_a_topology_lacks_is_said() -> None:
    assert not drill.Drill("x", "x", [], needs={"kafka_brokers": 2}).lacks(LAB)
    assert "3 hosts in kafka_brokers" in drill.Drill(
        "x", "x", [], needs={"kafka_brokers": 3}
    ).lacks(LAB)


def test_the_longest_pause_counts_from_the_blow_to_the_return() -> None:
    watch = Watch([*LAB, machine("i2", "inference_nodes")])
    first, second = watch.stages["infer"]
    first.progress, second.progress = [10.0, 11.0, 19.0], [12.0, 25.0]
    assert watch.longest_pause("infer", 10, 20) == 7  # 12 to 19: one host works for both
    assert watch.longest_pause("infer", 10, 30) == 6 + 1
    assert watch.longest_pause("infer", 26, 29) == 3  # nothing at all
    assert watch.longest_pause("store", 26, 29) == 3


def test_steady_is_who_no_longer_pauses() -> None:
    watch = Watch([*LAB, machine("i2", "inference_nodes")])
    steady = [float(second) for second in range(31)]
    for stage in STAGES:
        watch.stages[stage][0].progress = steady
    assert watch.steady_since(0, 30.5) == 0
    # One host works for both, unless it is asked for itself.
    other = [machine("i2", "inference_nodes")]
    assert watch.steady_since(0, 30.5, other) is None
    watch.stages["infer"][1].progress = [float(second) for second in range(12, 31)]
    assert watch.steady_since(0, 30.5, other) == 12
    assert watch.steady_since(13, 30.5, other) == 13
    # A pause after first results is one, too.
    watch.stages["store"][0].progress = [1.0, 2.0, 9.0, *steady[10:]]
    assert watch.steady_since(0, 30.5) == 9
    assert watch.steady_since(0, 40) is None
    # Of what is no stage, the stages tell.
    assert watch.steady_since(10, 30.5, [LAB[1]]) == 10


def test_services_that_were_started_again_are_counted() -> None:
    watch = Watch(LAB)
    watch.stages["store"][0].starts = {1.0, 2.0, 3.0}
    watch.stages["infer"][0].starts = {1.0}
    assert watch.restarts() == 2


def test_what_a_host_said_before_it_was_away_is_not_counted_again() -> None:
    observer = Watch(LAB).stages["store"][0]
    for out, failures, started in ((9, 4, 1), (9, 5, 1), (10, 5, 1), (2, 0, 2), (2, 1, 2)):
        observer.hear({"out": out, "failures": failures, "started": started})
    assert (len(observer.progress), observer.failures, len(observer.starts)) == (2, 2, 2)


COUNTS = ("produced", "stored", "predicted", "pending", "missing", "duplicated", "dead_lettered")
BEFORE = dict.fromkeys(COUNTS, 0) | dict.fromkeys(COUNTS[:3], 50)


@pytest.mark.parametrize(
    "seen, letters, wrong",
    [
        ((90, 90, 90, 0, 0, 0, 0), 0, []),
        # Refused as no images: stored, never predicted, and a dead letter for each.
        ((90, 90, 87, 0, 0, 0, 3), 3, []),
        ((90, 90, 87, 0, 0, 0, 3), 0, ["3 dead letters instead of 0"]),
        ((90, 88, 87, 3, 0, 0, 0), 0, ["3 images are still on their way"]),
        ((90, 88, 90, 0, 2, 1, 0), 0, ["2 missing", "1 duplicated"]),
        ((40, 40, 40, 0, 0, 0, 0), 0, ["10 images are known no more"]),
    ],
)
def test_the_audit_judges_what_was_added(
    monkeypatch: pytest.MonkeyPatch, seen: tuple[int, ...], letters: int, wrong: list[str]
) -> None:
    monkeypatch.setattr("iot_lab.report.audit", lambda _: dict(zip(COUNTS, seen, strict=True)))
    monkeypatch.setattr(run, "PATIENCE", 0)
    lab = types.SimpleNamespace(machines=LAB)
    added, found = run._judge(lab, BEFORE, letters)  # type: ignore[arg-type]
    assert found == wrong
    assert added["produced"] == seen[0] - 50


def test_only_the_drills_own_dead_letters_are_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def letter(position: str, topic: str, offset: int) -> str:
        found = {"position": position, "source_topic": topic, "source_partition": 1}
        return json.dumps(found | {"source_offset": offset})

    listed = [letter("0:1", "t", 5), letter("0:2", "t", 6), letter("0:3", "u", 5)]
    listed += [letter("0:4", "t", 5), letter("0:5", "t", 7), letter("0:6", "t", 50)]
    program = tmp_path / "iot-pipeline"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/said\n'
        + "\n".join(f"echo '{line}'" for line in listed)
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("iot_lab.remote.command", lambda *_: ["bash", "-es"])
    monkeypatch.setattr(run, "AT_ONCE", 2)
    lab = types.SimpleNamespace(machines=LAB, sent={("t", 1, 5), ("t", 1, 7)})
    run.drop_letters(lab)  # type: ignore[arg-type]
    assert (tmp_path / "said").read_text().splitlines() == [
        "dead-letters list --json",
        "dead-letters drop --yes 0:1 0:4",
        "dead-letters drop --yes 0:5",
    ]
    lab.sent.clear()
    (tmp_path / "said").unlink()
    run.drop_letters(lab)  # type: ignore[arg-type]
    assert not (tmp_path / "said").exists()


def test_the_page_has_a_line_for_each_blow(tmp_path: Path) -> None:
    audit = {"produced": 9, "missing": 1, "duplicated": 0, "dead_lettered": 0}
    row: dict[str, Any] = {"what": "kill x", "hosts": "b1", "lasted": 0, "back": None}
    row |= {"health": ["broker-lost"], "health_seconds": 7.2, "wrong": ["health took 16.0 s"]}
    outcome = {
        "name": "kill",
        "summary": "All die",
        "topology": "cluster",
        "audit": audit,
        "failures": 3,
        "wrong": ["1 missing"],
        "passed": False,
        "rows": [row | {"pauses": dict.fromkeys(STAGES, 1.25)}],
    }
    results, file = tmp_path / "drills.json", tmp_path / "drills.md"
    file.write_text(f"before\n{page.MARKS[0]}\nis old\n{page.MARKS[1]}\nafter\n")
    page.keep(outcome, results)
    page.keep(outcome, results)
    page.write(file, results)
    text = file.read_text()
    assert "**did not hold**: 1 missing; health took 16.0 s |" in text
    assert text.count("| | kill x b1 | 0 | not | 1.2 | 1.2 | 1.2 | broker-lost (7 s) |") == 1
    assert "is old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
