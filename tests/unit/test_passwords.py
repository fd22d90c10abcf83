"""Files of passwords."""

from pathlib import Path

import pytest

from iot_pipeline.passwords import PasswordFile


def test_takes_turns_and_begins_with_what_was_taken(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("new\r\nold\n")
    passwords = PasswordFile(str(tmp_path / "password"))
    assert [passwords.choose() for _ in range(3)] == [(0, "new"), (1, "old"), (0, "new")]
    passwords.keep(1)
    assert passwords.choose() == (1, "old")


def test_a_password_may_hold_blanks(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(" a b \r\n")
    assert PasswordFile(str(tmp_path / "password")).read() == [" a b "]


@pytest.mark.parametrize(
    "content,expected",
    [
        ("\ufeffone\r\ntwo\r\n", ["one", "two"]),
        ("\ufeff\n\none", ["one"]),
        ("a\x85b\u2028c\x0bd\x0ce\x1cf\n", ["a\x85b\u2028c\x0bd\x0ce\x1cf"]),
        ("a\rb\n\r\n", ["a\rb"]),
        ("a\ufeff\nb", ["a\ufeff", "b"]),
    ],
)
def test_only_a_line_feed_ends_a_password(
    tmp_path: Path, content: str, expected: list[str]
) -> None:
    (tmp_path / "password").write_bytes(content.encode())
    assert PasswordFile(str(tmp_path / "password")).read() == expected


def test_shows_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("secret\n")
    passwords = PasswordFile(str(tmp_path / "file"))
    passwords.choose()
    assert "secret" not in f"{passwords!r} {vars(passwords)}"


@pytest.mark.parametrize("text", [None, "", "\n", "\ufeff\n", b"\xff"])
def test_says_why_there_is_none(tmp_path: Path, text: str | bytes | None) -> None:
    file = tmp_path / "password"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((OSError, ValueError)):
        PasswordFile(str(file)).choose()
