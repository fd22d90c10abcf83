"""What the lab installs but cannot download as it is: built from package registries, then kept.

- Kafka: an archive of the official layout, assembled from Maven's jars.
- CouchDB: an archive of the stand-in server with its npm packages.
- MongoDB: an archive of the stand-in server with its jars.
- The apps: their wheel.

Each is built again only when something it is made of has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from iot_lab.command_line import Exit, Parser

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "lab" / "artifacts"
CACHE = ROOT / ".lab" / "cache"
WHEELS = ROOT / ".lab" / "wheels"

# Archives hold this one time, so that the same inputs give the same bytes.
EPOCH = 1_700_000_000
ATTEMPTS = 3

# Debian's Java runtime brings the compiler without its command, which is in another package.
JAVA_COMPILER = "jdk.compiler/com.sun.tools.javac.Main"

# Prebuilt binaries and C++ sources of LevelDB that no lab host runs.
_STANDIN_UNUSED = (
    "node_modules/.bin",
    "node_modules/leveldown/deps",
    "node_modules/leveldown/prebuilds/android",
    "node_modules/leveldown/prebuilds/darwin",
    "node_modules/leveldown/prebuilds/win32",
)


class ArtifactError(Exception):
    """An artifact cannot be built; the message says what to do."""


def kafka_archive(version: str | None = None, *, write_checksums: bool = False) -> Path:
    """Return Kafka's archive, assembled from Maven's jars if it is missing or outdated.

    `version` is that of pom.xml unless told; its jars must be recorded in jars-VERSION.sha256.
    `write_checksums` accepts whatever jars Maven resolves and records them, for a new version.
    The archive's SHA-512 lies beside it in a file of the same name with `.sha512` added.
    Raises ArtifactError when Maven is missing or fails, or a jar is not the one recorded.
    """
    source = SOURCES / "kafka"
    scala, newest = _kafka_versions(source / "pom.xml")
    kafka = version or newest
    name = f"kafka_{scala}-{kafka}"
    recorded = source / f"jars-{kafka}.sha256"

    def build(work: Path) -> Path:
        tree = work / name
        _say("kafka", "fetching the jars with Maven (56 MB, about a minute)")
        _fetch_jars(source / "pom.xml", tree / "libs", f"-Dkafka.version={kafka}")
        _check_jars("kafka", tree / "libs", recorded, write_checksums=write_checksums)
        shutil.copytree(source / "config", tree / "config")
        shutil.copytree(source / "bin", tree / "bin")
        _write_tools(source / "tools.txt", tree / "bin")
        return tree

    archive = CACHE / f"{name}.tgz"
    if write_checksums:
        archive.unlink(missing_ok=True)
    return _archive("kafka", archive, "sha512", [source], build)


def couchdb_archive() -> Path:
    """Return the archive of the CouchDB stand-in, built with npm if it is missing or outdated.

    npm checks every package against package-lock.json. The archive's SHA-256 lies beside it in a
    file of the same name with `.sha256` added. Raises ArtifactError when npm is missing or fails.
    """
    source = SOURCES / "couchdb"

    def build(work: Path) -> Path:
        tree = work / "couchdb-standin"
        tree.mkdir()
        for file in ("package.json", "package-lock.json", "server.js"):
            shutil.copy2(source / file, tree / file)
        _say("couchdb", "fetching the stand-in's packages with npm (about half a minute)")
        _run_retrying(
            [
                *(_tool("npm", "npm"), "ci", "--prefix", str(tree), "--omit=dev"),
                *("--omit=optional", "--no-audit", "--no-fund", "--loglevel=error"),
            ]
        )
        return tree

    archive = CACHE / "couchdb-standin.tgz"
    return _archive("couchdb", archive, "sha256", [source], build, _STANDIN_UNUSED)


def mongodb_archive(*, write_checksums: bool = False) -> Path:
    """Return the archive of the MongoDB stand-in, built if it is missing or outdated.

    `write_checksums` and the rest are as `kafka_archive` has them; the checksum is a SHA-256.
    """
    source = SOURCES / "mongodb"

    def build(work: Path) -> Path:
        tree = work / "mongodb-standin"
        libs = tree / "lib"
        _say("mongodb", "fetching the stand-in's jars with Maven (6 MB)")
        _fetch_jars(source / "pom.xml", libs)
        _check_jars("mongodb", libs, source / "jars.sha256", write_checksums=write_checksums)
        jars = ":".join(str(jar) for jar in sorted(libs.glob("*.jar")))
        _run_retrying(
            [
                *(_tool("java", "default-jre-headless"), "-m", JAVA_COMPILER),
                *("-source", "17", "-target", "17", "-nowarn", "-cp", jars),
                *("-d", str(tree / "classes"), str(source / "MongodbStandin.java")),
            ]
        )
        shutil.copytree(source / "bin", tree / "bin")
        return tree

    archive = CACHE / "mongodb-standin.tgz"
    if write_checksums:
        archive.unlink(missing_ok=True)
    return _archive("mongodb", archive, "sha256", [source], build)


def apps_wheel() -> Path:
    """Return the wheel of the distribution iot-pipeline, built if it is missing or outdated.

    Raises ArtifactError when the build fails.
    """
    apps = ROOT / "apps"
    parts = [apps / "pyproject.toml", apps / "src", apps / "models"]
    inputs = _digest_of(parts)
    record = WHEELS / "iot_pipeline.inputs"
    with _locked("apps"):
        if record.exists():
            wheel_name, _, built_from = record.read_text().strip().partition(" ")
            if built_from == inputs and (WHEELS / wheel_name).exists():
                _say("apps", f"{_shown(WHEELS / wheel_name)} is up to date")
                return WHEELS / wheel_name
        _say("apps", "building the wheel")
        python = ROOT / ".lab" / "venv" / "apps" / "bin" / "python"
        if not python.exists():
            raise ArtifactError(f"{_shown(python)} is missing: run 'lab/bin/lab setup demo' first.")
        with _workspace("apps") as work:
            # Built from a copy: build back ends leave files in the source tree.
            tree, output = _made(work / "apps"), work / "wheel"
            for part in filter(Path.exists, parts):
                if part.is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                    shutil.copytree(part, tree / part.name, ignore=ignored)
                else:
                    shutil.copy2(part, tree / part.name)
            _run_retrying(
                [
                    *(str(python), "-m", "pip", "wheel", "--no-deps", "--no-input"),
                    *("--disable-pip-version-check", "--wheel-dir", str(output), str(tree)),
                ],
                {"SOURCE_DATE_EPOCH": str(EPOCH)},
            )
            built = next(output.glob("*.whl"))
            wheel = _made(WHEELS) / built.name
            built.replace(wheel)
        record.write_text(f"{wheel.name} {inputs}\n")
        _say("apps", f"{_shown(wheel)} is built")
        return wheel


ARTIFACTS: dict[str, Callable[..., Path]] = {
    "kafka": kafka_archive,
    "couchdb": couchdb_archive,
    "mongodb": mongodb_archive,
    "apps": apps_wheel,
    # What an upgrade comes from.
    "kafka-4.2.1": partial(kafka_archive, "4.2.1"),
}
DEFAULT = ("kafka", "couchdb", "mongodb", "apps")


def main(arguments: list[str] | None = None) -> int:
    """Build the artifacts that the command line names and return its exit status."""
    parser = Parser(
        prog="lab artifacts",
        description="Build what the lab installs: Kafka's archive, databases' stand-ins, the apps.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(ARTIFACTS)} (default: {', '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--write-checksums",
        action="store_true",
        help="with kafka or mongodb: record the jars Maven resolves, after a change of pom.xml",
    )
    options = parser.parse_args(arguments)
    names: list[str] = options.names or list(DEFAULT)
    unknown = sorted(set(names) - set(ARTIFACTS))
    if unknown:
        parser.error(f"unknown artifact {', '.join(unknown)}: choose from {', '.join(ARTIFACTS)}")
    of_jars = names[0] == "mongodb" or names[0].startswith("kafka")
    if options.write_checksums and (len(names) != 1 or not of_jars):
        parser.error("--write-checksums is for mongodb, or one version of kafka, alone")
    try:
        for name in names:
            ARTIFACTS[name](**({"write_checksums": True} if options.write_checksums else {}))
    except ArtifactError as error:
        print(f"lab artifacts: {error}", file=sys.stderr)
        return Exit.UNAVAILABLE
    return Exit.OK


def _archive(
    name: str,
    archive: Path,
    algorithm: str,
    sources: list[Path],
    build: Callable[[Path], Path],
    unused: tuple[str, ...] = (),
) -> Path:
    inputs = _digest_of([*sources, Path(__file__)])
    checksum = archive.with_name(f"{archive.name}.{algorithm}")
    record = archive.with_name(f"{archive.name}.inputs")
    with _locked(name):
        complete = all(file.exists() for file in (archive, checksum, record))
        if complete and record.read_text().strip() == inputs:
            _say(name, f"{_shown(archive)} is up to date")
            return archive
        record.unlink(missing_ok=True)
        with _workspace(name) as work:
            tree = build(work)
            packed = work / archive.name
            write_archive(tree, packed, unused)
            digest = _digest(packed, algorithm)
            packed.replace(archive)
        checksum.write_text(f"{digest}\n")
        # Last, so that an archive whose build was cut off counts as none. The build may have
        # changed its own inputs: it writes checksums when told to.
        record.write_text(f"{_digest_of([*sources, Path(__file__)])}\n")
        _say(name, f"{_shown(archive)} is built ({archive.stat().st_size / 1e6:.0f} MB)")
        return archive


def write_archive(tree: Path, archive: Path, unused: tuple[str, ...] = ()) -> None:
    """Pack the folder `tree` into the gzip-compressed tar `archive`, the same bytes every time.

    Order, times, owners and permissions do not depend on the machine. Paths below `tree` that
    begin with one of `unused` are left out.
    """

    def normalized(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = EPOCH
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        return member

    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=EPOCH) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in [tree, *sorted(tree.rglob("*"))]:
            inside = path.relative_to(tree).as_posix()
            if not inside.startswith(unused or ("\0",)):
                name = tree.name if path == tree else f"{tree.name}/{inside}"
                tar.add(path, name, recursive=False, filter=normalized)


def _kafka_versions(pom: Path) -> tuple[str, str]:
    found = dict(re.findall(r"<(scala|kafka)\.version>([^<]+)<", pom.read_text()))
    if set(found) != {"scala", "kafka"}:
        raise ArtifactError(f"{_shown(pom)} must set scala.version and kafka.version.")
    return found["scala"], found["kafka"]


def _fetch_jars(pom: Path, libs: Path, *properties: str) -> None:
    _run_retrying(
        [
            *(_tool("mvn", "maven"), "--quiet", "--batch-mode"),
            *("--file", str(pom), "dependency:copy-dependencies"),
            *("-DincludeScope=runtime", f"-DoutputDirectory={libs}", *properties),
        ]
    )


def _check_jars(name: str, libs: Path, listing: Path, *, write_checksums: bool) -> None:
    if write_checksums:
        _write_checksums(name, libs, listing)
    _verify_checksums(name, libs, listing)


def _write_checksums(name: str, libs: Path, listing: Path) -> None:
    lines = [f"{_digest(jar, 'sha256')}  {jar.name}\n" for jar in sorted(libs.glob("*.jar"))]
    listing.write_text("".join(lines))
    _say(name, f"recorded {len(lines)} jars in {_shown(listing)}")


def _verify_checksums(name: str, libs: Path, listing: Path) -> None:
    expected = {}
    for line in listing.read_text().splitlines():
        digest, _, jar_name = line.partition("  ")
        expected[jar_name] = digest
    found = {jar.name: _digest(jar, "sha256") for jar in libs.glob("*.jar")}
    wrong = sorted(jar for jar in expected | found if expected.get(jar) != found.get(jar))
    if wrong:
        raise ArtifactError(
            f"jars that differ from {_shown(listing)}, are missing or are not in it: "
            f"{', '.join(wrong)}. After a change of pom.xml run "
            f"'lab/bin/lab artifacts {name} --write-checksums'; otherwise do not trust them."
        )


def _write_tools(table: Path, folder: Path) -> None:
    for line in table.read_text().splitlines():
        if line and not line.startswith("#"):
            name, main_class = line.split()
            script = folder / name
            script.write_text(
                "#!/bin/sh\n"
                'exec "$(dirname -- "$(readlink -f -- "$0")")/kafka-run-class.sh" '
                f'{main_class} "$@"\n'
            )
    for script in folder.iterdir():
        script.chmod(0o755)


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _digest_of(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(f"{file.relative_to(ROOT)} {_digest(file, 'sha256')}\n".encode())
    return total.hexdigest()


def _tool(command: str, package: str) -> str:
    found = shutil.which(command)
    if found is None:
        raise ArtifactError(f"{command} is missing: run 'apt-get install {package}'.")
    return found


def _run_retrying(command: list[str], environment: dict[str, str] | None = None) -> None:
    # Registries fail now and then, and the next try passes.
    for attempt in range(1, ATTEMPTS + 1):
        done = subprocess.run(
            command,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return
        if attempt < ATTEMPTS:
            print(f"  failed, trying again ({attempt + 1} of {ATTEMPTS})", flush=True)
            time.sleep(3 * attempt)
    last_lines = "\n".join(done.stdout.strip().splitlines()[-15:])
    raise ArtifactError(f"{Path(command[0]).name} failed {ATTEMPTS} times:\n{last_lines}")


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    with (_made(CACHE) / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _workspace(name: str) -> Iterator[Path]:
    # Always the same folder, so that a build that was cut off leaves nothing for ever.
    work = CACHE / f"{name}.work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield _made(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _say(name: str, message: str) -> None:
    print(f"{name}: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
