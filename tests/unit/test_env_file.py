"""Settings files say to our commands what they say to systemd."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iot_pipeline.env_file import parse_env_file, read_env_file

Reader = Callable[[bytes], dict[str, str] | None]

READ = {
    "A=b": {"A": "b"},
    "A=b c": {"A": "b c"},
    "  A = b  ": {"A": "b"},
    'A="b c"': {"A": "b c"},
    "A='b \"c'": {"A": 'b "c'},
    r'A="b \"c\" \\ \$d \`e\` \n"': {"A": r'b "c" \ $d `e` \n'},
    "A=": {"A": ""},
    'A=""': {"A": ""},
    "# no\n; no\n\nA=b#c": {"A": "b#c"},
    'A="a"b': {"A": "ab"},
    "A=\"a\"'b' c ": {"A": "abc"},
    'A=a"b"': {"A": 'a"b"'},
    "A=a 'b'": {"A": "a 'b'"},
    "A=C:\\temp": {"A": "C:temp"},
    "A=C:\\\\temp": {"A": "C:\\temp"},
    "A=a\\\nb\nB=c": {"A": "ab", "B": "c"},
    "A=\\\n  b": {"A": "  b"},
    "A=b \\\n\nB=c": {"A": "b ", "B": "c"},
    "A=b\\ ": {"A": "b "},
    "A=b  \\": {"A": "b  "},
    'A="a\nb"\nB=c': {"A": "a\nb", "B": "c"},
    'A="a\\\nb"': {"A": "ab"},
    "A='a\\\nb'": {"A": "a\\\nb"},
    "A=b\r\nB=c\r\n": {"A": "b", "B": "c"},
    "A=b\rB=c": {"A": "b", "B": "c"},
    "A=b\u2028c\u0085d\x0be": {"A": "b\u2028c\u0085d\x0be"},
    "A=b\nB=c\nA=d": {"A": "d", "B": "c"},
    "# a\\\\\nA=b": {"A": "b"},
    "# a\\b\nA=b": {"A": "b"},
    "A=b\n# the last\\": {"A": "b"},
    "": {},
}

REFUSED = {
    "A": "line 1: it is not NAME=value",
    "\n\nA B=c": "line 3: it is not NAME=value",
    "export A=1": "line 1: it is not NAME=value, and systemd leaves such a line out",
    "Ä=1": "not NAME=value",
    "=b": "not NAME=value",
    "A=1\n2B=c": "line 2: it is not",
    'A="b\nB=c': "line 1: the quote is not closed",
    "A='b": "the quote is not closed",
    "\ufeffA=1": "byte order mark",
    "# a\\\nA=1": "line 1: a comment ends with a backslash",
    "A=b\0c": "takes for damage",
    "A=b\uffff": "takes for damage",
    "A=\ufdd0": "takes for damage",
}


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """This machine's systemd, reading a file as it does for a unit; None: it refuses the file."""
    libraries = sorted(Path("/usr/lib").glob("*/systemd/libsystemd-shared-*.so"))
    if not libraries:
        pytest.skip("this machine has no systemd")
    library: Any = ctypes.CDLL(str(libraries[-1]))
    assignments = ctypes.POINTER(ctypes.c_char_p)
    load, clean = library.load_env_file, library.strv_env_clean_with_callback
    load.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(assignments)]
    clean.argtypes, clean.restype = [assignments, ctypes.c_void_p, ctypes.c_void_p], assignments
    library.strv_free.argtypes, library.strv_free.restype = [assignments], assignments
    file = tmp_path_factory.mktemp("systemd") / "file"

    def read(content: bytes) -> dict[str, str] | None:
        file.write_bytes(content)
        found: Any = assignments()
        if load(None, bytes(file), ctypes.byref(found)) < 0:
            return None
        if not found:
            return {}
        try:
            clean(found, None, None)
            lines: Any = itertools.takewhile(lambda line: line is not None, found)
            return dict(line.decode().split("=", 1) for line in lines)
        finally:
            library.strv_free(found)

    return read


@pytest.mark.parametrize("text", READ)
def test_a_file_is_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(text.encode())
    assert read_env_file(file) == READ[text]


@pytest.mark.parametrize("text", READ)
def test_systemd_reads_the_same(systemd: Reader, text: str) -> None:
    assert systemd(text.encode()) == READ[text]


@pytest.mark.parametrize("text", REFUSED)
def test_what_systemd_drops_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[text]):
        parse_env_file(text)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"A=\xff\n")
    with pytest.raises(ValueError, match="utf-8"):
        read_env_file(tmp_path / "file")


# What means something to the parser, what looks as if it did, and what ends lines elsewhere.
PIECES = ["A=", "B=", "A", "b", " ", "\t", "\n", "\r", "\\", '"', "'", "#", ";", "=", "$", "`", "é"]
PIECES += ["x y", "\\\n", "\u2028", "\x85", "\x0b", "\ufeff", "export ", "\ufffe"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map(lambda pieces: "A=" + "".join(pieces)))
def test_whatever_is_read_is_what_systemd_reads(systemd: Reader, text: str) -> None:
    try:
        found = parse_env_file(text)
    except ValueError:
        return
    assert systemd(text.encode()) == found
