"""The statuses that the repository's own commands end with: a typo and a fault are no answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from iot_lab import artifacts, cli, demo, up
from iot_lab.bench import __main__ as bench
from iot_lab.command_line import Exit
from iot_lab.drills import __main__ as drills
from iot_lab.shell import LabError
from iot_pipeline import errors

HEALTH = Path(__file__).parents[2] / "ansible" / "health"


@pytest.mark.parametrize(
    "main, words",
    [
        (cli.main, []),
        (cli.main, ["helth"]),
        (cli.main, ["health", "--jsn"]),
        (cli.main, ["up", "--topology", "cuochdb"]),
        (artifacts.main, ["kafak"]),
        (bench.main, ["--onyl", "storage"]),
        (demo.main, ["--count", "many"]),
        (drills.main, ["--lsit"]),
    ],
)
def test_a_typo_is_no_answer(
    main: Callable[[Sequence[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == Exit.USAGE
    assert "usage: lab" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, said",
    [
        (LabError("no memory"), Exit.UNAVAILABLE, "lab: no memory"),
        (KeyError("unforeseen"), Exit.INTERNAL, "Traceback"),
        (KeyboardInterrupt(), Exit.INTERRUPTED, "interrupted"),
    ],
)
def test_what_kept_the_lab_from_an_answer_is_none(
    error: BaseException,
    status: Exit,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(cli, "stop_on_signals", lambda: None)
    monkeypatch.setattr(up, "check", fail)
    assert cli.main(["check"]) == status
    assert said in capsys.readouterr().err


def test_a_status_means_the_same_everywhere() -> None:
    names = {status.value: status.name for status in errors.Exit}
    lab = {status.value: status.name for status in Exit}
    assert lab.items() - names.items() == {(69, "UNAVAILABLE")}


@pytest.mark.parametrize(
    "report, status",
    [
        ({"status": "ok"}, 0),
        ({"status": "warning"}, 1),
        ({"status": "critical"}, 2),
        ({"status": "fine"}, 3),
        ("cut o", 3),
        (None, 3),
    ],
    ids=str,
)
def test_health_answers_only_what_it_knows(
    tmp_path: Path, report: dict[str, str] | str | None, status: int
) -> None:
    """Its playbook is stood in for by one that leaves this report."""
    playbook = tmp_path / "ansible-playbook"
    left = "" if report is None else report if isinstance(report, str) else json.dumps(report)
    (tmp_path / "report").write_text(left)
    file = r"""file=$(printf '%s\n' "$@" | sed -n 's/.*health_report_file=\([^ ]*\) .*/\1/p')"""
    leave = "exit 2" if report is None else f"{file}; cp {tmp_path}/report $file"
    playbook.write_text(f"#!/bin/sh\n{leave}\n")
    playbook.chmod(0o755)
    done = subprocess.run(
        [HEALTH, "--json"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
