"""What the lab builds: the same bytes each time, and nothing that was not recorded."""

import hashlib
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from iot_lab import artifacts
from iot_lab.command_line import Exit

KAFKA = artifacts.SOURCES / "kafka"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(artifacts, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def make_tree(folder: Path, *, executable: bool = True) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "run.sh").write_text("#!/bin/sh\n")
    (folder / "bin" / "run.sh").chmod(0o700 if executable else 0o600)
    (folder / "unused").mkdir()
    (folder / "unused" / "file").write_text("x")
    (folder / "unused-not").write_text("y")
    return folder


def test_equal_trees_make_equal_archives(tmp_path: Path) -> None:
    digests = set()
    for number in range(2):
        tree = make_tree(tmp_path / str(number) / "tree")
        archive = tmp_path / f"{number}.tgz"
        artifacts.write_archive(tree, archive)
        digests.add(hashlib.sha256(archive.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_an_archive_says_nothing_of_who_built_it(tmp_path: Path) -> None:
    artifacts.write_archive(make_tree(tmp_path / "tree"), tmp_path / "a.tgz")
    with tarfile.open(tmp_path / "a.tgz") as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert members["tree/bin/run.sh"].mode == 0o755
    assert members["tree/unused/file"].mode == 0o644
    assert {(m.uid, m.uname, m.mtime) for m in members.values()} == {(0, "root", artifacts.EPOCH)}


def test_unused_paths_are_left_out(tmp_path: Path) -> None:
    artifacts.write_archive(make_tree(tmp_path / "tree"), tmp_path / "a.tgz", ("unused/",))
    with tarfile.open(tmp_path / "a.tgz") as tar:
        assert "tree/unused/file" not in tar.getnames()
        assert "tree/unused-not" in tar.getnames()


def test_built_once_and_again_when_an_input_changes(cache: Path) -> None:
    source = artifacts.ROOT / "lab" / "artifacts" / "kafka" / "config"
    changing = cache.parent / "input"
    changing.mkdir()
    (changing / "file").write_text("1")
    builds = []

    def build(work: Path) -> Path:
        builds.append(work)
        return make_tree(work / "tree")

    def archive() -> Path:
        inputs = [source, changing]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(artifacts, "ROOT", Path("/"))
            return artifacts._archive("test", cache / "test.tgz", "sha256", inputs, build)

    path = archive()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (cache / "test.tgz.sha256").read_text() == f"{digest}\n"
    archive()
    assert len(builds) == 1
    (changing / "file").write_text("2")
    archive()
    assert len(builds) == 2
    path.unlink()
    archive()
    assert len(builds) == 3
    assert not builds[-1].exists()


def test_a_build_that_fails_leaves_no_archive_that_counts(cache: Path) -> None:
    def build(_: Path) -> Path:
        raise artifacts.ArtifactError("no network")

    for _ in range(2):
        with pytest.raises(artifacts.ArtifactError, match="no network"):
            artifacts._archive("test", cache / "test.tgz", "sha256", [KAFKA / "bin"], build)
    assert not (cache / "test.tgz").exists()


@pytest.mark.parametrize("tamper", ["changed", "missing", "new"])
def test_jars_must_be_those_that_were_recorded(tmp_path: Path, tamper: str) -> None:
    for name in ("a.jar", "b.jar"):
        (tmp_path / name).write_text(name)
    listing = tmp_path / "jars.sha256"
    artifacts._write_checksums("kafka", tmp_path, listing)
    artifacts._verify_checksums("kafka", tmp_path, listing)
    if tamper == "missing":
        (tmp_path / "b.jar").unlink()
    else:
        (tmp_path / ("b.jar" if tamper == "changed" else "c.jar")).write_text("other")
    with pytest.raises(artifacts.ArtifactError, match=r"[bc]\.jar"):
        artifacts._verify_checksums("kafka", tmp_path, listing)


def test_the_recorded_jars_are_those_of_the_versions_that_can_be_built() -> None:
    scala, newest = artifacts._kafka_versions(KAFKA / "pom.xml")
    others = [n.removeprefix("kafka-") for n in artifacts.ARTIFACTS if n.startswith("kafka-")]
    listings = {f"jars-{kafka}.sha256": kafka for kafka in [newest, *others]}
    assert set(listings) == {file.name for file in KAFKA.glob("*.sha256")}
    for listing, kafka in listings.items():
        recorded = (KAFKA / listing).read_text()
        assert f"kafka_{scala}-{kafka}.jar" in recorded
        assert f"kafka-tools-{kafka}.jar" in recorded


def test_the_standin_s_recorded_jars_are_those_of_its_versions() -> None:
    mongodb = artifacts.SOURCES / "mongodb"
    pinned = re.findall(
        r"<artifactId>(.+)</artifactId>\s*<version>(.+)</version>\s*</dependency>",
        (mongodb / "pom.xml").read_text(),
    )
    jars = (mongodb / "jars.sha256").read_text()
    assert pinned
    assert all(f"{name}-{version}.jar" in jars for name, version in pinned)


def test_every_tool_runs_its_class(tmp_path: Path) -> None:
    home = tmp_path / "kafka"
    (home / "bin").mkdir(parents=True)
    # In place of Java: prints what it was called with.
    (home / "bin" / "kafka-run-class.sh").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    artifacts._write_tools(KAFKA / "tools.txt", home / "bin")
    link = tmp_path / "kafka-topics.sh"
    link.symlink_to(home / "bin" / "kafka-topics.sh")
    done = subprocess.run(
        [link, "--describe", "two words"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "org.apache.kafka.tools.TopicCommand",
        "--describe",
        "two words",
    ]


def test_scripts_pass_the_environment_to_java(tmp_path: Path) -> None:
    java = tmp_path / "jdk" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    java.chmod(0o755)
    done = subprocess.run(
        ["sh", KAFKA / "bin" / "kafka-run-class.sh", "Some.Class", "an argument"],
        env={
            "PATH": "/usr/bin:/bin",
            "JAVA_HOME": str(tmp_path / "jdk"),
            "KAFKA_HEAP_OPTS": "-Xms1m -Xmx2m",
            "KAFKA_OPTS": "-Da=b",
            "LOG_DIR": "/log/dir",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    arguments = done.stdout.splitlines()
    assert arguments[:2] == ["-Xms1m", "-Xmx2m"]
    assert {"-Da=b", "-Dkafka.logs.dir=/log/dir"} <= set(arguments)
    assert arguments[-2:] == ["Some.Class", "an argument"]


def test_the_standin_is_started_from_anywhere(tmp_path: Path) -> None:
    script = tmp_path / "mongodb-standin" / "bin" / "mongodb-standin"
    script.parent.mkdir(parents=True)
    shutil.copy2(artifacts.SOURCES / "mongodb" / "bin" / "mongodb-standin", script)
    link = tmp_path / "link"
    link.symlink_to(script)
    java = tmp_path / "java"
    java.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    java.chmod(0o755)
    done = subprocess.run(
        [link],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "MONGODB_JAVA_OPTS": "-Xmx1m -Da=b"},
        capture_output=True,
        text=True,
        check=True,
    )
    *options, _classes, classpath, main = done.stdout.splitlines()
    assert (options, main) == (["-Xmx1m", "-Da=b"], "MongodbStandin")
    home = script.parents[1]
    assert classpath == f"{home}/lib/*:{home}/classes"


def test_no_java_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", KAFKA / "bin" / "kafka-run-class.sh", "Some.Class"],
        env={"PATH": "/usr/bin:/bin", "JAVA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Install Java 17" in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["kafak"], "unknown artifact kafak"),
        (["couchdb", "--write-checksums"], "for mongodb, or one version of kafka"),
        (["kafka", "mongodb", "--write-checksums"], "alone"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        artifacts.main(arguments)
    assert stopped.value.code == Exit.USAGE
    assert said in capsys.readouterr().err


def test_a_missing_tool_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(artifacts.ArtifactError, match="apt-get install maven"):
        artifacts._tool("mvn", "maven")
