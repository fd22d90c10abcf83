"""Where the lab keeps what it makes. Everything but the repository's own files is under .lab/."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = ROOT / "inventory"

STATE = ROOT / ".lab"
CACHE = STATE / "cache"
LOGS = STATE / "log"
SECRETS = STATE / "secrets"
SSH_KEY = STATE / "ssh" / "id_ed25519"
TOOLS = STATE / "venv" / "tools"
APPS = STATE / "venv" / "apps"

# Where hosts find the package cache while it runs.
PACKAGE_CACHE_URL = STATE / "package-cache.url"

# Says that molecule booted the running hosts and may destroy them.
MOLECULE_HOSTS = STATE / "molecule-hosts"

VAGRANT_MACHINES = ROOT / ".vagrant" / "machines"
ENGINE = ROOT / "lab" / "bin" / "docker"
