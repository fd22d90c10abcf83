"""The hosts that classify images."""

import json
from typing import Any

from testinfra.host import Host

GROUP = "inference_nodes"
PYTHON = "/opt/iot-pipeline/current/bin/python"

# Part of the path of a library that an engine's process has loaded.
LIBRARIES = {
    "torch": "libtorch_cpu",
    "torch-compile": "libtorch_cpu",
    "onnxruntime": "/onnxruntime/",
    "openvino": "/openvino/",
}


def test_python(host: Host) -> None:
    version = host.check_output(f"{PYTHON} -c 'import sys; print(*sys.version_info[:2])'")
    assert version.split() >= ["3", "11"]


def test_torch_and_timm_work(host: Host) -> None:
    # A convolution, since that is what fails when the libraries do not fit each other. On a busy
    # host a second thread would make it take minutes.
    shape = host.check_output(
        f"OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 {PYTHON} -c 'import timm, torch;"
        " print(*torch.nn.Conv2d(3, 4, 3)(torch.zeros(1, 3, 32, 32)).shape)'"
    )
    assert shape == "1 4 30 30"


def test_service_does_not_spin(host: Host) -> None:
    environment = host.check_output("systemctl show --property=Environment --value iot-inference")
    assert "OMP_WAIT_POLICY=PASSIVE" in environment


def test_service_has_loaded_its_engine_and_no_other(host: Host, variables: dict[str, Any]) -> None:
    wanted = LIBRARIES[variables["inference_engine"]]
    process = host.check_output("systemctl show --property=MainPID --value iot-inference")
    loaded = host.check_output("cat /proc/%s/maps", process)
    assert {path for path in LIBRARIES.values() if path in loaded} == {wanted}


def test_model_was_compared_with_torch(host: Host, variables: dict[str, Any]) -> None:
    engine = variables["inference_engine"]
    files = host.check_output("find /var/lib/iot-pipeline/models -name prepared.json").split()
    records = [json.loads(host.file(file).content_string) for file in files]
    ours = [record for record in records if record["engine"] == engine]
    assert ours or engine == "torch"
    for record in ours:
        assert record["accuracy"] >= record["accuracy_of_torch_fp32"] - 0.005
        assert record["images"] > 0
