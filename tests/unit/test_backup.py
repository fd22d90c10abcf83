"""The backup's file: what is written comes back, and nothing but a whole file is taken."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from iot_pipeline import cli
from iot_pipeline.backup import BackupFile, new_backup
from iot_pipeline.errors import DamagedBackup, Exit, UsageError
from iot_pipeline.restore import Comparison
from iot_pipeline.schema import Document

DOCUMENTS: list[Document] = [
    {"_id": "one", "Data": "AAAA", "Serial": 10**20, "Confidence": 0.1},
    {"_id": "two", "Data": "é\ud800\n", "Nested": {"a": [None, True]}},
]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=5,
)
documents = st.lists(
    st.dictionaries(st.text(), json_values, max_size=4).flatmap(
        lambda fields: st.text().map(lambda name: {**fields, "_id": name})
    ),
    max_size=5,
)


def write(path: Path, content: list[Document] = DOCUMENTS) -> BackupFile:
    with new_backup(path, "img_db") as add:
        for document in content:
            add(document)
    return BackupFile(path)


def rewrite(path: Path, lines: list[Any]) -> BackupFile:
    """A file of these lines, whole as far as zstd can tell."""
    text = b"".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines
    )
    path.write_bytes(zstandard.compress(text))
    return BackupFile(path)


def lines_of(backup: BackupFile) -> list[bytes]:
    with backup.path.open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file).read()
    return text.splitlines(keepends=True)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    backup = write(tmp_path / "b")
    assert list(backup.documents()) == DOCUMENTS
    contents = backup.check()
    assert (contents.database, contents.documents) == ("img_db", len(DOCUMENTS))


@given(content=documents)
def test_any_document_comes_back(
    tmp_path_factory: pytest.TempPathFactory, content: list[Document]
) -> None:
    backup = write(tmp_path_factory.mktemp("backup") / "b", content)
    expected = [
        {name: each[name] for name in each if name not in ("_rev", "_attachments")}
        for each in content
    ]
    assert list(backup.documents()) == expected
    assert backup.check().documents == len(content)


def test_a_document_s_revision_is_the_database_s_own(tmp_path: Path) -> None:
    backup = write(tmp_path / "b", [{"_id": "one", "_rev": "3-abc", "Note": 1}])
    assert list(backup.documents()) == [{"_id": "one", "Note": 1}]


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    backup = write(tmp_path / "b")
    assert stat.S_IMODE(backup.path.stat().st_mode) == 0o600


def test_a_backup_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(tmp_path / "b", [DOCUMENTS[0], {"_id": "two", "Data": b"bytes"}])
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    with new_backup(tmp_path / "b", "img_db") as add:
        add(DOCUMENTS[0])
        assert not (tmp_path / "b").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_backup_replaces_no_other(tmp_path: Path) -> None:
    write(tmp_path / "b")
    with pytest.raises(UsageError, match="exists already"):
        write(tmp_path / "b", [])
    assert BackupFile(tmp_path / "b").check().documents == len(DOCUMENTS)


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["backup", str(tmp_path / "no" / "b"), "--env-file", "/dev/null"])
    assert status == Exit.IO
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    backup = write(tmp_path / "b")
    whole = backup.path.read_bytes()
    for length in range(len(whole)):
        backup.path.write_bytes(whole[:length])
        with pytest.raises(DamagedBackup, match="no whole backup"):
            backup.check()


def test_lines_cut_off_anywhere_are_refused(tmp_path: Path) -> None:
    text = b"".join(lines_of(write(tmp_path / "b")))
    for length in range(len(text)):
        with pytest.raises(DamagedBackup):
            rewrite(tmp_path / "c", [text[:length]]).check()
    assert rewrite(tmp_path / "c", [text]).check().documents == len(DOCUMENTS)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    backup = write(tmp_path / "b")
    whole = backup.path.read_bytes()
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        backup.path.write_bytes(flipped)
        try:
            found = list(backup.documents())
        except DamagedBackup:
            continue
        # Bits of zstd's own that mean nothing to the content.
        assert found == DOCUMENTS


def test_a_flipped_bit_of_a_line_is_found_without_zstd_s_help(tmp_path: Path) -> None:
    text = b"".join(lines_of(write(tmp_path / "b")))
    for bit in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedBackup):
            rewrite(tmp_path / "c", [bytes(flipped)]).check()


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda lines: [*lines[:1], *lines[2:]], "it ends with"),
        (lambda lines: [*lines[:1], lines[2], lines[1], *lines[3:]], "it ends with"),
        (lambda lines: [*lines[:2], *lines[1:]], "it ends with"),
        (lambda lines: lines[:-1], "cut off"),
        (lambda lines: [*lines, lines[1]], "something follows"),
        (lambda lines: [*lines, b"\n"], "something follows"),
        (lambda lines: lines[1:], "does not begin as one"),
        (lambda lines: [b"[]\n", *lines], "no object"),
        (lambda _: [b"PK\n"], "not JSON"),
        (lambda lines: [lines[0], b"[" * 100_000 + b"\n"], "not JSON"),
        (lambda lines: [lines[0], {"_id": 7}, *lines[1:]], "an _id that is no text"),
        (lambda _: [], "not JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, change: Any, words: str) -> None:
    lines = change(lines_of(write(tmp_path / "b")))
    with pytest.raises(DamagedBackup, match=words):
        rewrite(tmp_path / "c", lines).check()


def test_a_newer_format_is_left_to_a_newer_release(tmp_path: Path) -> None:
    _, *rest = lines_of(write(tmp_path / "b"))
    header = {"format": "iot-pipeline backup", "version": 2}
    with pytest.raises(DamagedBackup, match="format 2, and this release reads 1"):
        rewrite(tmp_path / "c", [header, *rest]).check()


def test_a_line_without_end_is_not_taken_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iot_pipeline.backup.MAX_LINE_BYTES", 1000)
    header, *_ = lines_of(write(tmp_path / "b"))
    with pytest.raises(DamagedBackup, match="within a line"):
        rewrite(tmp_path / "c", [header, b'"' + b"a" * 1000 + b'"\n']).check()


def test_check_needs_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backup = write(tmp_path / "b")
    command = ["restore", str(backup.path), "--check", "--json", "--env-file", "/dev/null"]
    assert cli.main(command) == Exit.OK
    assert json.loads(capsys.readouterr().out)["documents"] == len(DOCUMENTS)
    backup.path.write_bytes(backup.path.read_bytes()[:-1])
    assert cli.main(command) == Exit.DATA
    assert str(backup.path) in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["restore", str(tmp_path / "b"), "--check", "--env-file", "/dev/null"]
    assert cli.main(command) == Exit.IO
    assert str(tmp_path / "b") in capsys.readouterr().err


def test_check_and_compare_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["restore", "b", "--check", "--compare", "--env-file", "/dev/null"]
    assert cli.main(command) == Exit.USAGE
    assert "--compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stored,expected",
    [
        ({"_id": "i", "_rev": "1-a", "Note": "b"}, "identical"),
        ({"_id": "i", "_rev": None, "Note": "b", "_attachments": {}}, "identical"),
        ({"_id": "i", "_rev": "1-a", "Note": "b", "More": 1}, "newer"),
        ({"_id": "i", "_rev": "1-a", "Note": "c"}, "newer"),
        ({"_id": "i", "_rev": "1-a", "Note": "a"}, "different"),
        ({"_id": "i", "_rev": "1-a"}, "different"),
        (None, "missing"),
    ],
)
def test_a_comparison_says_what_a_restore_would_change(
    stored: Document | None, expected: str
) -> None:
    comparison = Comparison()
    comparison.add({"_id": "i", "Note": "b"}, stored)
    assert getattr(comparison, expected) == 1
    assert comparison.documents == 1
    assert comparison.is_all_there == (expected in ("identical", "newer"))
