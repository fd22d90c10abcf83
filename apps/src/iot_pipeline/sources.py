"""Where the producer's images come from.

Four kinds of source, told apart by one string (`IOT_SOURCE`):

* `sample`: the small labelled set that ships with the package;
* `cifar10`: the official CIFAR-10 archive, downloaded once into the cache;
* a folder, or a (compressed) tar, of class-named folders: `…/cat/0001.jpg` is a "cat";
* a local `cifar-10-python.tar.gz`.

A source is an index of encoded images plus a way to read one of them, so a large folder or archive
costs memory for its names only. What may come back by itself, such as a share that is not mounted,
is an outage: whoever opens a source may wait for it. Of CIFAR-10 the 10,000 test images are used: a
model's accuracy on the images that it was trained on says nothing.

Unless shuffled, images come round-robin by class (the first of each class in alphabetical order,
then the second of each …), so that the accuracy so far is meaningful from the first images on.
"""

from __future__ import annotations

import errno
import functools
import importlib.resources
import io
import itertools
import lzma
import os
import pickle
import posixpath
import random
import shutil
import tarfile
import zlib
from array import array
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO, Any, ClassVar, NoReturn, Self

from iot_pipeline.download import DownloadError, digest, download
from iot_pipeline.errors import ConfigError
from iot_pipeline.folders import LASTING, clean_name, is_empty, label_of, walk
from iot_pipeline.formats import MEDIA_TYPES, find_format
from iot_pipeline.schema import CLASSES, MAX_LABEL_CHARACTERS
from iot_pipeline.service import Log

log = Log("sources")

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

ATTEMPTS = 5  # more, to read an image whose source seems to be there

MISSING = LASTING | {errno.ENOENT, None}
"""Why to read an image again would be in vain; None is our own word that an archive is cut off."""

MAX_LINKS = 40  # from one to the next, as Linux has it

SPOOL_MEMORY = 64 * 2**20  # bytes of unpacked images; beyond that they go to a file


class SourceError(ConfigError):
    """The source cannot be used as it is; the message says why and what to do."""


class SourceAway(SourceError):
    """The source is not there at the moment, and may come back by itself."""


class _SourceChanged(Exception):
    """The source holds something else now: its index has to be made anew."""


@dataclass(frozen=True, slots=True)
class Image:
    """One encoded image with its ground truth."""

    data: bytes
    label: str
    content_type: str
    name: str


class Index:
    """The names and classes of many images, in the order in which they were found.

    Their bytes stand end to end: an object for each would take ten times the memory.
    """

    def __init__(self) -> None:
        self._names = bytearray()
        self._ends = array("Q", [0])
        self._labels: dict[str, int] = {}
        self._label_texts: list[str] = []
        self._label_numbers = array("I")

    def __len__(self) -> int:
        return len(self._label_numbers)

    def add(self, label: str, name: str) -> None:
        """Append an image."""
        self._names += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._names))
        if label not in self._labels:
            self._labels[label] = len(self._labels)
            self._label_texts.append(label)
        self._label_numbers.append(self._labels[label])

    def name(self, position: int) -> str:
        """The name of the image at a position."""
        return self._bytes(position).decode("utf-8", "surrogateescape")

    def label(self, position: int) -> str:
        """The class of the image at a position."""
        return self._label_texts[self._label_numbers[position]]

    def _bytes(self, position: int) -> bytes:
        return bytes(self._names[self._ends[position] : self._ends[position + 1]])

    def in_turn(self, *, unique: bool = False, without: Container[int] = ()) -> array[int]:
        """Positions, round-robin by class in alphabetical order, within a class in order of names.

        Args:
            unique: whether of those with one name only the last counts.
            without: positions to leave out.
        """
        by_label = [array("I") for _ in self._labels]
        for position, number in enumerate(self._label_numbers):
            if position not in without:
                by_label[number].append(position)
        columns = []
        for label in sorted(self._labels):
            found = sorted(by_label[self._labels[label]], key=self._bytes)
            if unique:
                groups = itertools.groupby(found, key=self._bytes)
                found = [list(group)[-1] for _, group in groups]
            columns.append(array("I", found))
        rounds = itertools.zip_longest(*columns)
        return array("I", (one for turn in rounds for one in turn if one is not None))


@dataclass(frozen=True, slots=True)
class Content:
    """What an open source holds."""

    index: Index
    order: array[int]
    """Positions in the index, as images are to come when they are not shuffled."""
    read: Callable[[int], bytes]
    """An encoded image by its position. Raises OSError."""
    check: Callable[[], None] = lambda: None
    """Called after `read` failed. Raises SourceAway when the fault is not the one image's."""


class Source:
    """A finite, repeatable series of labelled images. Each iteration is one pass over all of them.

    With `shuffle`, every pass has its own order, and the same seed gives the same passes again.
    """

    def __init__(
        self,
        description: str,
        open_: Callable[[ExitStack], Content],
        *,
        shuffle: bool,
        seed: int,
        outage: Callable[[SourceAway], None],
    ) -> None:
        self.description = description
        self._open = open_
        self._random = random.Random(seed) if shuffle else None
        self._outage = outage
        self._resources = ExitStack()
        self.classes: list[str] = []
        """The labels that occur, sorted."""
        self._content = self._load()

    def _load(self) -> Content:
        while True:
            try:
                with ExitStack() as resources:
                    content = self._open(resources)
                    classes = sorted(set(map(content.index.label, content.order)))
                    self._look_at(classes)
                    self.classes = classes
                    self._resources.close()
                    self._resources = resources.pop_all()
                    return content
            except SourceAway as error:
                self._outage(error)

    def __len__(self) -> int:
        return len(self._content.order)

    def __iter__(self) -> Iterator[Image]:
        content = self._content
        order = content.order
        if self._random:
            order = order[:]
            self._random.shuffle(order)
        try:
            faults = []
            for position in order:
                name = content.index.name(position)
                data = self._read(content, position)
                if isinstance(data, OSError):
                    log.warning("image skipped", name=name, error=data)
                    faults.append(data.errno)
                else:
                    yield Image(data, content.index.label(position), _type_of(data, name), name)
        except _SourceChanged:
            self._content = self._load()
            return
        if len(faults) < len(order):
            return
        problem = f"{self.description}: not one of its {len(self)} images can be read"
        if LASTING.issuperset(faults):
            raise SourceError(f"{problem}: let this service's user read them")
        self._outage(SourceAway(problem))
        self._content = self._load()

    def _read(self, content: Content, position: int) -> bytes | OSError:
        """An image, or why it cannot be read while its source can."""
        attempts = 0
        while True:
            try:
                return content.read(position)
            except OSError as error:
                try:
                    content.check()
                except SourceAway as away:
                    self._outage(away)
                    continue
                attempts += 1
                # A share that breaks off may show its folders a while longer; a bad disk never
                # reads this one.
                if error.errno in MISSING or attempts >= ATTEMPTS:
                    return error
                if attempts > 1:  # what has just been opened anew is tried at once
                    name = content.index.name(position)
                    self._outage(SourceAway(f"cannot read {self.description}, {name}: {error}"))

    def _look_at(self, classes: list[str]) -> None:
        for label in classes:
            if len(label) > MAX_LABEL_CHARACTERS or not label.isprintable():
                raise SourceError(
                    f"{self.description}: the folder name {label!r} cannot be a class: it must be "
                    f"printable and have at most {MAX_LABEL_CHARACTERS} characters"
                )
        unknown = [label for label in classes if label not in CLASSES]
        if unknown:
            # Their images are produced all the same: the model may be another one.
            log.warning(
                "classes outside CIFAR-10",
                source=self.description,
                classes=len(classes),
                unknown=", ".join(unknown[:10]) + (" …" if len(unknown) > 10 else ""),
            )

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


def _fail(error: SourceAway) -> NoReturn:
    raise error


def open_source(
    spec: str,
    *,
    shuffle: bool = False,
    seed: int = 0,
    cache_dir: Path | None = None,
    url: str | None = None,
    heartbeat: Callable[[], None] = lambda: None,
    outage: Callable[[SourceAway], None] = _fail,
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
        outage: called while the source is away, also later, while images are read; each time it
            returns, the same is tried again. It waits, or raises, which it does by default.

    Raises:
        SourceError: the source is missing, empty, damaged or not laid out as expected.
        DownloadError: `cifar10` cannot be downloaded at the moment.
    """
    if cache_dir is not None:
        _make_folder(cache_dir)

    def open_(resources: ExitStack) -> Content:
        try:
            return find(resources)
        except OSError as error:
            raise _unusable(spec, error) from error

    def find(resources: ExitStack) -> Content:
        if spec == "sample":
            packed = importlib.resources.files("iot_pipeline.data") / "sample.tar.xz"
            file = resources.enter_context(packed.open("rb"))
            return _open_tar(file, "the sample", resources, cache_dir, heartbeat)
        if spec == "cifar10":
            if cache_dir is None:
                raise SourceError("cifar10 needs a folder for its archive: set IOT_CACHE_DIR")
            archive = cifar10_archive(cache_dir, url or CIFAR10_URL, heartbeat)
            with archive.open("rb") as packed_batches:
                return _open_cifar10(packed_batches, str(archive))
        return _open_path(_path_of(spec), resources, cache_dir, heartbeat)

    return Source(spec, open_, shuffle=shuffle, seed=seed, outage=outage)


def _path_of(spec: str) -> Path:
    try:
        return Path(spec).expanduser()
    except RuntimeError as error:
        raise SourceError(f"the source {spec!r}: this user has no home: give a path") from error


def _type_of(data: bytes, name: str) -> str:
    """The media type that the bytes announce; of what announces none, the ending's."""
    found = find_format(data)
    return found.media_type if found else MEDIA_TYPES[posixpath.splitext(name)[1].lower()]


def _expect_images(index: Index, where: str, files: int) -> None:
    if len(index):
        return
    if files == 0:
        raise SourceAway(
            f"{where} is empty: it needs images in class-named folders; is it mounted?"
        )
    raise SourceError(
        f"{where} holds {files} files, but no image in a class-named folder "
        f"(like cat/0001.jpg; image endings are {' '.join(MEDIA_TYPES)})"
    )


def _unusable(spec: str, error: OSError) -> SourceError:
    if error.errno in LASTING:
        return SourceError(f"the source {spec} may not be read: {error.strerror}")
    if error.errno == errno.ENOENT:
        return SourceAway(
            f"there is no source {spec!r}: give `sample`, `cifar10`, or the path of a folder or "
            "tar of class-named folders"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceAway(
            f"no room to unpack the source {spec} ({error.strerror}): set IOT_CACHE_DIR"
        )
    return SourceAway(f"cannot read the source {spec}: {error.strerror or error}")


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
) -> Content:
    if path.is_dir():
        return _open_folder(path, heartbeat)
    file = resources.enter_context(path.open("rb"))
    file.read(1)  # tarfile would take an error of the disk for damage of the archive
    file.seek(0)
    if not _is_cifar10(file):
        return _open_tar(file, str(path), resources, cache_dir, heartbeat, path)
    if digest(path, heartbeat) != CIFAR10_SHA256:
        raise SourceError(
            f"{path} is not the official CIFAR-10 archive: its sha256 differs from "
            f"{CIFAR10_SHA256}; download it again, or use the source `cifar10`"
        )
    return _open_cifar10(file, str(path))


def _open_folder(root: Path, heartbeat: Callable[[], None]) -> Content:
    index = Index()
    files = 0
    refused: list[str] = []

    def unreadable(name: str, error: OSError) -> None:
        refused.append(name)
        log.warning("left out, since it may not be read", path=root / name, error=error.strerror)

    for name in walk(root, unreadable, heartbeat):
        files += not posixpath.basename(name).startswith(".")
        label = label_of(name)
        if label is not None:
            index.add(label, name)
    if refused and not len(index):
        raise SourceError(
            f"{root}: {', '.join(refused[:5])}{' …' if refused[5:] else ''} may not be read: let "
            "this service's user read them"
        )
    _expect_images(index, str(root), files)

    def check() -> None:
        try:
            away = is_empty(root)
        except OSError as error:
            raise SourceAway(f"cannot read the source {root}: {error.strerror}") from error
        if away:
            raise SourceAway(f"the source {root} is empty: is it mounted?")

    return Content(
        index,
        index.in_turn(),
        lambda position: (root / index.name(position)).read_bytes(),
        check,
    )


class _Tar:
    """The images of an archive, by offset and size.

    A plain tar is read in place. A compressed one has no random access, so its images are unpacked
    once, to memory or, when large, to an unnamed temporary file.
    """

    def __init__(self, file: IO[bytes], where: str, heartbeat: Callable[[], None]) -> None:
        self.index = Index()
        self.files = 0
        self._file = file
        self._where = where
        self._heartbeat = heartbeat
        self._images = file
        self._opened = self._state()
        self._places = array("Q")  # offset and size of each image

    def scan(self, resources: ExitStack, cache_dir: Path | None) -> None:
        """Find all images.

        Raises:
            tarfile.TarError, OSError, …: it is no archive, is damaged, or cannot be read.
        """
        links: dict[str, str] = {}
        with tarfile.open(fileobj=self._file, mode="r:*") as archive:
            if archive.fileobj is not self._file:
                self._images = resources.enter_context(_spool(cache_dir))
            for member in self._members(archive):
                name = clean_name(member.name)
                if member.islnk():
                    links[name] = clean_name(member.linkname)
                elif member.issym():
                    links[name] = clean_name(f"{posixpath.dirname(name)}/{member.linkname}")
                elif member.isfile():
                    self.files += not posixpath.basename(name).startswith(".")
                    label = label_of(name)
                    if label is not None:
                        self._keep(archive, member, label, name)
        if links:
            self._follow(links)

    def _members(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        while (member := archive.next()) is not None:
            self._heartbeat()
            if member.issparse():
                log.warning("left out, since it is sparse", source=self._where, name=member.name)
            else:
                yield member
            # Or it would keep an object for each.
            archive.members.clear()  # type: ignore[attr-defined]

    def _keep(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, label: str, name: str
    ) -> None:
        offset = member.offset_data
        if self._images is not self._file:
            offset = self._images.seek(0, io.SEEK_END)
            shutil.copyfileobj(_content(archive, member), self._images)
        self.index.add(label, name)
        self._places.extend((offset, member.size))

    def _follow(self, links: dict[str, str]) -> None:
        """Add what links stand for: archivers write one in place of a file's second name."""
        ends = {name: _end_of(name, links) for name in links}
        targets = set(ends.values())
        names = ((position, self.index.name(position)) for position in range(len(self.index)))
        known = {name: position for position, name in names if name in targets}
        missing: dict[str, list[str]] = {}
        for name, end in ends.items():
            if label_of(name) is None:
                self._add_folder(name, end)
            elif end in known:
                self._add_again(name, known[end])
            else:
                missing.setdefault(end, []).append(name)
        if missing:
            self._find(missing)

    def _find(self, missing: dict[str, list[str]]) -> None:
        """Add links to files that are no images by their own names."""
        self._file.seek(0)
        with tarfile.open(fileobj=self._file, mode="r:*") as archive:
            for member in self._members(archive):
                names = missing.pop(clean_name(member.name), []) if member.isfile() else []
                for name in names:
                    self._keep(archive, member, label_of(name) or "", name)
        for name in itertools.chain(*missing.values()):
            log.warning("left out, since its link leads nowhere", source=self._where, name=name)

    def _add_again(self, name: str, position: int) -> None:
        label = label_of(name)
        if label is not None:
            self.index.add(label, name)
            self._places.extend(self._places[2 * position : 2 * position + 2])

    def _add_folder(self, link: str, target: str) -> None:
        """Add the images below a folder once more, below a link to it."""
        inside = f"{target}/"
        if f"{link}/".startswith(inside) or target == "":
            return  # it leads to a folder that it lies in
        for position in range(len(self.index)):
            name = self.index.name(position)
            if name.startswith(inside):
                self._add_again(f"{link}/{name.removeprefix(inside)}", position)

    def check(self, path: Path) -> None:
        """Open the archive anew after a fault: what was open before a share went away stays broken.

        Raises:
            SourceAway: it is not there.
            _SourceChanged: it is another one.
        """
        if self._images is not self._file:
            return
        try:
            before, self._file = self._file, path.open("rb")
        except OSError as error:
            raise SourceAway(f"cannot read the source {path}: {error.strerror}") from error
        self._images = self._file
        before.close()
        if self._state() != self._opened:
            raise _SourceChanged

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Close the archive."""
        self._file.close()

    def read(self, position: int) -> bytes:
        """An image.

        Raises:
            OSError: it cannot be read, or the archive ends in the middle of it.
        """
        offset, size = self._places[2 * position : 2 * position + 2]
        self._images.seek(offset)
        data = self._images.read(size)
        if len(data) < size:
            raise OSError(f"{self._where} ends in the middle of it")
        return data


def _end_of(name: str, links: dict[str, str]) -> str:
    """Where links lead to, as far as they lead on."""
    for _ in range(MAX_LINKS):
        if name not in links:
            break
        name = links[name]
    return name


def _open_tar(
    file: IO[bytes],
    where: str,
    resources: ExitStack,
    cache_dir: Path | None,
    heartbeat: Callable[[], None],
    path: Path | None = None,
) -> Content:
    tar = _Tar(file, where, heartbeat)
    resources.callback(tar.close)
    try:
        tar.scan(resources, cache_dir)
    except (tarfile.ReadError, *DAMAGE) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it is the disk's fault
        if tar.files:
            raise SourceError(f"{where} is damaged after {tar.files} files: {error}") from error
        raise SourceError(
            f"{where} is neither a folder nor a readable tar archive (plain, gz, bz2 or xz)"
        ) from error
    _expect_images(tar.index, where, tar.files)
    order = tar.index.in_turn(unique=True, without=_beside_classes(tar.index, where))
    check = (lambda: None) if path is None else functools.partial(tar.check, path)
    return Content(tar.index, order, tar.read, check)


def _beside_classes(index: Index, where: str) -> frozenset[int]:
    """Images that lie at the top of a data set, where its name would be their class.

    An archive of a data set mostly has its folder at the top, and the classes in there.
    """
    top = index.name(0).partition("/")[0]
    beside = set()
    for position in range(len(index)):
        folder, _, rest = index.name(position).partition("/")
        if folder != top:
            return frozenset()
        if "/" not in rest:
            beside.add(position)
    if not beside or len(beside) == len(index):
        return frozenset()
    first = index.name(min(beside))
    log.warning("images beside the classes", source=where, left_out=len(beside), first=first)
    return frozenset(beside)


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


def _open_cifar10(file: IO[bytes], where: str) -> Content:
    wanted = f"{CIFAR10_FOLDER}/{CIFAR10_SPLIT}"
    size = 3 * CIFAR10_EDGE * CIFAR10_EDGE
    try:
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            batch = _content(archive, archive.getmember(wanted))
            content = _ArrayUnpickler(batch, encoding="bytes").load()
        images, labels, names = content[b"data"], content[b"labels"], content[b"filenames"]
        if not images.shape == (len(labels), size) == (len(names), size):
            raise ValueError("its images, labels and names differ in number")
        index = Index()
        for label, name in zip(labels, names, strict=True):
            index.add(CLASSES[label], f"{CIFAR10_SPLIT}/{name.decode()}")
    except (pickle.UnpicklingError, tarfile.ReadError, *DAMAGE, *NO_BATCH) as error:
        raise SourceError(f"{where}: {wanted} is missing or damaged: {error}") from error

    # 10,000 images of 2 kB or so, each made when it is first asked for.
    @functools.cache
    def read(position: int) -> bytes:
        return png_from_planes(images.row(position), CIFAR10_EDGE)

    return Content(index, index.in_turn(), read)


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
