r"""Settings files, read as systemd reads an `EnvironmentFile=`.

A unit gets its settings from systemd, and a person's command from the same file through this
module: both must read the same in it. What systemd drops without a word, or reads otherwise in one
release than in another, is refused.

Source: systemd.exec(5), and systemd's parser, which takes more than the page says. Those of 252
(Debian 12) and 257 (Debian 13) differ in one thing, a comment that ends with a backslash::

    A=C:\\temp     a backslash makes the next character one as any, so this is C:\temp; at the end
                  of a line it continues the line
    A='a b'       as it is, over several lines where the quote is closed later
    A="a \" b"    the same, but a backslash does as above before " \ $ and `, and continues a line;
                  before anything else it is a backslash
    A="a"'b' c    what follows a quoted part belongs to it, without the blanks between: abc
    A=a"b"        a quote that is not the first character is one as any
"""

from __future__ import annotations

import re
from pathlib import Path

_COMMENT = re.compile(r"[#;](?:[^\\\n\r]|\\[^\n\r]|\\\Z)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SINGLE_QUOTED = re.compile(r"'([^']*)'")
_DOUBLE_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_DOUBLE_QUOTED_ESCAPE = re.compile(r'\\(?:(["\\$`])|\n)')
_BARE = re.compile(r"(?:[^\\\n\r]|\\.|\\\Z)*", re.DOTALL)
_BARE_PART = re.compile(r"\\.?|[^\\]+", re.DOTALL)


def read_env_file(path: Path) -> dict[str, str]:
    """Read the variables that a file sets.

    Raises:
        OSError: it cannot be read.
        ValueError: see `parse_env_file`.
    """
    return parse_env_file(path.read_bytes().decode("utf-8"))


def parse_env_file(text: str) -> dict[str, str]:
    """Read variables from a settings file's content.

    Raises:
        ValueError: systemd would drop a part of it, or not every systemd reads the same in it.
    """
    if text.startswith("\ufeff"):
        raise ValueError(
            "it begins with a byte order mark, for which systemd drops the first line: save it "
            "without one"
        )
    values: dict[str, str] = {}
    at = 0
    while True:
        at = _behind(text, at, " \t\n\r")
        line = text.count("\n", 0, at) + 1
        try:
            if at == len(text):
                return values
            if text[at] in "#;":
                at = _skip_comment(text, at)
            else:
                name, at = _name(text, at)
                values[name], at = _value(text, at)
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from None


def _behind(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _skip_comment(text: str, at: int) -> int:
    comment = _COMMENT.match(text, at)
    end = comment.end() if comment else at
    if text[end : end + 1] == "\\":
        raise ValueError(
            "a comment ends with a backslash, and some releases of systemd take the next line as "
            "a part of it: leave the backslash out"
        )
    return end


def _name(text: str, at: int) -> tuple[str, int]:
    end = at
    while end < len(text) and text[end] not in "=\n\r":
        end += 1
    name = text[at:end].rstrip(" \t")
    if text[end : end + 1] != "=" or not _NAME.fullmatch(name):
        raise ValueError("it is not NAME=value, and systemd leaves such a line out")
    return name, end + 1


def _value(text: str, at: int) -> tuple[str, int]:
    parts = []
    while True:
        at = _behind(text, at, " \t")
        if text[at : at + 1] not in ("'", '"'):
            break
        quoted = (_SINGLE_QUOTED if text[at] == "'" else _DOUBLE_QUOTED).match(text, at)
        if quoted is None:
            raise ValueError("the quote is not closed")
        part = quoted[1]
        if text[at] == '"':
            part = _DOUBLE_QUOTED_ESCAPE.sub(lambda escape: escape[1] or "", part)
        parts.append(part)
        at = quoted.end()
    bare = _BARE.match(text, at)
    if bare is not None:
        parts.append(_unescaped(bare[0]))
        at = bare.end()
    value = "".join(parts)
    if any(_is_refused(ord(character)) for character in value):
        raise ValueError("the value has a character that systemd takes for damage")
    return value, at


def _unescaped(bare: str) -> str:
    parts = _BARE_PART.findall(bare)
    # Blanks at the end do not count, unless a backslash came after them.
    if parts and not parts[-1].startswith("\\"):
        parts[-1] = parts[-1].rstrip(" \t")
    return "".join(
        part.removeprefix("\\") if part not in ("\\\n", "\\\r") else "" for part in parts
    )


def _is_refused(code: int) -> bool:
    # The null character, and the 66 that Unicode has set aside as none.
    return code == 0 or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
