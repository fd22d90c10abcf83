"""Every engine against torch in single precision, on photographs that none was calibrated on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("IOT_TEST_DATA") or ROOT.parent / "shared" / "data")
IMAGES = DATA / "cifar10" / "val.tar.xz"
PYTHON = ROOT / ".lab" / "venv" / "apps" / "bin" / "python"


@pytest.mark.timeout(600)
def test_every_engine_is_as_accurate_as_torch() -> None:
    if not IMAGES.is_file():
        pytest.skip(f"no CIFAR-10 images at {IMAGES}; set IOT_TEST_DATA to the folder of cifar10/")
    done = subprocess.run(
        # A fifth of the images, spread over all classes, keeps it short.
        [
            *(PYTHON, "parity.py", "--images", IMAGES, "--limit", "1000"),
            *("--rounds", "1", "--seconds", "0.05"),
        ],
        cwd=ROOT / "apps" / "training",
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads(done.stdout)
    measured = {(row["engine"], row["precision"]) for row in rows}
    assert {("torch", "fp32"), ("openvino", "int8"), ("onnxruntime", "int8")} <= measured
    assert all(row["parity"] for row in rows)
