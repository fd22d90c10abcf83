"""What holds for the repository as a whole."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from iot_lab import paths, setup

ROOT = Path(__file__).parents[2]
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    if name and (ROOT / name).is_file()
]

# Everyone reaches registries through a mirror or a proxy of their own, set in the tools' own
# configuration. A host name in a lock file or a role would go around it.
REGISTRY = re.compile(
    r"\b(pypi\.org|files\.pythonhosted\.org|repo1?\.maven\.(apache\.)?org|registry\.npmjs\.org"
    r"|deb\.debian\.org|proxy\.golang\.org|crates\.io)\b"
)

# But for the cache that is such a mirror: these are its variables.
SOURCES = [
    ROOT / "roles/package_cache" / name for name in ("defaults/main.yml", "meta/argument_specs.yml")
]

INVENTORIES = sorted(p for p in (ROOT / "inventory").iterdir() if p.is_dir())


def text_of(path: Path) -> str:
    """The file's text; of a binary file what can be read."""
    return path.read_bytes().decode(errors="ignore")


def test_no_registry_is_named() -> None:
    assert REGISTRY.search("https://" + "pypi" + ".org/simple")
    named = {
        str(path.relative_to(ROOT)): match[0]
        for path in TRACKED
        if path not in SOURCES and (match := REGISTRY.search(text_of(path)))
    }
    assert named == {}


def test_scripts_can_be_run() -> None:
    scripts = [
        p
        for p in TRACKED
        if p.read_bytes()[:2] == b"#!"
        and p.suffix != ".j2"
        # These are packed into archives, which gives them their modes.
        and ROOT / "lab/artifacts" not in p.parents
    ]
    assert scripts
    assert [p for p in scripts if not p.stat().st_mode & 0o111] == []


def role_options() -> set[str]:
    return {
        option
        for specs in ROOT.glob("roles/*/meta/argument_specs.yml")
        for option in yaml.safe_load(specs.read_text())["argument_specs"]["main"]["options"]
    }


def variables(inventory: Path) -> dict[str, Any]:
    """All variables of an inventory: of its groups, its hosts, and what the lab lays over them."""
    found: dict[str, Any] = {}
    for path in sorted(inventory.rglob("*.yml")):
        text = path.read_text()
        if text.startswith("$ANSIBLE_VAULT"):
            continue
        data = yaml.safe_load(text) or {}
        if path.name == "hosts.yml":
            for host in data["all"]["hosts"].values():
                found |= host or {}
            found |= data["all"].get("vars", {})
        else:
            found |= data
    return found


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda p: p.name)
def test_every_inventory_variable_is_used(inventory: Path) -> None:
    """A misspelt variable would be ignored in silence, and the role's default taken."""
    found = variables(inventory)
    expressions = str(list(found.values()))
    options = role_options()
    unused = {
        name
        for name in found
        if name not in options
        and not name.startswith(("ansible_", "vm_"))
        and not re.search(rf"\b{name}\b", expressions)
    }
    assert unused == set()


def test_the_lab_makes_up_the_passwords_that_its_inventories_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = (ROOT / "inventory").glob("*/group_vars/all/lab.yml")
    read = {
        name for file in files for name in re.findall(r"/secrets/([\w-]+)'\)", file.read_text())
    }
    assert read == set(setup.PASSWORDS)
    monkeypatch.setattr(paths, "SECRETS", tmp_path / "secrets")
    setup.passwords()
    made = {file.name: file.read_text() for file in paths.SECRETS.iterdir()}
    assert made.keys() == read
    assert len(set(made.values())) == len(read)
    assert {file.stat().st_mode & 0o777 for file in paths.SECRETS.iterdir()} == {0o600}
    setup.passwords()
    assert made == {file.name: file.read_text() for file in paths.SECRETS.iterdir()}
