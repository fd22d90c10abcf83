import io
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from iot_pipeline import sources
from iot_pipeline.download import digest
from iot_pipeline.errors import Exit
from iot_pipeline.schema import CLASSES
from iot_pipeline.sources import Source, SourceError, open_source

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
