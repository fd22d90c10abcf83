"""What the role packages finds missing: Ansible and this machine's own dpkg tell."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = {
    "name": "couchdb",
    "uris": "https://packages.example/deb",
    "suites": "bookworm",
    "components": "main",
    "key": "https://packages.example/key.asc",
}


def look(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]],
    folder: Path,
    cases: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What the role finds in each case, given as variables of the role."""
    tasks: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        found = {"missing": "{{ _packages_missing }}", "elsewhere": "{{ _packages_is_elsewhere }}"}
        tasks += [
            {
                "ansible.builtin.include_role": {
                    "name": "packages",
                    "tasks_from": "look",
                    "public": True,
                },
                "vars": case,
            },
            {
                "ansible.builtin.copy": {"dest": f"{folder}/{number}", "content": found},
                "vars": case,
            },
        ]
    play = {"hosts": "localhost", "gather_facts": False, "tasks": tasks}
    (folder / "play.yml").write_text(json.dumps([play]))
    hosts = {"hosts": {"localhost": None}}
    done = run_playbook(folder, hosts, "--connection=local", "play.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / str(number)).read_text()) for number in range(len(cases))]


@pytest.mark.skipif(not shutil.which("dpkg-query"), reason="this machine is no Debian")
def test_what_is_missing_is_told_without_apt(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    query = ["dpkg-query", "--show", "--showformat=${Version}", "dpkg"]
    version = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    there = ["dpkg", f"dpkg={version}", "coreutils"]
    # Of the last three only apt knows.
    missing = ["no-such-package", "dpkg=0", "dpkg:amd64", "dpkg/stable", "python3-no*"]
    known, sources = tmp_path / "known.origin", tmp_path / "known.sources"
    known.write_text(json.dumps(REPOSITORY, sort_keys=True) + "\n")
    sources.touch()
    here = {
        "packages_names": ["dpkg"],
        "_packages_origin_file": str(known),
        "_packages_sources_file": str(sources),
    }
    none = str(tmp_path / "none")
    moved = REPOSITORY | {"key": "https://packages.example/new.asc"}
    found = look(
        run_playbook,
        tmp_path,
        [
            {"packages_names": there + missing},
            {"packages_names": missing[3:]},
            {"packages_names": there},
            here | {"packages_repository": REPOSITORY},
            here | {"packages_repository": moved},
            here | {"packages_repository": REPOSITORY, "_packages_origin_file": none},
            here | {"packages_repository": REPOSITORY, "_packages_sources_file": none},
        ],
    )
    assert [each["missing"] for each in found] == [missing, missing[3:], [], [], [], [], []]
    assert [each["elsewhere"] for each in found] == [False, False, False, False, True, True, True]
