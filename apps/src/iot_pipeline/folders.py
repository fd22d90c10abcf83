"""Folders of labelled images: which files in them count, and as what.

One rule for a folder and for an archive of it: an image's class is the name of the folder that it
lies in. Left out are hidden files and folders, those that file servers and desktops keep beside the
images, and files that lie in no folder.

    python -m iot_pipeline.folders FOLDER ARCHIVE

packs a folder's images into a plain tar that gives the same images and classes, byte for byte equal
for equal images. It needs nothing but Python.
"""

from __future__ import annotations

import errno
import os
import posixpath
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from iot_pipeline.formats import MEDIA_TYPES

KEPT_BY_SYSTEMS = frozenset(
    (
        "@eadir",  # Synology: thumbnails
        "#recycle",
        "#snapshot",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "$recycle.bin",  # Windows
        "system volume information",
        "__macosx",  # macOS, in archives
        "lost+found",
    )
)
"""Folders, in lower case, that are no classes though their names do not begin with a dot."""

TOP = "images"
"""The folder that packed images lie in: an archive whose classes lie in one folder is no riddle."""

LASTING = frozenset(
    (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EINVAL)
)
"""What someone has to mend before it can be read. Any other error is an outage, which passes."""

_ENTRIES_BETWEEN_HEARTBEATS = 1000


def clean_name(name: str) -> str:
    """A relative path without `.` and `..`, which cannot lead out of the root."""
    parts = posixpath.normpath(name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def label_of(name: str) -> str | None:
    """The class of the file at this clean relative path, or None if it is no labelled image."""
    *folders, file = name.split("/")
    if not folders or any(map(is_left_out, folders)) or file.startswith("."):
        return None
    return folders[-1] if posixpath.splitext(file)[1].lower() in MEDIA_TYPES else None


def is_left_out(folder: str) -> bool:
    """Whether a folder of this name holds no images of ours."""
    return folder.startswith(".") or folder.lower() in KEPT_BY_SYSTEMS


def walk(
    root: Path,
    unreadable: Callable[[str, OSError], None],
    heartbeat: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """The files below a folder, in no order, but for what is left out.

    Links are followed, but not into a folder that they lie in.

    Args:
        root: the folder.
        unreadable: told the relative path of what may not be read; it may raise.
        heartbeat: called often while there is something to read; what it raises ends the walk.

    Yields:
        Paths relative to `root`.

    Raises:
        OSError: `root` may not be read, or anything in it cannot be at the moment.
    """
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        if folder:
            heartbeat()
        try:
            status = (root / folder).stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue
            for name, kind in _entries(root, folder, unreadable, heartbeat):
                if kind == "file":
                    yield name
                else:
                    pending.append((name, above | {here}))
        except OSError as error:
            if folder and error.errno in LASTING:
                unreadable(folder, error)
            elif not folder or error.errno != errno.ENOENT or is_empty(root):
                raise
            # Someone has removed this folder meanwhile.


def _entries(
    root: Path,
    folder: str,
    unreadable: Callable[[str, OSError], None],
    heartbeat: Callable[[], None],
) -> Iterator[tuple[str, str]]:
    """Paths of what counts in one folder, each a "file" or a "folder"."""
    with os.scandir(root / folder) as entries:
        for number, entry in enumerate(entries, 1):
            if number % _ENTRIES_BETWEEN_HEARTBEATS == 0:
                heartbeat()
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_file():
                    yield path, "file"
                elif not is_left_out(entry.name) and entry.is_dir():
                    yield path, "folder"
            except OSError as error:  # a link into what may not be read, or to itself
                if error.errno not in LASTING:
                    raise
                unreadable(path, error)


def is_empty(root: Path) -> bool:
    """Whether a folder holds nothing at all: what a place to mount at looks like.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    with os.scandir(root) as entries:
        return next(entries, None) is None


def pack(root: Path, target: Path) -> int:
    """Pack a folder's labelled images into a plain tar.

    Returns:
        How many there are.

    Raises:
        OSError: something cannot be read or written.
    """

    def refuse(_path: str, error: OSError) -> None:
        raise error

    names = sorted(name for name in walk(root, refuse) if label_of(name))
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            with (root / name).open("rb") as file:
                # Owners, modes and times are left out: they are no part of the images.
                member = tarfile.TarInfo(f"{TOP}/{name}")
                member.size = os.fstat(file.fileno()).st_size
                archive.addfile(member, file)
    return len(names)


def main(arguments: list[str]) -> None:
    """Pack a folder, or say why not."""
    root, target = arguments
    try:
        if not pack(Path(root), Path(target)):
            sys.exit(
                f"{root} holds no image in a class-named folder (like cat/0001.jpg; image endings "
                f"are {' '.join(MEDIA_TYPES)})"
            )
    except OSError as error:
        sys.exit(f"cannot pack {root}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
