"""A folder of images that the role producer copies to its host: what arrives is what is there."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from iot_pipeline.sources import open_source

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can give root a file")


def copied(run_playbook: Run, folder: Path, dataset: Path) -> tuple[Path, str]:
    """Copy a data set as the role does, and say where to and what Ansible printed."""
    task = {"ansible.builtin.include_role": {"name": "producer", "tasks_from": "dataset"}}
    play = {"hosts": "all", "gather_facts": False, "tasks": [task]}
    variables = {
        "producer_dataset": str(dataset),
        "_producer_dataset_prefix": f"{folder}/copied-",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
    }
    (folder / "play.yml").write_text(json.dumps([play]))
    done = run_playbook(
        folder,
        {"hosts": {"localhost": None}},
        *("--connection=local", "--extra-vars", json.dumps(variables), "play.yml"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (target,) = folder.glob("copied-*")
    return target, done.stdout


def test_the_copy_gives_the_images_and_classes_of_the_folder(
    run_playbook: Run, tmp_path: Path
) -> None:
    dataset = tmp_path / "set"
    for name in ("cat/a.png", "cat/.ipynb_checkpoints/a.png", "sheet.jpg", "cat/dog/c.png"):
        (dataset / name).parent.mkdir(parents=True, exist_ok=True)
        (dataset / name).write_bytes(name.encode())
    (dataset / "dog").mkdir()
    (dataset / "dog/b.png").hardlink_to(dataset / "cat/a.png")
    (dataset / "horse").symlink_to("dog")
    target, _ = copied(run_playbook, tmp_path, dataset)
    with open_source(str(dataset)) as there, open_source(str(target)) as here:
        expected = [(image.label, image.data) for image in there]
        assert [(image.label, image.data) for image in here] == expected
        assert here.classes == ["cat", "dog", "horse"]
        assert len(expected) == 4
    _, again = copied(run_playbook, tmp_path, dataset)
    assert "changed=0" in again
    assert list(tmp_path.glob("copied-*")) == [target]
