"""Where the producer's images come from.

Four kinds of source, told apart by one string (`IOT_SOURCE`):

* `sample`: the small labelled set that ships with the package;
* `cifar10`: the official CIFAR-10 archive, downloaded once into the cache;
* a folder, or a (compressed) tar, of class-named folders: `…/cat/0001.jpg` is a "cat";
* a local `cifar-10-python.tar.gz`.

A source is an index of encoded images plus a way to read one of them, so a large folder or archive
costs memory for its names only. Of CIFAR-10 the 10,000 test images are used: a model's accuracy on
the images that it was trained on says nothing.

Unless shuffled, images come round-robin by class (the first of each class in alphabetical order,
then the second of each …), so that the accuracy so far is meaningful from the first images on.
"""

from __future__ import annotations

import functools
import importlib.resources
import io
import itertools
import lzma
import os
import pickle
import random
import shutil
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO, Any, ClassVar, Self

from iot_pipeline.download import DownloadError, digest, download
from iot_pipeline.errors import ConfigError
from iot_pipeline.schema import CLASSES, MAX_LABEL_CHARACTERS
from iot_pipeline.service import Log

log = Log("sources")

CONTENT_TYPES = {
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".ppm": "image/x-portable-pixmap",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".webp": "image/webp",
}
"""File name endings that count as images; every other file is skipped."""

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SIZE = 170_498_071  # bytes
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_SPLIT = "test_batch"
CIFAR10_EDGE = 32  # pixels; an image is three planes (red, green, blue) of EDGE x EDGE bytes

DAMAGE = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
"""What reading a damaged or cut-off archive raises, beside tarfile's own errors."""

NO_BATCH = (AttributeError, LookupError, TypeError)
"""What reading a pickle raises that holds something else than a CIFAR-10 batch."""

SPOOL_MEMORY = 64 * 2**20  # bytes of unpacked images; beyond that they go to a file


class SourceError(ConfigError):
    """The source cannot be used as it is; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Image:
    """One encoded image with its ground truth."""

    data: bytes
    label: str
    content_type: str
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source's index; `key` is what the source reads it by."""

    label: str
    name: str
    key: Any


class Source:
    """A finite, repeatable series of labelled images. Each iteration is one pass over all of them.

    With `shuffle`, every pass has its own order, and the same seed gives the same passes again.
    """

    def __init__(
        self,
        description: str,
        entries: Iterable[Entry],
        read: Callable[[Entry], bytes],
        *,
        shuffle: bool,
        seed: int,
        resources: ExitStack,
    ) -> None:
        self.description = description
        self._entries = interleave(entries)
        self._read = read
        self._random = random.Random(seed) if shuffle else None
        self._resources = resources

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Image]:
        entries = self._entries
        if self._random:
            entries = self._random.sample(entries, len(entries))
        some = False
        for entry in entries:
            try:
                data = self._read(entry)
            except OSError as error:
                log.warning("image skipped", name=entry.name, error=error)
                continue
            some = True
            yield Image(data, entry.label, _content_type(entry.name), entry.name)
        if not some:
            raise SourceError(f"{self.description}: not one of its {len(self)} images can be read")

    @property
    def classes(self) -> list[str]:
        """The labels that occur, sorted."""
        return sorted({entry.label for entry in self._entries})

    def close(self) -> None:
        """Close the files behind the source."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_source(
    spec: str,
    *,
    shuffle: bool = False,
    seed: int = 0,
    cache_dir: Path | None = None,
    url: str | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> Source:
    """Open the images that `spec` names.

    Args:
        spec: `sample`, `cifar10`, or the path of a folder or tar archive.
        shuffle: whether each pass comes in a random order.
        seed: makes the random orders repeatable.
        cache_dir: where `cifar10` is kept between runs (needed for it alone), and the place for
            what a large compressed archive unpacks to meanwhile.
        url: a mirror of the official CIFAR-10 archive.
        heartbeat: called often while a download or a long read goes on; what it raises (no
            OSError, which counts as a fault of the source) ends it.

    Raises:
        SourceError: the source is missing, empty, damaged or not laid out as expected.
        DownloadError: `cifar10` cannot be downloaded at the moment.
    """
    if cache_dir is not None:
        _make_folder(cache_dir)
    with ExitStack() as resources:
        if spec == "sample":
            packed = importlib.resources.files("iot_pipeline.data") / "sample.tar.xz"
            file = resources.enter_context(packed.open("rb"))
            entries, read = _open_tar(file, "the sample", resources, cache_dir, heartbeat)
        elif spec == "cifar10":
            if cache_dir is None:
                raise SourceError("cifar10 needs a folder for its archive: set IOT_CACHE_DIR")
            archive = cifar10_archive(cache_dir, url or CIFAR10_URL, heartbeat)
            with archive.open("rb") as packed_batches:
                entries, read = _open_cifar10(packed_batches, str(archive))
        else:
            path = Path(spec).expanduser()
            entries, read = _open_path(path, resources, cache_dir, heartbeat)
        source = Source(
            spec, entries, read, shuffle=shuffle, seed=seed, resources=resources.pop_all()
        )
    try:
        _look_at_classes(source)
    except SourceError:
        source.close()
        raise
    return source


def _look_at_classes(source: Source) -> None:
    for label in source.classes:
        if len(label) > MAX_LABEL_CHARACTERS or not label.isprintable():
            raise SourceError(
                f"{source.description}: the folder name {label!r} cannot be a class: it must be "
                f"printable and have at most {MAX_LABEL_CHARACTERS} characters"
            )
    unknown = [label for label in source.classes if label not in CLASSES]
    if unknown:
        # Their images are produced all the same: the model may be another one.
        log.warning(
            "classes outside CIFAR-10",
            source=source.description,
            classes=len(source.classes),
            unknown=", ".join(unknown[:10]) + (" …" if len(unknown) > 10 else ""),
        )


def interleave(entries: Iterable[Entry]) -> list[Entry]:
    """Round-robin over the classes in alphabetical order, within a class in order of names."""
    by_class: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: (entry.label, entry.name)):
        by_class[entry.label].append(entry)
    rounds = itertools.zip_longest(*by_class.values())
    return [entry for one_round in rounds for entry in one_round if entry is not None]


def _content_type(name: str) -> str:
    return CONTENT_TYPES["." + name.rpartition(".")[2].lower()]


def _label(name: str) -> str | None:
    """The class of the file at this relative path, or None if it is no labelled image."""
    path = PurePosixPath(name)
    if path.name.startswith(".") or path.suffix.lower() not in CONTENT_TYPES:
        return None
    return path.parent.name or None


def _expect_images(entries: list[Entry], where: str, files: int) -> None:
    if entries:
        return
    if files == 0:
        raise SourceError(f"{where} is empty: it needs images in class-named folders")
    raise SourceError(
        f"{where} holds {files} files, but no image in a class-named folder "
        f"(like cat/0001.jpg; image endings are {' '.join(CONTENT_TYPES)})"
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            f"cannot make the cache folder {path} ({error.strerror}): set IOT_CACHE_DIR"
        ) from error


def _open_path(
    path: Path,
    resources: ExitStack,
    cache_dir: Path | None,
    heartbeat: Callable[[], None],
) -> tuple[list[Entry], Callable[[Entry], bytes]]:
    try:
        if path.is_dir():
            return _open_folder(path, heartbeat)
        file = resources.enter_context(path.open("rb"))
    except FileNotFoundError:
        raise SourceError(
            f"there is no source {str(path)!r}: give `sample`, `cifar10`, or the path of a folder "
            "or tar of class-named folders"
        ) from None
    except OSError as error:
        raise SourceError(f"cannot read the source {path}: {error.strerror}") from error
    if _is_cifar10(file):
        if digest(path, heartbeat) != CIFAR10_SHA256:
            raise SourceError(
                f"{path} is not the official CIFAR-10 archive: its sha256 differs from "
                f"{CIFAR10_SHA256}; download it again, or use the source `cifar10`"
            )
        return _open_cifar10(file, str(path))
    return _open_tar(file, str(path), resources, cache_dir, heartbeat)


def _open_folder(
    root: Path, heartbeat: Callable[[], None]
) -> tuple[list[Entry], Callable[[Entry], bytes]]:
    entries: list[Entry] = []
    files = 0
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        heartbeat()
        # A link to a folder above would be walked for ever.
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        files += len(names)
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            label = _label(relative)
            if label is not None:
                entries.append(Entry(label, relative, path))
    _expect_images(entries, str(root), files)
    return entries, lambda entry: Path(entry.key).read_bytes()


def _open_tar(
    file: IO[bytes],
    where: str,
    resources: ExitStack,
    cache_dir: Path | None,
    heartbeat: Callable[[], None],
) -> tuple[list[Entry], Callable[[Entry], bytes]]:
    """Index an archive's images by offset and size.

    A plain tar is read in place. A compressed one has no random access, so its images are unpacked
    once, to memory or, when large, to an unnamed temporary file.
    """
    entries: list[Entry] = []
    files = 0
    try:
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            in_place = archive.fileobj is file
            images = file if in_place else resources.enter_context(_spool(cache_dir))
            for member in archive:
                heartbeat()
                if not member.isfile() or member.issparse():
                    continue
                files += 1
                label = _label(member.name)
                if label is None:
                    continue
                offset = member.offset_data
                if not in_place:
                    offset = images.tell()
                    shutil.copyfileobj(_content(archive, member), images)
                entries.append(Entry(label, member.name, (offset, member.size)))
    except (tarfile.ReadError, *DAMAGE) as error:
        if files:
            raise SourceError(f"{where} is damaged after {files} files: {error}") from error
        raise SourceError(
            f"{where} is neither a folder nor a readable tar archive (plain, gz, bz2 or xz)"
        ) from error
    _expect_images(entries, where, files)

    def read(entry: Entry) -> bytes:
        offset, size = entry.key
        images.seek(offset)
        data = images.read(size)
        if len(data) < size:
            raise OSError(f"{where} ends in the middle of it")
        return data

    return entries, read


def _spool(folder: Path | None) -> IO[bytes]:
    return SpooledTemporaryFile(SPOOL_MEMORY, dir=None if folder is None else str(folder))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    if content is None:
        raise tarfile.ReadError(f"{member.name} is not a file")
    return content


# CIFAR-10's own archive ---------------------------------------------------------------------------


def cifar10_archive(cache_dir: Path, url: str, heartbeat: Callable[[], None]) -> Path:
    """The verified official archive in `cache_dir`, downloaded from `url` if it is not there yet.

    Raises:
        DownloadError: it cannot be had from there; what was loaded stays for the next attempt.
    """
    target = cache_dir / "cifar-10-python.tar.gz"
    try:
        if not (target.is_file() and digest(target, heartbeat) == CIFAR10_SHA256):
            download(url, target, CIFAR10_SIZE, CIFAR10_SHA256, heartbeat)
    except DownloadError as error:
        raise DownloadError(f"{error}; IOT_SOURCE_URL can name a mirror") from error
    return target


def _is_cifar10(file: IO[bytes]) -> bool:
    """Whether the archive's first member lies in CIFAR-10's folder."""
    try:
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            first = archive.next()
            return first is not None and first.name.split("/")[0] == CIFAR10_FOLDER
    except (tarfile.ReadError, *DAMAGE):
        return False  # said in full where it is opened as an archive of images
    finally:
        file.seek(0)


def _open_cifar10(file: IO[bytes], where: str) -> tuple[list[Entry], Callable[[Entry], bytes]]:
    wanted = f"{CIFAR10_FOLDER}/{CIFAR10_SPLIT}"
    size = 3 * CIFAR10_EDGE * CIFAR10_EDGE
    try:
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            batch = _content(archive, archive.getmember(wanted))
            content = _ArrayUnpickler(batch, encoding="bytes").load()
        images, labels, names = content[b"data"], content[b"labels"], content[b"filenames"]
        if not images.shape == (len(labels), size) == (len(names), size):
            raise ValueError("its images, labels and names differ in number")
        entries = [
            Entry(CLASSES[label], f"{CIFAR10_SPLIT}/{name.decode()}", index)
            for index, (label, name) in enumerate(zip(labels, names, strict=True))
        ]
    except (pickle.UnpicklingError, tarfile.ReadError, *DAMAGE, *NO_BATCH) as error:
        raise SourceError(f"{where}: {wanted} is missing or damaged: {error}") from error

    # 10,000 images of 2 kB or so, each made when it is first asked for.
    @functools.cache
    def read(entry: Entry) -> bytes:
        return png_from_planes(images.row(entry.key), CIFAR10_EDGE)

    return entries, read


def png_from_planes(planes: bytes, edge: int) -> bytes:
    """A PNG of `edge` x `edge` pixels from its red, green and blue planes, one byte a pixel."""
    from PIL import Image as PillowImage

    plane = edge * edge
    bands = [
        PillowImage.frombytes("L", (edge, edge), planes[start : start + plane])
        for start in range(0, 3 * plane, plane)
    ]
    encoded = io.BytesIO()
    PillowImage.merge("RGB", bands).save(encoded, format="PNG")
    return encoded.getvalue()


class _Array:
    """What a pickled numpy array of bytes becomes: its raw buffer, without numpy."""

    shape: tuple[int, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self.shape, kind, self._by_column, self._buffer = state
        if not isinstance(kind, _ArrayType) or kind.code != b"u1":
            raise pickle.UnpicklingError("its array is not of bytes")
        if len(self.shape) != 2 or self.shape[0] * self.shape[1] != len(self._buffer):
            raise pickle.UnpicklingError("its array has not the size that it says")

    def row(self, index: int) -> bytes:
        """The bytes of one row."""
        rows, columns = self.shape
        if self._by_column:
            return bytes(self._buffer[index::rows])
        return bytes(self._buffer[index * columns : (index + 1) * columns])


class _ArrayType:
    """What a pickled numpy dtype becomes: its code, like b"u1"."""

    def __init__(self, code: bytes, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Nothing of the state (byte order, fields) matters for bytes."""


def _reconstruct(*_: object) -> _Array:
    return _Array()


class _ArrayUnpickler(pickle.Unpickler):
    """Loads plain values and numpy byte arrays, and runs no code that the file names."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): _ArrayType,
        ("numpy", "ndarray"): _Array,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            message = f"it names {module}.{name}, which is not allowed"
            raise pickle.UnpicklingError(message) from None
