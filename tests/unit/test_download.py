import hashlib
import http.server
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from iot_pipeline import download as module
from iot_pipeline.download import DownloadError, download

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT as told and remembers the ranges that it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[int] = []
        self.content = CONTENT
        self.ignores_ranges = False
        self.cuts: list[int] = []
        """Bytes after which the next answers end early."""
        self.statuses: list[int] = []
        """Errors that the next answers are."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/archive.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"]).group(1))  # type: ignore[union-attr]
        self.server.ranges.append(start)
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
            return
        if self.server.ignores_ranges:
            start = 0
            self.send_response(200)
        else:
            self.send_response(206)
            total = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        body = self.server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cuts:
            body = body[: self.server.cuts.pop(0)]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.0)
    with running() as server:
        yield server


def fetch(server: Server, target: Path) -> None:
    download(server.url, target, len(CONTENT), SHA256)


def test_downloads_and_leaves_nothing_else(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gz"]
    assert server.ranges == [0]


def test_goes_on_after_lost_connections_and_server_errors(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 200_000]
    server.statuses = [503]
    fetch(server, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == CONTENT
    assert server.ranges == [0, 0, 300_000, 500_000]


def test_goes_on_where_an_earlier_run_ended(server: Server, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    server.cuts = [400_000]
    with pytest.raises(KeyboardInterrupt):
        download(server.url, tmp_path / "a.gz", len(CONTENT), SHA256, interrupt)
    left = (tmp_path / "a.gz.part").stat().st_size
    assert 0 < left <= 400_000
    fetch(server, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == CONTENT
    assert server.ranges == [0, left]


def test_starts_again_where_the_server_knows_no_ranges(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.gz.part").write_bytes(b"x" * 1000)
    server.ignores_ranges = True
    fetch(server, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == CONTENT


def test_too_long_a_part_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.gz.part").write_bytes(b"x" * (len(CONTENT) + 1))
    fetch(server, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"y" * len(CONTENT), CONTENT + b"more"])
def test_another_file_is_refused_and_not_kept(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    server.content = content
    with pytest.raises(DownloadError, match="sent another file"):
        fetch(server, tmp_path / "a.gz")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_ends_it_at_once(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadError, match="404 Not Found"):
        fetch(server, tmp_path / "a.gz")
    assert server.ranges == [0]


def test_gives_up_after_attempts_without_progress(server: Server, tmp_path: Path) -> None:
    server.cuts = [5000] + [0] * 50
    with pytest.raises(DownloadError, match="5,000 of 1,024,000 bytes are kept"):
        fetch(server, tmp_path / "a.gz")
    assert len(server.ranges) == 1 + module.ATTEMPTS
    assert (tmp_path / "a.gz.part").stat().st_size == 5000


def test_no_server_is_said(server: Server, tmp_path: Path) -> None:
    server.server_close()
    with pytest.raises(DownloadError, match=r"[Cc]onnection refused, 6 times in a row"):
        fetch(server, tmp_path / "a.gz")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/file", "archive.tar.gz"])
def test_only_web_addresses_are_taken(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="is no http or https address"):
        download(url, tmp_path / "a.gz", 1, SHA256)


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot write .*missing/a\.gz\.part"):
        fetch(server, tmp_path / "missing" / "a.gz")


def test_progress_is_logged_where_there_is_no_terminal(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fetch(server, tmp_path / "a.gz")
    assert "downloading file=a.gz percent=" in caplog.text
