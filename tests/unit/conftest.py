"""What all unit tests share."""

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set up logging for the whole process, and other tests look at it, too."""
    root, ours = logging.getLogger(), logging.getLogger("iot_pipeline")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="session")
def run_playbook() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a playbook on hosts that are made up: a folder for it, what `all` holds, and words."""
    return _run_playbook


def _run_playbook(
    folder: Path, inventory: dict[str, Any], *words: str
) -> subprocess.CompletedProcess[str]:
    (folder / "hosts.yml").write_text(json.dumps({"all": inventory}))
    command = shutil.which("ansible-playbook")
    assert command, "the tools are not on PATH"
    return subprocess.run(
        [command, "--inventory=hosts.yml", *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg")},
    )


@pytest.fixture
def environment_of() -> Callable[[str], dict[str, str]]:
    """Gives what systemd itself makes of a unit: the environment of its processes."""
    return _environment_of


def _environment_of(unit: str) -> dict[str, str]:
    """Return the environment that systemd itself makes of a unit; it starts nothing."""
    program = shutil.which("systemd", path="/lib/systemd:/usr/lib/systemd")
    if not program:
        pytest.skip("this machine has no systemd")
    # Its test is not for root, and pytest's own folders are root's alone.
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "tested.service").write_text(unit)
        (folder / "run").mkdir()
        (folder / "run").chmod(0o777)
        done = subprocess.run(
            [*nobody * (os.geteuid() == 0), program, "--test", "--user", "--unit=tested.service"],
            env={
                "HOME": name,
                "PATH": os.defpath,
                "XDG_RUNTIME_DIR": f"{name}/run",
                "SYSTEMD_UNIT_PATH": f"{name}:/usr/lib/systemd/user",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert "-> Unit tested.service:" in done.stdout, done.stdout + done.stderr
    lines = done.stdout.partition("-> Unit tested.service:")[2].partition("-> Unit ")[0]
    found = re.findall(r"^\s*Environment: (\w+)=(.*)$", lines, re.MULTILINE)
    return dict(found)
