import errno
import io
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from iot_pipeline import folders, sources
from iot_pipeline.download import digest
from iot_pipeline.errors import Exit
from iot_pipeline.formats import FORMATS
from iot_pipeline.schema import CLASSES
from iot_pipeline.sources import Source, SourceAway, SourceError, open_source

FILES = {
    "set/cat/2.png": b"cat two",
    "set/cat/1.jpg": b"cat one",
    "set/dog/1.JPEG": b"dog one",
    "set/cat/.hidden.png": b"no",
    "set/readme.txt": b"no",
    "set/dog/notes.md": b"no",
}
ROUND_ROBIN = ["cat/1.jpg", "dog/1.JPEG", "cat/2.png"]


def make_folder(root: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (FILES if files is None else files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def make_tar(path: Path, files: dict[str, bytes] | None = None) -> Path:
    compression = {".tar": "", ".gz": "gz", ".bz2": "bz2", ".xz": "xz"}[path.suffix]
    with tarfile.open(path, f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, data in (FILES if files is None else files).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def short_names(source: Source) -> list[str]:
    return ["/".join(image.name.split("/")[-2:]) for image in source]


@pytest.fixture(params=["folder", "set.tar", "set.tar.gz", "set.tar.bz2", "set.tar.xz"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        return make_folder(tmp_path / "folder")
    return make_tar(tmp_path / request.param)


def test_folder_and_every_archive_give_the_same_images(location: Path) -> None:
    with open_source(str(location)) as source:
        images = list(source)
        assert short_names(source) == ROUND_ROBIN
    assert [image.label for image in images] == ["cat", "dog", "cat"]
    assert [image.data for image in images] == [b"cat one", b"dog one", b"cat two"]
    assert [image.content_type for image in images] == ["image/jpeg", "image/jpeg", "image/png"]


def test_shuffle_is_repeatable_and_each_pass_has_its_own_order(tmp_path: Path) -> None:
    files = {f"{label}/{n}.png": b"x" for label in ("cat", "dog") for n in range(20)}
    folder = str(make_folder(tmp_path, files))
    one, two, other = (open_source(folder, shuffle=True, seed=seed) for seed in (1, 1, 2))
    first = short_names(one)
    second = short_names(one)
    assert [first, second] == [short_names(two), short_names(two)]
    assert first != second
    assert first != short_names(other)
    assert sorted(first) == sorted(second) == sorted(files)


def test_classes_alternate_as_long_as_they_last(tmp_path: Path) -> None:
    counts = {"ship": 3, "bird": 1, "frog": 2}
    files = {f"{label}/{n}.png": b"x" for label, count in counts.items() for n in range(count)}
    with open_source(str(make_folder(tmp_path, files))) as source:
        assert [image.label for image in source] == ["bird", "frog", "ship", "frog", "ship", "ship"]


def test_large_archive_unpacks_to_a_file_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SPOOL_MEMORY", 10)
    archive = make_tar(tmp_path / "set.tar.gz")
    cache = tmp_path / "cache"
    with open_source(str(archive), cache_dir=cache) as source:
        opened = [Path(link).resolve() for link in Path("/proc/self/fd").iterdir()]
        assert [path for path in opened if cache in path.parents]
        assert sorted(image.data for image in source) == [b"cat one", b"cat two", b"dog one"]
    assert list(cache.iterdir()) == []


def test_linked_class_folders_count_and_a_loop_ends(tmp_path: Path) -> None:
    make_folder(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "horse").symlink_to(tmp_path / "real/set/cat")
    (linked / "loop").symlink_to(linked)
    with open_source(str(linked)) as source:
        assert source.classes == ["horse"]
        assert len(source) == 2


def test_unknown_classes_are_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path, {"cat/1.png": b"x", "zebra/1.png": b"x"})
    with open_source(str(folder)) as source:
        assert [image.label for image in source] == ["cat", "zebra"]
    assert "classes outside CIFAR-10" in caplog.text
    assert "unknown=zebra" in caplog.text


@pytest.mark.parametrize("label", ["c" * 101, "c\nat", "c\udcffat"])
def test_folder_names_that_cannot_be_labels_are_refused(label: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {f"{label}/1.png": b"x"})
    with pytest.raises(SourceError, match="cannot be a class"):
        open_source(str(folder))


def test_an_image_that_vanished_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path)
    with open_source(str(folder)) as source:
        (folder / "set/dog/1.JPEG").unlink()
        assert short_names(source) == ["cat/1.jpg", "cat/2.png"]
        assert "image skipped name=set/dog/1.JPEG" in caplog.text
        for path in folder.glob("set/cat/?.*"):
            path.unlink()
        with pytest.raises(SourceError, match="not one of its 3 images can be read"):
            list(source)


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def noise_tar(path: Path) -> Path:
    return make_tar(path, {f"cat/{n}.png": os.urandom(20_000) for n in range(100)})


UNUSABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda tmp: tmp / "nothing", "there is no source"),
    "empty folder": (lambda tmp: tmp, "is empty: it needs images in class-named folders"),
    "empty tar": (lambda tmp: make_tar(tmp / "a.tar", {}), "is empty"),
    "no class folders": (
        lambda tmp: make_folder(tmp, {"1.png": b"x", "2.png": b"x"}),
        "holds 2 files, but no image in a class-named folder",
    ),
    "no images": (
        lambda tmp: make_tar(tmp / "a.tar.gz", {"cat/readme.txt": b"x"}),
        "holds 1 files, but no image",
    ),
    "not an archive": (
        lambda tmp: make_folder(tmp, {"photo.jpg": b"\xff\xd8 no archive"}) / "photo.jpg",
        "is neither a folder nor a readable tar",
    ),
    "truncated tar": (lambda tmp: truncated(noise_tar(tmp / "a.tar")), "is damaged after"),
    "truncated gz": (lambda tmp: truncated(noise_tar(tmp / "a.tar.gz")), "is damaged after"),
    "truncated bz2": (lambda tmp: truncated(noise_tar(tmp / "a.tar.bz2")), "damaged"),
    "truncated xz": (lambda tmp: truncated(noise_tar(tmp / "a.tar.xz")), "damaged"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_source_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    make, reason = UNUSABLE[case]
    with pytest.raises(SourceError, match=reason) as refusal:
        open_source(str(make(tmp_path)))
    assert refusal.value.exit_status is Exit.CONFIG


def test_unusable_cache_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SourceError, match="set IOT_CACHE_DIR"):
        open_source("sample", cache_dir=file / "below")


def test_heartbeat_ends_a_long_read(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_source(str(make_tar(tmp_path / "a.tar.xz")), heartbeat=stop)


def test_the_sample_holds_twenty_drawings_of_every_class() -> None:
    with open_source("sample") as source:
        images = list(source)
    assert source.classes == sorted(CLASSES)
    assert [image.label for image in images[:10]] == sorted(CLASSES)
    assert min(Counter(image.label for image in images).values()) >= 20
    for image in images:
        with PillowImage.open(io.BytesIO(image.data)) as picture:
            assert PillowImage.MIME[picture.format or ""] == image.content_type
            picture.load()


# What counts, and as what -------------------------------------------------------------------------

TREE = {
    "cat/1.png": b"cat",
    "dog/1.png": b"dog",
    "cat/.ipynb_checkpoints/1.png": b"no",
    ".Trash-1000/files/2.png": b"no",
    ".git/cat/3.png": b"no",
    "dog/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg": b"no",
    "#recycle/dog/4.png": b"no",
    "@Recycle/4.png": b"no",
    "$RECYCLE.BIN/S-1/4.png": b"no",
    "__MACOSX/cat/5.png": b"no",
    "cat/._1.png": b"no",
    "sheet.jpg": b"no",
}


def shown(source: Source) -> list[tuple[str, str, bytes]]:
    """Class, path without the data set's folder, and bytes of each image."""
    return [(image.label, "/".join(image.name.split("/")[-2:]), image.data) for image in source]


def packed_by_role(root: Path, target: Path) -> Path:
    folders.main([str(root), str(target)])
    return target


def packed_by_tar(root: Path, target: Path) -> Path:
    subprocess.run(["tar", "-caf", target, "-C", root.parent, root.name], check=True)
    return target


def packed_as_it_is(root: Path, target: Path) -> Path:
    subprocess.run(["tar", "-caf", target, "-C", root, "."], check=True)
    return target


PACKERS = {
    "folder": lambda root, _target: root,
    "by the role": packed_by_role,
    "by tar": packed_by_tar,
    "by tar, without its folder": packed_as_it_is,
    "by tar, compressed": lambda root, target: packed_by_tar(root, target.with_suffix(".tgz")),
}


@pytest.fixture(params=PACKERS)
def packed(request: pytest.FixtureRequest) -> Callable[[Path, Path], Path]:
    return PACKERS[request.param]


def test_what_systems_keep_beside_images_is_left_out(
    tmp_path: Path, packed: Callable[[Path, Path], Path]
) -> None:
    root = make_folder(tmp_path / "set", TREE)
    with open_source(str(packed(root, tmp_path / "a.tar"))) as source:
        assert shown(source) == [("cat", "cat/1.png", b"cat"), ("dog", "dog/1.png", b"dog")]
        assert source.classes == ["cat", "dog"]


def test_links_are_images_in_a_folder_and_in_its_archives(
    tmp_path: Path, packed: Callable[[Path, Path], Path]
) -> None:
    root = make_folder(tmp_path / "set", {"cat/a.png": b"one", "store/0001": b"two"})
    for name in ("dog", "bird", "frog"):
        (root / name).mkdir()
    (root / "dog/b.png").hardlink_to(root / "cat/a.png")
    (root / "dog/c.png").hardlink_to(root / "store/0001")
    (root / "bird/d.png").symlink_to("../dog/b.png")
    (root / "frog/e.png").symlink_to("../store/0001")
    (root / "horse").symlink_to("cat")
    (root / "frog/loop").symlink_to("..")
    (root / "frog/nowhere.png").symlink_to("../gone.png")
    with open_source(str(packed(root, tmp_path / "a.tar"))) as source:
        assert sorted(shown(source)) == [
            ("bird", "bird/d.png", b"one"),
            ("cat", "cat/a.png", b"one"),
            ("dog", "dog/b.png", b"one"),
            ("dog", "dog/c.png", b"two"),
            ("frog", "frog/e.png", b"two"),
            ("horse", "horse/a.png", b"one"),
        ]


def test_nested_classes_are_packed_as_they_are(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", {"cat/1.png": b"x", "cat/dog/2.png": b"y"})
    target = packed_by_role(root, tmp_path / "a.tar")
    with open_source(str(root)) as folder, open_source(str(target)) as archive:
        assert shown(folder) == shown(archive)
        assert archive.classes == ["cat", "dog"]


def test_images_beside_the_classes_of_an_archive_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = make_tar(tmp_path / "a.tar", {"set/cat/1.png": b"x", "set/sheet.jpg": b"y"})
    with open_source(str(archive)) as source:
        assert source.classes == ["cat"]
    assert "left_out=1 first=set/sheet.jpg" in caplog.text


def test_equal_folders_are_packed_into_equal_files(tmp_path: Path) -> None:
    files = {"cat/1.png": b"cat", "dog/ä\udcff.png": b"dog", "dog/" + "n" * 200 + ".png": b"x"}
    one, two = (make_folder(tmp_path / name, files) for name in ("one", "two"))
    os.utime(two / "cat/1.png", (0, 0))
    (two / "cat/1.png").chmod(0o600)
    packed = [packed_by_role(root, tmp_path / f"{root.name}.tar") for root in (one, two)]
    assert packed[0].read_bytes() == packed[1].read_bytes()
    with open_source(str(packed[0])) as source:
        assert len(source) == 3


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no image in a class-named folder"):
        packed_by_role(make_folder(tmp_path / "set", {"1.png": b"x"}), tmp_path / "a.tar")
    with pytest.raises(SystemExit, match=r"cannot pack .*nothing"):
        packed_by_role(tmp_path / "nothing", tmp_path / "a.tar")


def test_names_that_lead_upwards_name_no_class(tmp_path: Path) -> None:
    files = {"../3.png": b"no", "../../set/cat/1.png": b"cat", "/set/./dog/x/../2.png": b"dog"}
    with open_source(str(make_tar(tmp_path / "a.tar", files))) as source:
        assert shown(source) == [("cat", "cat/1.png", b"cat"), ("dog", "dog/2.png", b"dog")]


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {"cat/1.png": b"old"})
    with tarfile.open(archive, "a") as more:
        member = tarfile.TarInfo("cat/1.png")
        member.size = 3
        more.addfile(member, io.BytesIO(b"new"))
    with open_source(str(archive)) as source:
        assert [image.data for image in source] == [b"new"]


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"cat/1.png": b"x"})
    os.mkfifo(folder / "cat/2.png")
    (folder / "cat/3.png").mkdir()
    with open_source(str(folder)) as source:
        assert short_names(source) == ["cat/1.png"]


def test_the_type_follows_from_the_bytes(tmp_path: Path) -> None:
    picture = PillowImage.new("RGB", (2, 2))
    folder = make_folder(tmp_path, {"cat/unknown.gif": b"?"})
    for known in FORMATS:
        picture.convert("1" if "bitmap" in known.media_type else "L").save(
            folder / f"cat/{known.media_type[6:]}.png", known.name
        )
    with open_source(str(folder)) as source:
        types = {image.name: image.content_type for image in source}
    assert types.pop("cat/unknown.gif") == "image/gif"
    types.pop("cat/x-portable-pixmap.png")  # Pillow writes what is grey as a graymap
    for name, media_type in types.items():
        assert media_type == f"image/{name[4:-4]}"


def test_a_name_costs_little_memory(tmp_path: Path) -> None:
    count = 5000
    folder = make_folder(
        tmp_path,
        {f"{label}/IMG_20260131_{n:06}.jpg": b"" for label in CLASSES for n in range(count // 10)},
    )
    open_source(str(folder)).close()
    tracemalloc.start()
    try:
        source = open_source(str(folder))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert kept / count < 120


def test_a_home_that_nobody_has_is_said() -> None:
    with pytest.raises(SourceError, match="this user has no home"):
        open_source("~no-such-user/images")


# Who may read -------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys
from iot_pipeline.errors import PipelineError
from iot_pipeline.service import set_up_logging
from iot_pipeline.sources import open_source

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
set_up_logging("info")
try:
    with open_source(sys.argv[1]) as source:
        print(*source.classes, *(image.name for image in source))
except PipelineError as error:
    print(error.exit_status, type(error).__name__, error)
"""


def seen_by_nobody(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(root)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may read, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield make_folder(path / "set", {"cat/1.png": b"x", "dog/1.png": b"y"})


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@needs_root
def test_a_folder_that_may_not_be_read_is_named(public: Path) -> None:
    (public / "dog").chmod(0o700)
    done = seen_by_nobody(public)
    assert done.stdout == "cat cat/1.png\n"
    assert f"left out, since it may not be read path={public}/dog" in done.stderr
    (public / "cat").chmod(0o700)
    done = seen_by_nobody(public)
    assert done.stdout.startswith("78 SourceError ")
    assert "cat" in done.stdout
    assert "dog may not be read" in done.stdout or "cat may not be read" in done.stdout
    public.chmod(0o700)
    done = seen_by_nobody(public)
    assert done.stdout.startswith("78 SourceError ")
    assert "may not be read" in done.stdout


@needs_root
def test_images_that_may_not_be_read_are_named(public: Path) -> None:
    (public / "dog/1.png").chmod(0o600)
    done = seen_by_nobody(public)
    assert done.stdout == "cat dog cat/1.png\n"
    assert "image skipped name=dog/1.png" in done.stderr
    (public / "cat/1.png").chmod(0o600)
    done = seen_by_nobody(public)
    assert "not one of its 2 images can be read: let this service's user" in done.stdout
    assert done.stdout.startswith("78 SourceError ")


# Outages ------------------------------------------------------------------------------------------


class Outage:
    """Remembers what was said, and mends it after some attempts."""

    def __init__(self, mend: Callable[[], object], attempts: int = 3) -> None:
        self._mend = mend
        self._left = attempts
        self.said: list[str] = []

    def __call__(self, error: SourceAway) -> None:
        self.said.append(str(error))
        assert len(self.said) < 20
        self._left -= 1
        if self._left == 0:
            self._mend()


@pytest.mark.parametrize("before", ["missing", "empty", "folders alone"])
def test_a_source_that_is_not_there_yet_is_waited_for(tmp_path: Path, before: str) -> None:
    root = tmp_path / "set"
    if before != "missing":
        root.mkdir()
    if before == "folders alone":
        (root / "cat").mkdir()
    outage = Outage(lambda: make_folder(root, {"cat/1.png": b"x"}))
    with open_source(str(root), outage=outage) as source:
        assert short_names(source) == ["cat/1.png"]
    assert len(outage.said) == 3
    assert ("there is no source" if before == "missing" else "is it mounted?") in outage.said[0]


@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_folder_that_goes_away_in_the_middle_is_waited_for(tmp_path: Path, leaves: str) -> None:
    root = make_folder(tmp_path / "set", {f"cat/{n}.png": b"%d" % n for n in range(5)})
    outage = Outage(lambda: (tmp_path / "away").replace(root))
    with open_source(str(root), outage=outage) as source:
        images = iter(source)
        assert next(images).data == b"0"
        root.rename(tmp_path / "away")
        if leaves != "nothing":
            root.mkdir()
        assert [image.data for image in images] == [b"1", b"2", b"3", b"4"]
        assert len(list(source)) == 5
    assert len(outage.said) == 3
    assert str(root) in outage.said[0]


@pytest.mark.parametrize("same", [True, False])
def test_an_archive_that_goes_away_in_the_middle_is_waited_for(tmp_path: Path, same: bool) -> None:
    files = {f"cat/{n}.png": b"%d" % n for n in range(5)}
    archive = make_tar(tmp_path / "set.tar", files)
    other = make_tar(tmp_path / "other.tar", files | {"cat/more.png": b"5"})
    away = archive.with_name("away")
    outage = Outage(lambda: (away if same else other).rename(archive))
    with open_source(str(archive), outage=outage) as source:
        images = iter(source)
        assert next(images).data == b"0"
        archive.rename(away)
        # What was open before a share broke off cannot be read any more.
        tar = source._content.read.__self__  # type: ignore[attr-defined]
        tar._file.close()
        tar._file = tar._images = Broken()
        rest = [image.data for image in images]
        assert rest == ([b"1", b"2", b"3", b"4"] if same else [])
        assert len(list(source)) == (5 if same else 6)
    assert outage.said == [f"cannot read the source {archive}: No such file or directory"] * 3


class Broken(io.BytesIO):
    """An open file whose share is gone."""

    def seek(self, *_: object) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")


def test_a_mount_that_goes_away_in_the_middle_is_waited_for(tmp_path: Path) -> None:
    place, kept = tmp_path / "mounted", tmp_path / "kept"
    place.mkdir()
    make_folder(kept, {f"cat/{n}.png": b"%d" % n for n in range(5)})

    def mount() -> bool:
        done = subprocess.run(["mount", "--bind", kept, place], check=False, capture_output=True)
        return done.returncode == 0

    if not mount():
        pytest.skip("this machine lets nobody mount")
    try:
        outage = Outage(mount)
        with open_source(str(place), outage=outage) as source:
            images = iter(source)
            assert next(images).data == b"0"
            subprocess.run(["umount", place], check=True)
            assert [image.data for image in images] == [b"1", b"2", b"3", b"4"]
        assert outage.said == [f"the source {place} is empty: is it mounted?"] * 3
    finally:
        subprocess.run(["umount", place], check=False)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT])
def test_an_image_of_a_share_that_breaks_off_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    read = Path.read_bytes
    faults = 3

    def read_bytes(path: Path) -> bytes:
        if faults > 0 and path.name == "1.png":
            raise OSError(number, os.strerror(number))
        return read(path)

    def mend() -> None:
        nonlocal faults
        faults = 0

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    folder = make_folder(tmp_path, {f"cat/{n}.png": b"x" for n in range(3)})
    outage = Outage(mend)
    with open_source(str(folder), outage=outage) as source:
        assert short_names(source) == ["cat/0.png", "cat/1.png", "cat/2.png"]
        assert len(outage.said) == 3
        assert os.strerror(number) in outage.said[0]
        # An image on a bad place of a disk stops nothing.
        faults = 1
        outage = source._outage = Outage(lambda: None)
        assert short_names(source) == ["cat/0.png", "cat/2.png"]
        assert len(outage.said) == sources.ATTEMPTS - 2


def test_a_source_whose_images_were_replaced_is_looked_at_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", {"cat/1.png": b"x"})
    outage = Outage(lambda: None)
    with open_source(str(folder), outage=outage) as source:
        (folder / "cat/1.png").rename(folder / "cat/2.png")
        assert short_names(source) == []
        assert short_names(source) == ["cat/2.png"]
    assert outage.said == [f"{folder}: not one of its 1 images can be read"]


def test_waiting_can_be_given_up(tmp_path: Path) -> None:
    def stop(_error: SourceAway) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_source(str(tmp_path / "nothing"), outage=stop)


# The official archive's batches were pickled by Python 2 with numpy. Neither is here, so its
# opcodes are written out.


def py2_text(text: bytes) -> bytes:
    return b"T" + len(text).to_bytes(4, "little") + text


def py2_number(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)


def py2_list(items: Iterator[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def py2_array(rows: list[bytes], kind: bytes = b"u1", *, by_column: bool = False) -> bytes:
    empty = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + (b"cnumpy\nndarray\n" + b"(K\x00t" + py2_text(b"b") + b"\x87")
        + b"R"
    )
    dtype = b"cnumpy\ndtype\n" + (py2_text(kind) + b"K\x00K\x01\x87") + b"R"
    dtype += b"(K\x03" + py2_text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = py2_number(len(rows)) + py2_number(3072) + b"\x86"
    order, data = b"\x89", b"".join(rows)
    if by_column:
        order, data = b"\x88", bytes(byte for column in zip(*rows, strict=True) for byte in column)
    return empty + b"(K\x01" + shape + dtype + order + py2_text(data) + b"tb"


def py2_batch(data: bytes, labels: list[int], names: list[bytes]) -> bytes:
    return (
        b"\x80\x02}("
        + (py2_text(b"data") + data)
        + (py2_text(b"labels") + py2_list(map(py2_number, labels)))
        + (py2_text(b"batch_label") + py2_text(b"testing batch 1 of 1"))
        + (py2_text(b"filenames") + py2_list(map(py2_text, names)))
        + b"u."
    )


RED_SQUARE = bytes([255]) * 1024 + bytes(2048)
TOP_LEFT_BLUE = bytes(2048) + bytes([255]) + bytes(1023)


def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: bytes) -> str:
    files = {"cifar-10-batches-py/readme.html": b"x", "cifar-10-batches-py/test_batch": batch}
    archive = make_tar(tmp_path / "cifar-10-python.tar.gz", files)
    monkeypatch.setattr(sources, "CIFAR10_SHA256", digest(archive))
    monkeypatch.setattr(sources, "CIFAR10_SIZE", archive.stat().st_size)
    return str(archive)


@pytest.mark.parametrize("by_column", [False, True])
def test_cifar10_batches_become_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_column: bool
) -> None:
    rows = py2_array([RED_SQUARE, TOP_LEFT_BLUE], by_column=by_column)
    path = cifar10(tmp_path, monkeypatch, py2_batch(rows, [9, 0], [b"lorry_1.png", b"jet_2.png"]))
    with open_source(path) as source:
        jet, lorry = source
    assert (jet.label, jet.name, jet.content_type) == (
        "airplane",
        "test_batch/jet_2.png",
        "image/png",
    )
    assert lorry.label == "truck"
    with PillowImage.open(io.BytesIO(lorry.data)) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (32, 32), "RGB")
        assert picture.getcolors() == [(1024, (255, 0, 0))]
    with PillowImage.open(io.BytesIO(jet.data)) as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)
        assert picture.getpixel((1, 0)) == picture.getpixel((0, 1)) == (0, 0, 0)


def test_cifar10_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path, monkeypatch, py2_batch(py2_array([RED_SQUARE]), [3], [b"cat.png"]))
    with open_source("cifar10", cache_dir=tmp_path, url="http://127.0.0.1:9/") as source:
        assert [image.label for image in source] == ["cat"]


def test_cifar10_that_is_not_the_official_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cifar10(tmp_path, monkeypatch, b"")
    monkeypatch.setattr(sources, "CIFAR10_SHA256", "0" * 64)
    with pytest.raises(SourceError, match="is not the official CIFAR-10 archive"):
        open_source(path)


BAD_BATCHES = {
    "code": (b"\x80\x02cos\nsystem\n" + py2_text(b"echo bad") + b"\x85R.", "os.system"),
    "cut off": (py2_batch(py2_array([RED_SQUARE]), [1], [b"a.png"])[:-20], "damaged"),
    "empty": (b"", "damaged"),
    "no dict": (b"\x80\x02].", "damaged"),
    "counts": (py2_batch(py2_array([RED_SQUARE]), [1, 2], [b"a.png"]), "differ in number"),
    "floats": (py2_batch(py2_array([RED_SQUARE], b"f4"), [1], [b"a.png"]), "not of bytes"),
    "label": (py2_batch(py2_array([RED_SQUARE]), [10], [b"a.png"]), "damaged"),
    "short": (py2_batch(py2_array([RED_SQUARE[1:]]), [1], [b"a.png"]), "not the size"),
    "no labels": (b"\x80\x02}(" + py2_text(b"data") + py2_array([]) + b"u.", "damaged"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batch_is_refused_and_runs_nothing(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    batch, reason = BAD_BATCHES[case]
    path = cifar10(tmp_path, monkeypatch, batch)
    with pytest.raises(SourceError, match=reason):
        open_source(path)
    assert "bad" not in capfd.readouterr().out


def test_real_archive_of_class_folders(caplog: pytest.LogCaptureFixture) -> None:
    """The order in which a data set's archive happens to hold its files makes no difference."""
    caplog.set_level(logging.WARNING)
    names = [f"val/{label}/{n:04}.png" for n in (1, 0) for label in reversed(CLASSES)]
    index = sources.Index()
    for name in names:
        index.add(name.split("/")[1], name)
    assert [index.name(position) for position in index.in_turn()] == [
        f"val/{label}/{n:04}.png" for n in (0, 1) for label in sorted(CLASSES)
    ]
