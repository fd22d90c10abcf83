"""The lab's cache of packages, which its hosts install from: nginx on this machine.

It runs what the role package_cache runs on a host, on the address that this machine has in the
lab's network, and keeps packages under .lab/cache. What was fetched for one lab is there for the
next one, without internet, too.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from iot_lab import paths
from iot_lab.console import say
from iot_lab.shell import LabError, answer, locked, retried, root_command

PORT = 3142
FOLDER = paths.CACHE / "packages"
SETTINGS = FOLDER / "nginx.conf"
RECORD = FOLDER / "inputs.sha256"  # of what the running server was started with
ROLE = paths.ROOT / "roles" / "package_cache"
TEMPLATE = ROLE / "templates" / "package-cache.conf.j2"
DEFAULTS = ROLE / "defaults" / "main.yml"
UNPACKED = paths.CACHE / "nginx"
START_TIMEOUT = 10.0  # seconds
STOP_TIMEOUT = 10.0  # seconds

# Lets a socket have an address that comes up later: the network's bridge exists only while a host
# is on it. Python's socket module has no name for it.
IP_FREEBIND = 15

# How nginx names its first process. The path is that of a lab's settings.
MASTER = re.compile(r"nginx: master process .* -c (\S+/\.lab/cache/packages/nginx\.conf)$")


def ensure(subnet: str) -> str:
    """Run the cache for the hosts of a network, such as "192.168.56.0/24", and return its URL.

    A server that does what it should is left alone. Raises LabError when it cannot be run.
    """
    address = str(next(ipaddress.ip_network(subnet).hosts()))
    url = f"http://{address}:{PORT}"
    with locked("package-cache"):
        variables = {
            "package_cache_address": address,
            "package_cache_port": PORT,
            "package_cache_clients": [subnet],
            "package_cache_resolvers": name_servers(Path("/etc/resolv.conf").read_text()),
            "package_cache_dir": str(FOLDER / "files"),
            "package_cache_log": str(FOLDER / "access.log"),
        }
        digest = _digest(variables)
        # While another checkout's lab is up, ours is not: what is left of one is stale.
        stale = [pid for pid, settings in servers().items() if settings != str(SETTINGS)]
        _end(stale)
        current = RECORD.exists() and RECORD.read_text() == digest
        if not (current and str(SETTINGS) in servers().values()):
            stop()
            write_settings(variables)
            _start(program(), address)
            RECORD.write_text(digest)
        paths.PACKAGE_CACHE_URL.write_text(f"{url}\n")
    return url


def stop() -> None:
    """End the cache of this checkout, if it runs. What it keeps stays."""
    paths.PACKAGE_CACHE_URL.unlink(missing_ok=True)
    _end([pid for pid, settings in servers().items() if settings == str(SETTINGS)])


def program() -> str:
    """Return nginx: this machine's, or else Debian's package unpacked.

    It is not installed: Debian's package would start a server on port 80. Raises LabError when it
    cannot be fetched.
    """
    installed = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if installed:
        return installed
    program = UNPACKED / "usr" / "sbin" / "nginx"
    if not program.exists():
        say("    package cache: fetching Debian's nginx")
        retried(2, _fetch)
    return str(program)


def servers(processes: Path = Path("/proc")) -> dict[int, str]:
    """Return the caches of all labs that run on this machine: process ids with their settings."""
    found = {}
    for folder in processes.glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            if match := MASTER.match(title.rstrip("\0").replace("\0", " ").strip()):
                found[int(folder.name)] = match[1]
    return found


def name_servers(resolv_conf: str) -> list[str]:
    """Return the name servers of a resolv.conf as nginx wants them: IPv6 in brackets.

    Raises LabError when it names none.
    """
    found = []
    for line in resolv_conf.splitlines():
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            address = ipaddress.ip_address(words[1].partition("%")[0])
            found.append(f"[{address}]" if address.version == 6 else str(address))
    if not found:
        raise LabError("/etc/resolv.conf names no name server, which the package cache needs")
    return found


def _digest(variables: Mapping[str, object]) -> str:
    parts = [TEMPLATE.read_bytes(), DEFAULTS.read_bytes(), json.dumps(variables).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def write_settings(variables: Mapping[str, object]) -> None:
    """Write the settings: the role's own, in a frame that asks for no rights."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    site = FOLDER / "package-cache.conf"
    tools = paths.TOOLS / "bin"
    answer(
        # An inventory in the environment (molecule sets one) would bring its variables along.
        *(
            str(tools / "ansible"),
            "localhost",
            "--inventory",
            "localhost,",
            "--connection",
            "local",
        ),
        *("--module-name", "ansible.builtin.template"),
        *("--args", json.dumps({"src": str(TEMPLATE), "dest": str(site), "mode": "0644"})),
        *("--extra-vars", json.dumps({"ansible_python_interpreter": str(tools / "python")})),
        *("--extra-vars", f"@{DEFAULTS}", "--extra-vars", json.dumps(variables)),
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    temporary = "".join(
        f"    {kind}_temp_path {FOLDER}/temporary/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (FOLDER / "temporary").mkdir(exist_ok=True)
    SETTINGS.write_text(
        f"{user}worker_processes 1;\npid {FOLDER}/nginx.pid;\nerror_log {FOLDER}/error.log warn;\n"
        f"events {{}}\nhttp {{\n{temporary}    include {site};\n}}\n"
    )


def _start(program: str, address: str) -> None:
    log = FOLDER / "error.log"
    with socket.socket() as listener, log.open("ab") as errors:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        try:
            listener.bind((address, PORT))
        except OSError as error:
            raise LabError(
                f"the package cache cannot listen on {address}:{PORT}: {error}"
            ) from error
        listener.listen(511)
        process = subprocess.Popen(
            [program, "-e", str(log), "-p", str(FOLDER), "-c", str(SETTINGS)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[listener.fileno()],
            # How nginx hands its sockets on when it replaces itself.
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            start_new_session=True,
        )
    ends = time.monotonic() + START_TIMEOUT
    while process.pid not in servers():
        if process.poll() is not None or time.monotonic() > ends:
            process.kill()
            end = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise LabError(f"the package cache did not start. The end of {log}:\n{end}")
        time.sleep(0.05)


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    ends = time.monotonic() + STOP_TIMEOUT
    while set(pids) & set(servers()):
        if time.monotonic() > ends:
            raise LabError(f"the package cache does not end: process {', '.join(map(str, pids))}")
        time.sleep(0.05)


def _fetch() -> None:
    with tempfile.TemporaryDirectory(prefix="iot-lab-", dir="/var/tmp") as name:
        folder = Path(name)
        # Apt's own user writes there.
        folder.chmod(0o777)
        try:
            answer("apt-get", "download", "nginx", folder=folder)
        except LabError:
            answer(*root_command("apt-get", "update"))
            answer("apt-get", "download", "nginx", folder=folder)
        package = next(folder.glob("nginx_*.deb"))
        answer("dpkg-deb", "--extract", str(package), str(folder / "unpacked"))
        shutil.rmtree(UNPACKED, ignore_errors=True)
        shutil.move(folder / "unpacked", UNPACKED)
