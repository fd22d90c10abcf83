"""Ansible module: read the certificate, the authorities and the public key that a host has."""

from __future__ import annotations

import grp
import pwd
import stat
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: pki_host
short_description: Read the certificate, the authorities and the public key that a host has
description:
  - Looks into the folder of the host's certificate, and says whether each file there has its owner,
    group and mode. The private key is read by C(openssl) on the host, and stays there.
  - Changes nothing. Needs nothing but Python and C(openssl) where it runs.
options:
  folder:
    description: Folder of the host's certificate.
    type: path
    required: true
  group:
    description: Group of those who may read the key.
    type: str
    required: true
"""

EXAMPLES = """
- name: Look at the host's certificate
  pki_host:
    folder: /etc/iot-pki
    group: ssl-cert
"""

RETURN = """
certificate:
  description: PEM of the host's certificate with its chain. Empty where there is none.
  type: str
trusted:
  description: PEM of the authorities that the host trusts. Empty where there are none.
  type: str
public_key:
  description: PEM of the public half of the host's key. Empty where there is none that can be read.
  type: str
in_order:
  description: Whether folder and files are there, each with its owner, group and mode.
  type: bool
"""

SECONDS = 30


def owned(path: Path, group: str, mode: int) -> bool:
    """Tell whether a file or folder, no link, is root's, the group's, and has the mode."""
    try:
        found = path.lstat()
        return (
            not stat.S_ISLNK(found.st_mode)
            and stat.S_IMODE(found.st_mode) == mode
            and pwd.getpwuid(found.st_uid).pw_name == "root"
            and grp.getgrgid(found.st_gid).gr_name == group
        )
    except (OSError, KeyError):
        return False


def read(path: Path) -> str:
    """Return a file's text, or none where there is no file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def public_half(key: Path) -> str:
    """Return the public key of a private one as PEM, or none where openssl cannot read it.

    One that is not PKCS#8 is none: Kafka reads no other.
    """
    if not read(key).startswith("-----BEGIN PRIVATE KEY-----"):
        return ""
    try:
        done = subprocess.run(
            ["openssl", "pkey", "-in", str(key), "-pubout"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def look(folder: Path, group: str) -> dict[str, Any]:
    """Return what the folder holds, as the module answers it."""
    key, certificate, trusted = (folder / name for name in ("host.key", "host.pem", "ca.pem"))
    return {
        "certificate": read(certificate),
        "trusted": read(trusted),
        "public_key": public_half(key),
        "in_order": owned(folder, "root", 0o755)
        and owned(key, group, 0o640)
        and owned(certificate, "root", 0o644)
        and owned(trusted, "root", 0o644),
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "folder": {"type": "path", "required": True},
            "group": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    found = look(Path(module.params["folder"]), module.params["group"])
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
