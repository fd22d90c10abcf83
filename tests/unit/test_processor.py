"""Other processors than this one: what they lack, and that the engines see the same on them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from iot_pipeline.engines import find_engine
from iot_pipeline.model import find_model
from iot_pipeline.pictures import open_image
from iot_pipeline.processor import instructions
from iot_pipeline.sources import open_source

QEMU = shutil.which("qemu-x86_64")
MODEL = find_model()
IMAGES = 8  # in the eighth, products of weights of 8 bits leave 16 bits most

CLASSIFY = """
import importlib, sys
from pathlib import Path
from iot_pipeline.engines import find_engine
from iot_pipeline.model import find_model

name, folder, pixels = sys.argv[1:]
model = find_model()
size = 3 * model.config.size[0] * model.config.size[1]
content = Path(pixels).read_bytes()
run = find_engine(name).load(model, "int8", Path(folder), 1)
for start in range(0, len(content), size):
    print(*run([content[start : start + size]])[0])
"""


@pytest.mark.parametrize(
    "text,found",
    [
        ("processor\t: 0\nflags\t\t: fpu avx avx2 avx512f avx512_vnni\n", 3),
        ("flags\t\t: fpu sse4_2\nvmx flags\t: avx2\n", 0),
        ("Features\t: fp asimd\n", 0),
        ("", 0),
    ],
)
def test_instructions_are_read_from_the_kernel(tmp_path: Path, text: str, found: int) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert len(instructions(tmp_path / "cpuinfo")) == found
    assert instructions(tmp_path / "nothing") == []


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of the sample, as the model takes them."""
    with open_source("sample") as source:
        images = [open_image(image.data, 2**20) for image in islice(source, IMAGES)]
    file = tmp_path_factory.mktemp("pixels") / "pixels"
    file.write_bytes(b"".join(image.resize(MODEL.config.size).tobytes() for image in images))
    return file


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """An engine, and the folder of what it made in int8."""
    name = str(request.param)
    # In this way, what other packages warn of at their import is no error.
    for package in ("timm", name):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = tmp_path_factory.mktemp(name)
    find_engine(name).build(MODEL, "int8", MODEL.config.ranges, folder)
    return name, folder


@pytest.fixture(scope="module")
def expected(pixels: Path) -> list[tuple[int, float]]:
    """What the network computes in floats, step by step, so that nothing can saturate."""
    import torch

    from iot_pipeline.network import FromPixels, load_network
    from iot_pipeline.quantisation import quantise

    assert MODEL.config.ranges
    network = quantise(load_network(MODEL), MODEL.config.ranges)
    whole = FromPixels(network, MODEL.config.mean, MODEL.config.std).eval()
    width, height = MODEL.config.size
    batch = torch.frombuffer(bytearray(pixels.read_bytes()), dtype=torch.uint8)
    with torch.inference_mode():
        confidences, classes = whole(batch.view(-1, height, width, 3)).max(dim=1)
    return list(zip(classes.tolist(), confidences.tolist(), strict=True))


@pytest.mark.timeout(600)
@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed: apt-get install qemu-user")
# One has AVX2, the other no AVX at all; neither has VNNI.
@pytest.mark.parametrize("processor", ["Haswell-noTSX", "Nehalem"])
def test_int8_sees_the_same_on_any_processor(
    compiled: tuple[str, Path], pixels: Path, expected: list[tuple[int, float]], processor: str
) -> None:
    name, folder = compiled
    assert QEMU
    done = subprocess.run(
        [QEMU, "-cpu", processor, sys.executable, "-c", CLASSIFY, name, folder, pixels],
        env={
            "PYTHONPATH": ":".join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(expected) == IMAGES
    for (seen, confidence), (truth, near) in zip(lines, expected, strict=True):
        assert int(seen) == truth
        assert float(confidence) == pytest.approx(near, abs=0.03)
