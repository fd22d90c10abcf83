"""Searches this host for secrets and prints where they are.

    stdin   {"secrets": {"kafka_admin_password": ["the password", "another form of it"]},
             "key": "/etc/ssl/iot-pipeline/host.key"}
    stdout  {"found": {"kafka_admin_password": [["/root/.netrc", "root:root", "600"]],
                       "the host's key": [["the journal"]]},
             "searched": {"files": 31847, "processes": 40, "lines of the journal": 9000, …}}

Without `key` there is no key to look for. This program has secrets in no argument and in no file.
"""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOTS = (
    *("/dev/shm", "/etc", "/home", "/opt", "/root", "/run", "/srv", "/tmp", "/usr/local"),
    *("/var/backups", "/var/cache", "/var/lib", "/var/log", "/var/mail", "/var/spool", "/var/tmp"),
)
# Elsewhere a larger one is data that others sent: what is stored, not what guards it.
WHOLE = ("/etc/", "/opt/")
LARGEST_BYTES = 256 * 1024 * 1024
FILES_AT_ONCE = 500

Needles = dict[str, list[bytes]]


def read_needles(asked: dict[str, Any]) -> Needles:
    needles = {name: [form.encode() for form in forms] for name, forms in asked["secrets"].items()}
    if asked["key"]:
        lines = Path(asked["key"]).read_bytes().splitlines()
        body = [line for line in lines if not line.startswith(b"-----")]
        # The first line of a long one begins with what all keys of its kind have in common.
        needles["the host's key"] = [body[1] if len(body) > 2 else body[0]]
    return needles


def names_in(text: bytes, needles: Needles) -> list[str]:
    return [name for name, forms in needles.items() if any(form in text for form in forms)]


def files() -> Iterator[str]:
    for root in ROOTS:
        for folder, _, names in os.walk(root):
            for name in names:
                path = f"{folder}/{name}"
                try:
                    seen = os.lstat(path)
                except OSError:
                    continue
                whole = path.startswith(WHOLE) or seen.st_size <= LARGEST_BYTES
                if stat.S_ISREG(seen.st_mode) and whole:
                    yield path


def suspects(paths: list[str], needles: Needles) -> list[str]:
    """The files that hold any of them; grep is as fast as the disk."""
    patterns = os.memfd_create("patterns")
    try:
        os.write(patterns, b"\n".join(form for forms in needles.values() for form in forms))
        found = []
        for start in range(0, len(paths), FILES_AT_ONCE):
            os.lseek(patterns, 0, os.SEEK_SET)
            done = subprocess.run(
                [
                    *("grep", "--text", "--fixed-strings", f"--file=/proc/self/fd/{patterns}"),
                    *("--files-with-matches", "--null", "--no-messages", "--"),
                    *paths[start : start + FILES_AT_ONCE],
                ],
                check=False,
                stdout=subprocess.PIPE,
                pass_fds=[patterns],
                env=os.environ | {"LC_ALL": "C"},
            )
            found += [os.fsdecode(path) for path in done.stdout.split(b"\0") if path]
        return found
    finally:
        os.close(patterns)


def owner_and_mode(path: Path) -> tuple[str, str]:
    return f"{path.owner()}:{path.group()}", f"{stat.S_IMODE(path.stat().st_mode):o}"


def of_processes(what: str) -> Iterator[tuple[str, bytes]]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / what).read_bytes()
            name = (process / "comm").read_text().strip()
        except OSError:
            continue
        if text:
            yield f"the {what} of {name}", text


def of_command(where: str, *command: str) -> Iterator[tuple[str, bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout
        for line in running.stdout:
            yield where, line


def main(asked: dict[str, Any]) -> None:
    needles = read_needles(asked)
    found: dict[str, list[tuple[str, ...]]] = {name: [] for name in needles}
    paths = list(files())
    for path in suspects(paths, needles):
        for name in names_in(Path(path).read_bytes(), needles):
            found[name].append((path, *owner_and_mode(Path(path))))

    searched = {"files": len(paths)}
    elsewhere: dict[str, Iterable[tuple[str, bytes]]] = {
        "arguments of processes": of_processes("cmdline"),
        "environments of processes": of_processes("environ"),
        "lines of the journal": of_command(
            "the journal",
            *("journalctl", "--no-pager", "--output=export", "--output-fields=MESSAGE,_CMDLINE"),
        ),
        # With what is set for them, and what they are started with.
        "lines about units": of_command("a unit", "systemctl", "show", "*"),
        "variables of systemd": of_command("systemd", "systemctl", "show-environment"),
    }
    for kind, texts in elsewhere.items():
        searched[kind] = 0
        for where, text in texts:
            searched[kind] += 1
            for name in names_in(text, needles):
                found[name].append((where,))
    print(json.dumps({"found": found, "searched": searched}))


if __name__ == "__main__":
    main(json.load(sys.stdin))
