"""`lab setup`: installs what is missing on this machine, and only that.

Debian's packages come from apt. Python's go into two virtual environments: the tools (Ansible,
molecule, linters) from lab/requirements/tools.txt, and the apps as a host gets them.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import string
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from iot_lab import paths
from iot_lab.artifacts import apps_wheel
from iot_lab.console import duration, say, step
from iot_lab.shell import LabError, answer, locked, logged, retried, root_command, shown, succeeds

ATTEMPTS = 3
APT_OPTIONS = ("-o", "DPkg::Lock::Timeout=600", "-o", "Acquire::Retries=3")
# Python compiles what is used when it is first used: of Ansible's 50,000 files that is little.
PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--progress-bar=off", "--no-compile")

HOSTS = (
    "ca-certificates",
    "debian-archive-keyring",
    "gpg",
    "iproute2",
    "iptables",
    "mmdebstrap",
    "netavark",
    "nftables",
    "openssh-client",
    "podman",
    "runc",
    "vagrant",
)
TORCH = ("libopenblas0-pthread", "python3-torch", "python3-torchvision")
# For the tests: another client than ours, and other processors than this machine's.
FOREIGN = {"test": ("kcat", "qemu-user")}
# Training draws some of its images, and a test looks at how.
FONTS = ("fonts-noto-color-emoji",)

PROFILES = {
    "lab": "the hosts, and Ansible to converge them",
    "demo": "the pipeline as plain processes",
    "test": "everything that `make test` runs",
    "train": "what training the model takes",
}

# What inventory/*/group_vars/all/lab.yml reads.
PASSWORDS = (
    "kafka_admin",
    "kafka_iot-producer",
    "kafka_iot-inference",
    "kafka_iot-storage",
    "kafka_iot-audit",
    "kafka_iot-operator",
    "couchdb_admin",
    "couchdb_iot-storage",
    "couchdb_iot-audit",
    "mongodb_admin",
    "mongodb_iot-storage",
    "mongodb_iot-audit",
)
ALPHABET = string.ascii_letters + string.digits
LENGTH = 32

# Keyrings of Debian 12's first releases do not know Debian 13.
NEWEST_KEYRING = Path("/usr/share/keyrings/debian-archive-trixie-stable.gpg")


def setup(profile: str) -> None:
    """Install what a profile of PROFILES needs and does not have yet.

    Raises LabError when apt or pip cannot install something.
    """
    packages(profile)
    environments(profile)


def packages(profile: str) -> None:
    """Install the Debian packages that a profile needs. Raises LabError when apt cannot."""
    with locked("packages"):
        _install(_missing(profile))


def environments(profile: str) -> None:
    """Fill the virtual environments that a profile needs. Raises LabError when pip cannot."""
    with locked("environments"):
        if profile in {"lab", "test"}:
            _tools()
            passwords()
        if profile != "lab":
            _apps()


def ssh_key() -> Path:
    """Return the lab's own SSH key, made on first use and never part of the repository."""
    key = paths.SSH_KEY
    with locked("ssh"):
        key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not key.exists() or not key.with_suffix(".pub").exists():
            key.unlink(missing_ok=True)
            answer("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "iot-lab", "-f", str(key))
    return key


def passwords() -> None:
    """Make up the passwords of the lab's hosts that there are not yet, in files for you alone.

    Ansible's lookup `password` could do that. It takes a lock at each reading, waits for it by
    whole seconds, and gives up after seven: on a busy machine with many hosts it may.
    """
    with locked("passwords"):
        paths.SECRETS.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in PASSWORDS:
            file = paths.SECRETS / name
            if not file.exists():
                file.touch(mode=0o600)
                file.write_text("".join(secrets.choice(ALPHABET) for _ in range(LENGTH)) + "\n")


def _missing(profile: str) -> list[str]:
    """Return the packages to install: what apt does not know as installed, or no program does."""
    wanted = ["python3-venv"]
    if profile != "train":
        # What the archives of Kafka and of the database are made with, and run on.
        if _version("java", "-version") < 17:
            wanted.append("default-jre-headless")
        if not shutil.which("mvn"):
            wanted.append("maven")
        if _version("node", "--version") < 18:
            wanted.append("nodejs")
        if not shutil.which("npm"):
            wanted.append("npm")
    if profile in {"lab", "test"}:
        wanted += HOSTS
    if profile != "lab":
        wanted += TORCH
    if profile in {"test", "train"}:
        wanted += FONTS
    wanted += FOREIGN.get(profile, ())
    missing = set(wanted) - _installed(wanted)
    if profile in {"lab", "test"} and not NEWEST_KEYRING.exists():
        missing.add("debian-archive-keyring")
    return sorted(missing)


def _version(program: str, flag: str) -> int:
    """Return a program's major version, 0 where there is none."""
    if not shutil.which(program):
        return 0
    done = subprocess.run([program, flag], check=False, capture_output=True, text=True)
    found = re.search(r"\d+", done.stdout + done.stderr)
    return int(found.group()) if found and done.returncode == 0 else 0


def _installed(names: Sequence[str]) -> set[str]:
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *names],
        check=False,
        capture_output=True,
        text=True,
    )
    lines = (line.split() for line in done.stdout.splitlines())
    return {package for package, status in lines if status == "installed"}


def _install(names: Sequence[str]) -> None:
    if not names:
        return
    with step(f"Install Debian packages: {' '.join(names)}"):
        apt = root_command("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *APT_OPTIONS)
        try:
            retried(ATTEMPTS, lambda: logged("apt-update", [*apt, "update"]))
        except LabError as error:
            # One broken repository of many is no reason to give up: what is needed may not be
            # in it.
            say(f"    {str(error).splitlines()[0]}; going on with the lists there are")
        install = [*apt, "install", "--yes", "--no-install-recommends", *names]
        retried(ATTEMPTS, lambda: logged("apt-install", install))


def _tools() -> None:
    lock = paths.ROOT / "lab" / "requirements" / "tools.txt"
    with_lock = ["--require-hashes", "--requirement", str(lock)]
    _environment("tools", paths.TOOLS, [lock], with_lock)


def _apps() -> None:
    locks = sorted((paths.ROOT / "apps" / "requirements").glob("*.txt"))
    locked_packages = [word for lock in locks for word in ("--requirement", str(lock))]
    _environment(
        "apps",
        paths.APPS,
        locks,
        # As the role does: the locks name all there is, and numpy is the operating system's.
        ["--require-hashes", "--no-deps", *locked_packages],
        options=["--system-site-packages"],
    )
    wheel = apps_wheel()
    record = paths.APPS / "wheel.sha256"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if record.exists() and record.read_text() == digest:
        return
    record.unlink(missing_ok=True)
    pip = [str(paths.APPS / "bin" / "python"), "-m", "pip", "install", *PIP_OPTIONS]
    answer(*pip, "--no-deps", "--force-reinstall", str(wheel))
    record.write_text(digest)


def _environment(
    name: str,
    folder: Path,
    locks: Sequence[Path],
    requirements: Sequence[str],
    options: Sequence[str] = (),
) -> None:
    """Make a virtual environment hold what its locks say, if it does not yet.

    The record is written last, so an interrupted installation is seen and done again.
    """
    python = folder / "bin" / "python"
    record = folder / "locks.sha256"
    digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
    if record.exists() and record.read_text() == digest and succeeds(str(python), "-c", ""):
        return
    say(f"    {name}: installing Python packages into {shown(folder)}")
    started = time.monotonic()
    record.unlink(missing_ok=True)
    fresh = ["/usr/bin/python3", "-m", "venv", "--clear", *options, str(folder)]
    if not succeeds(str(python), "-m", "pip", "--version"):
        answer(*fresh)
    pip = [str(python), "-m", "pip", "install", *PIP_OPTIONS, *requirements]

    def install() -> None:
        logged(f"pip-{name}", pip, environment=_pip_environment(), title=name)

    try:
        retried(ATTEMPTS, install)
    except LabError:
        # What is left of an interrupted installation can be in the way.
        answer(*fresh)
        install()
    record.write_text(digest)
    say(f"    {name}: installed in {duration(time.monotonic() - started)}")


def _pip_environment() -> dict[str, str]:
    """Return what lets Debian's pip trust what the machine trusts, unless it is told otherwise."""
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    return {} if "PIP_CERT" in os.environ or not Path(bundle).exists() else {"PIP_CERT": bundle}
