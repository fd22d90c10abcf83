"""The files that hold both passwords while one is changed, as the role pipeline_app writes them."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = ["announce", "announce", "prefer", "prefer", "announce"]


@pytest.mark.skipif(os.geteuid() != 0, reason="the files are to be root's")
def test_the_first_password_is_the_one_that_the_database_knows(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    store, kafka = tmp_path / "store.password", tmp_path / "any.kafka.password"
    for file in (store, kafka):
        file.write_text("old\n")
    tasks: list[dict[str, Any]] = []
    for step in STEPS:
        role = {"name": "pipeline_app", "tasks_from": step}
        tasks.append({"ansible.builtin.include_role": role})
        words = f"cat {store} {kafka} >> {tmp_path}/seen; echo >> {tmp_path}/seen"
        tasks.append({"ansible.builtin.shell": words})
    play = {"hosts": "localhost", "gather_facts": False, "tasks": tasks}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    variables = {
        "pipeline_app_secret_files": {"store.password": "new"},
        "pipeline_app_tool_secret_files": {"missing.password": "new"},
        "_pipeline_app_passwords": dict.fromkeys(
            ["store.password", "any.kafka.password", "missing.password"], "new"
        ),
        "_pipeline_app_config_dir": str(tmp_path),
        "_pipeline_app_user": "root",
    }
    (tmp_path / "variables.json").write_text(json.dumps(variables))
    done = run_playbook(
        tmp_path,
        {"hosts": {"localhost": None}},
        *("--connection=local", "--extra-vars=@variables.json", "play.yml"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Of Kafka's, the new one always comes first.
    announced, preferred = ["old", "new", "new", "old"], ["new", "old", "new", "old"]
    seen = [text.split() for text in (tmp_path / "seen").read_text().strip().split("\n\n")]
    # Once announced or preferred, it stays so.
    assert seen == [announced, announced, preferred, preferred, preferred]
    assert not (tmp_path / "missing.password").exists()
