"""The base images of the hosts: Debian's own packages, then a user and sshd (lab/image)."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from iot_lab import paths
from iot_lab.console import duration, say
from iot_lab.shell import LabError, answer, engine, locked, logged, retried, root_command, succeeds

SUITES = {"debian12": "bookworm", "debian13": "trixie"}

# Beside what Debian calls important: what a host needs to be reached, and Ansible to work on it.
PACKAGES = (
    "ca-certificates",
    "curl",
    "dbus",
    "iproute2",
    "openssh-server",
    "python3",
    "python3-apt",
    "python3-debian",
    "sudo",
    "systemd",
    "systemd-sysv",
)
OPTIONS = (
    "--variant=important",
    # A build that loses power is started anew, so nothing needs to wait for the disk.
    "--dpkgopt=force-unsafe-io",
    f"--include={','.join(PACKAGES)}",
)
SOURCE = paths.ROOT / "lab" / "image"
INPUTS_LABEL = "iot-lab.inputs"
ATTEMPTS = 3


def ensure(systems: Iterable[str]) -> None:
    """Build the images of these operating systems that are missing, broken or outdated.

    Raises LabError when a build fails.
    """
    with locked("images"):
        outdated = [system for system in sorted(set(systems)) if not _is_current(system)]
        with ThreadPoolExecutor(max_workers=len(SUITES)) as pool:
            for done in [pool.submit(_build, system) for system in outdated]:
                done.result()


def name(system: str) -> str:
    """Return the image's name for an operating system."""
    return f"localhost/iot-lab/{system}"


def _build(system: str) -> None:
    started = time.monotonic()
    base = f"localhost/iot-lab/base:{system}-{_digest_of_base(system)}"
    if not _is_whole(base):
        say(f"    {system}: building from Debian's packages (about a minute)")
        retried(ATTEMPTS, lambda: _import(system, base))
    unchecked = f"{name(system)}:unchecked"
    arguments = ("--build-arg", f"BASE={base}", "--label", f"{INPUTS_LABEL}={_digest(system)}")
    logged(
        f"image-{system}",
        # Without layers there is no cache, which could hold what an interrupted build left.
        [str(paths.ENGINE), "build", "--layers=false", *arguments, "--tag", unchecked, str(SOURCE)],
        title=system,
    )
    # Only an image that works gets the name that hosts are made from.
    engine("run", "--rm", "--network=none", unchecked, "sshd", "-V")
    engine("tag", unchecked, name(system))
    engine("untag", unchecked, unchecked)
    # What it replaces is removed unless a host is still made of it.
    engine("image", "prune", "--force", "--filter", f"label={INPUTS_LABEL}")
    say(f"    {system}: built in {duration(time.monotonic() - started)}")


def _import(system: str, base: str) -> None:
    suite = SUITES[system]
    # On disk, and where apt's own user may look: neither /tmp nor a home folder always is.
    with tempfile.TemporaryDirectory(prefix="iot-lab-", dir="/var/tmp") as folder:
        archive = Path(folder) / f"{suite}.tar"
        logged(
            f"debian-{system}",
            root_command(
                *("env", "TMPDIR=/var/tmp", "mmdebstrap", *OPTIONS, suite, str(archive)),
                *mirrors(suite, _repositories()),
            ),
            title=system,
        )
        engine("import", str(archive), base)


def mirrors(suite: str, repositories: Iterable[tuple[str, str]]) -> list[str]:
    """Return apt's source lines for a suite from where this machine's own packages come from.

    `repositories` are pairs of address and release of the machine's Debian repositories. Without
    any, mmdebstrap takes Debian's own.
    """
    lines = []
    for address, release in repositories:
        _, _, part = release.partition("-")
        if part in {"", "updates", "security"}:
            wanted = f"{suite}-{part}" if part else suite
            lines.append(f"deb {address} {wanted} main")
    unique = list(dict.fromkeys(lines))
    # Without the suite itself there is nothing to install from.
    return unique if any(line.endswith(f" {suite} main") for line in unique) else []


def _repositories() -> list[tuple[str, str]]:
    """Return address and release of each Debian repository that apt knows on this machine."""
    try:
        listed = answer(
            *("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"),
            *("Created-By: Packages", "Origin: Debian", "Component: main"),
        )
    except LabError:
        return []
    return [(address, release) for address, release in map(str.split, listed.splitlines())]


def remove() -> None:
    """Remove the images of this lab. Raises LabError while hosts of them exist."""
    listed = engine("images", "--quiet", "--filter", "reference=localhost/iot-lab/*")
    for image in dict.fromkeys(listed.split()):
        engine("rmi", "--force", image)


def _digest_of_base(system: str) -> str:
    return hashlib.sha256(repr((SUITES[system], OPTIONS)).encode()).hexdigest()[:12]


def _digest(system: str) -> str:
    files = sorted(file for file in SOURCE.iterdir() if file.is_file())
    parts = [_digest_of_base(system).encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _is_current(system: str) -> bool:
    form = f'{{{{ index .Config.Labels "{INPUTS_LABEL}" }}}}'
    try:
        built_from = engine("image", "inspect", "--format", form, name(system))
    except LabError:
        return False
    return built_from == _digest(system) and _is_whole(name(system))


def _is_whole(image: str) -> bool:
    """Tell whether an image exists with all its layers; an interrupted write can lose some.

    One that lost some is removed.
    """
    if not succeeds(str(paths.ENGINE), "image", "exists", image):
        return False
    if not succeeds(str(paths.ENGINE), "image", "mount", image):
        # Its layers would be taken for good when the same are written again. An image that hosts
        # are made of stays, without a name once the new one has it.
        succeeds(str(paths.ENGINE), "rmi", image)
        return False
    engine("image", "unmount", image)
    return True
