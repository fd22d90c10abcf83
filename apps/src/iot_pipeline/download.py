"""One large file over HTTP: resumed, retried, verified, with progress."""

from __future__ import annotations

import hashlib
import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from iot_pipeline.errors import Exit, PipelineError
from iot_pipeline.service import Log

log = Log("download")

CHUNK = 256 * 2**10  # bytes
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 6  # in a row without a new byte
LONGEST_PAUSE = 30.0  # seconds between attempts
LOG_INTERVAL = 10.0  # seconds between lines of progress where there is no terminal


class DownloadError(PipelineError):
    """The file cannot be had from there; the message says why."""

    exit_status = Exit.UNREACHABLE


def digest(path: Path, heartbeat: Callable[[], None] = lambda: None) -> str:
    """The file's sha256 in hexadecimal."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            heartbeat()
    return sha256.hexdigest()


def download(
    url: str,
    target: Path,
    size: int,
    sha256: str,
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Download a file of known size and digest.

    What is loaded lies in `<target>.part` until it is complete and verified, and a later call goes
    on from there.

    Args:
        url: its address, http or https.
        target: where it shall lie, in a folder that exists.
        size: its length in bytes.
        sha256: its digest in hexadecimal.
        heartbeat: called for every chunk and while waiting; what it raises ends the download.

    Raises:
        DownloadError: the server refuses, keeps failing, or sends another file; or the disk does.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"{url!r} is no http or https address")
    part = target.with_name(target.name + ".part")
    progress = Progress(target.name, size)
    try:
        part.touch()
        _complete(url, part, size, progress, heartbeat)
        progress.done()
        found = digest(part, heartbeat)
        if found != sha256:
            part.unlink()
            raise DownloadError(f"{url} sent another file: its sha256 is {found}, not {sha256}")
        part.replace(target)
    except OSError as error:
        raise DownloadError(f"cannot write {part}: {error.strerror or error}") from error


def _complete(
    url: str, part: Path, size: int, progress: Progress, heartbeat: Callable[[], None]
) -> None:
    if part.stat().st_size > size:
        log.warning("partial download is too long: starting again", path=part, expected_bytes=size)
        part.write_bytes(b"")
    failures = 0
    while (have := part.stat().st_size) < size:
        problem = _attempt(url, part, have, size, progress, heartbeat)
        loaded = part.stat().st_size
        if loaded >= size:
            break
        failures = 0 if loaded > have else failures + 1
        if failures >= ATTEMPTS:
            raise DownloadError(
                f"{url}: {problem}, {ATTEMPTS} times in a row; "
                f"{loaded:,} of {size:,} bytes are kept and the next start goes on from there"
            )
        pause = min(2.0**failures, LONGEST_PAUSE)
        log.warning("download interrupted", url=url, error=problem, retry_seconds=pause)
        _wait(pause, heartbeat)


def _attempt(
    url: str, part: Path, have: int, size: int, progress: Progress, heartbeat: Callable[[], None]
) -> str:
    """Load what is missing; returns why it ended."""
    request = urllib.request.Request(  # noqa: S310 - download() lets only http and https through
        url, headers={"User-Agent": "iot-pipeline", "Range": f"bytes={have}-"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310 - as above
            # A server may ignore the range and send everything.
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            _append(response, part, have if resumed else 0, size, progress, heartbeat)
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise DownloadError(f"{url}: {error.code} {error.reason}") from error
        return f"{error.code} {error.reason}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return "the connection ended early"


def _append(
    response: http.client.HTTPResponse,
    part: Path,
    start: int,
    size: int,
    progress: Progress,
    heartbeat: Callable[[], None],
) -> None:
    with part.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        # One byte too many is enough to know that it is another file.
        while file.tell() <= size and (chunk := response.read1(CHUNK)):
            file.write(chunk)
            progress.update(file.tell())
            heartbeat()


def _wait(seconds: float, heartbeat: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        heartbeat()
        time.sleep(min(left, 0.2))


class Progress:
    """A progress bar on a terminal; elsewhere a log line now and then."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._terminal = sys.stderr.isatty()
        self._start: tuple[float, int] | None = None
        self._shown = 0.0

    def update(self, loaded: int) -> None:
        """Show that `loaded` bytes are here."""
        now = time.monotonic()
        if self._start is None:
            self._start = now, loaded
        if now - self._shown < (0.2 if self._terminal else LOG_INTERVAL):
            return
        self._shown = now
        since, first = self._start
        rate = (loaded - first) / (now - since) if now > since else 0.0
        left = round((self._size - loaded) / rate) if rate else "unknown"
        percent = 100 * min(loaded / self._size, 1.0)
        if self._terminal:
            bar = "█" * round(percent * 0.3)
            sys.stderr.write(
                f"\r{self._name} {bar:░<30} {percent:3.0f} %  {loaded / 1e6:.1f} of "
                f"{self._size / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s, {left} s left\033[K"
            )
            sys.stderr.flush()
        else:
            log.info(
                "downloading",
                file=self._name,
                percent=round(percent),
                megabytes=round(loaded / 1e6, 1),
                megabytes_per_second=round(rate / 1e6, 2),
                seconds_left=left,
            )

    def done(self) -> None:
        """Show the whole bar and end the terminal's line."""
        if self._start and self._terminal:
            self._shown = 0.0
            self.update(self._size)
            sys.stderr.write("\n")
