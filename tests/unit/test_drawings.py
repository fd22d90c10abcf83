"""The drawings: reproducible, of every class, and the sample is what the script draws."""

import importlib.resources
import io
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("numpy", reason="numpy is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps" / "training"))

import drawings

from iot_pipeline.schema import CLASSES

needs_font = pytest.mark.skipif(
    not drawings.FONT.is_file(), reason=f"no font at {drawings.FONT}: fonts-noto-color-emoji"
)


@needs_font
def test_every_glyph_can_be_drawn() -> None:
    assert set(drawings.GLYPHS) == set(CLASSES)
    for label, glyphs in drawings.GLYPHS.items():
        for index in range(len(glyphs)):
            picture = drawings.draw(label, 1, index)
            assert (picture.size, picture.mode) == ((32, 32), "RGB")


@needs_font
def test_the_archive_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        assert (
            drawings.main(["--out", f"{tmp_path}/{name}.tar.xz", "--per-class=2", f"--seed={seed}"])
            == 0
        )
    a, b, c = (tmp_path.joinpath(f"{name}.tar.xz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@needs_font
def test_more_pictures_leave_the_first_ones_alone() -> None:
    few = [picture.tobytes() for _, _, picture in drawings.drawings(1, 5)]
    more = {picture.tobytes() for _, _, picture in drawings.drawings(2, 5)}
    assert set(few) <= more
    assert len(more) == 2 * len(CLASSES)


@needs_font
def test_folder(tmp_path: Path) -> None:
    drawings.main(["--out", str(tmp_path), "--per-class", "1"])
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")) == [
        f"{label}/000.png" for label in CLASSES
    ]


@needs_font
def test_arrays() -> None:
    images, labels = drawings.drawings_array(2, 3)
    assert images.shape == (20, 32, 32, 3)
    assert labels.tolist() == [number for number in range(10) for _ in range(2)]
    assert images[1].tobytes() == drawings.draw(CLASSES[0], 3, 1).tobytes()


def test_missing_font_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        drawings.main(["--out", str(tmp_path / "x"), "--font", str(tmp_path / "none.ttf")])
    assert "fonts-noto-color-emoji" in capsys.readouterr().err


def test_shipped_sample() -> None:
    content = (importlib.resources.files("iot_pipeline.data") / "sample.tar.xz").read_bytes()
    assert len(content) < 700_000
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == sorted(m.name for m in members)
        assert all((m.mtime, m.uid, m.gid) == (0, 0, 0) for m in members)
        for label in CLASSES:
            own = [m for m in members if Path(m.name).parent.name == label]
            assert len(own) == 24
            for member in own:
                file = archive.extractfile(member)
                assert file is not None
                assert Image.open(file).size == (32, 32)
