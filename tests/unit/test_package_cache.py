"""The lab's package cache finds its own and others' servers, and reads the machine's resolver."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import pytest
import yaml

from iot_lab import package_cache, paths
from iot_lab.shell import LabError

TITLE = "nginx: master process /usr/sbin/nginx -e {0}/error.log -p {0} -c {0}/nginx.conf"


def process(folder: Path, pid: int, *words: str) -> None:
    (folder / str(pid)).mkdir(parents=True)
    (folder / str(pid) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")


def test_servers_are_those_of_labs(tmp_path: Path) -> None:
    process(tmp_path, 7, TITLE.format("/src/one/.lab/cache/packages"))
    process(tmp_path, 8, TITLE.format("/src/two/.lab/cache/packages"))
    process(tmp_path, 9, "nginx: worker process")
    process(tmp_path, 10, "nginx: master process /usr/sbin/nginx -c /etc/nginx/nginx.conf")
    process(tmp_path, 11, "grep", TITLE.format("/src/one/.lab/cache/packages"))
    assert package_cache.servers(tmp_path) == {
        7: "/src/one/.lab/cache/packages/nginx.conf",
        8: "/src/two/.lab/cache/packages/nginx.conf",
    }


def test_name_servers() -> None:
    text = "search example\nnameserver 192.0.2.1\n# nameserver 192.0.2.2\nnameserver fe80::1%eth0\n"
    assert package_cache.name_servers(text) == ["192.0.2.1", "[fe80::1]"]


def test_without_a_name_server_it_says_so() -> None:
    with pytest.raises(LabError, match="name server"):
        package_cache.name_servers("search example\n")


def test_its_settings_need_no_inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # molecule names one in the environment, whose variables mean nothing to this machine.
    monkeypatch.setenv("ANSIBLE_INVENTORY", str(paths.ROOT / "inventory" / "couchdb"))
    monkeypatch.setattr(package_cache, "FOLDER", tmp_path)
    monkeypatch.setattr(package_cache, "SETTINGS", tmp_path / "nginx.conf")
    package_cache.write_settings(
        {
            "package_cache_address": "192.0.2.1",
            "package_cache_port": 3142,
            "package_cache_clients": ["192.0.2.0/24"],
            "package_cache_resolvers": ["192.0.2.53"],
            "package_cache_dir": str(tmp_path / "files"),
            "package_cache_log": str(tmp_path / "access.log"),
        }
    )
    assert str(tmp_path / "package-cache.conf") in (tmp_path / "nginx.conf").read_text()
    assert "listen 192.0.2.1:3142" in (tmp_path / "package-cache.conf").read_text()


@dataclass
class Source:
    """A source of packages that can be cut off."""

    server: http.server.ThreadingHTTPServer
    asked: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.server.server_port

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def source() -> Iterator[Source]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            path = self.path
            if path == "/kafka/moved.tgz":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{found.port}/kafka/new.tgz")
                self.end_headers()
                return
            self.send_response(404 if "missing" in path else 200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f'<a href="http://files.test{path}">{path}</a>'.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Source(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


@dataclass
class Cache:
    """The role's settings under a real nginx."""

    program: str
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self, source: Source, *, valid: str | None = None) -> None:
        variables = yaml.safe_load(package_cache.DEFAULTS.read_text()) | {
            "ansible_managed": "a test",
            "package_cache_address": "127.0.0.1",
            "package_cache_port": self.port,
            "package_cache_clients": ["127.0.0.0/8"],
            "package_cache_resolvers": ["127.0.0.1"],
            "package_cache_dir": f"{self.folder}/files",
            "package_cache_log": f"{self.folder}/access.log",
            "package_cache_pypi_url": f"http://127.0.0.1:{source.port}/simple",
            "package_cache_pypi_files_url": "http://files.test",
            "package_cache_sources": {"kafka": f"http://127.0.0.1:{source.port}/kafka"},
        }
        engine = jinja2.Environment(trim_blocks=True)  # noqa: S701 - it renders no HTML
        site = engine.from_string(package_cache.TEMPLATE.read_text()).render(variables)
        if valid:
            site = site.replace("valid 200 10m;", f"valid 200 {valid};")
        (self.folder / "site.conf").write_text(site)
        (self.folder / "temporary").mkdir(exist_ok=True)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{k}_temp_path {self.folder}/temporary/{k}; " for k in kinds)
        user = "user root; " if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"{user}daemon off; pid {self.folder}/pid; error_log {self.folder}/error.log; "
            f"events {{}} http {{ {temporary} include {self.folder}/site.conf; }}"
        )
        settings = ["-c", str(self.folder / "nginx.conf"), "-e", str(self.folder / "error.log")]
        self.process = subprocess.Popen([self.program, *settings])
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError((self.folder / "error.log").read_text())

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(10)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
            return text


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    program = package_cache.program()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Cache(program, tmp_path, port)
    yield found
    found.stop()


def test_links_of_an_index_lead_to_the_cache(cache: Cache, source: Source) -> None:
    cache.start(source)
    assert cache.get("/pypi/simple/lz4/") == '<a href="/pypi/files/simple/lz4/">/simple/lz4/</a>'


def test_what_was_fetched_is_served_without_its_source(cache: Cache, source: Source) -> None:
    cache.start(source, valid="1s")
    paths = ("/pypi/simple/lz4/", "/kafka/4.3.1/kafka.tgz", "/kafka/moved.tgz")
    online = [cache.get(path) for path in paths]
    time.sleep(2.1)  # seconds; from now on an index is old, and a package is not
    assert [cache.get(path) for path in paths[:2]] == online[:2]
    assert source.asked.count("/simple/lz4/") == 2
    assert source.asked.count("/kafka/4.3.1/kafka.tgz") == 1
    time.sleep(2.1)
    source.close()
    assert [cache.get(path) for path in paths] == online


def test_a_server_that_sends_on_is_followed(cache: Cache, source: Source) -> None:
    cache.start(source)
    assert "/kafka/new.tgz" in cache.get("/kafka/moved.tgz")


def test_what_was_never_fetched_fails_without_its_source(cache: Cache, source: Source) -> None:
    cache.start(source)
    source.close()
    with pytest.raises(urllib.error.HTTPError, match="502"):
        cache.get("/pypi/simple/lz4/")


def test_it_is_no_way_to_other_things(cache: Cache, source: Source) -> None:
    cache.start(source)
    proxied = urllib.request.build_opener(
        urllib.request.ProxyHandler({"http": f"http://127.0.0.1:{cache.port}"})
    )
    for address in (
        "http://localhost/debian/dists/x",
        "http://127.0.0.1/pool/x",
        "http://a.test/x",
    ):
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            proxied.open(address, timeout=30)
    assert source.asked == []
