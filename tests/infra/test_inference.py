"""The hosts that classify images."""

from testinfra.host import Host

GROUP = "inference_nodes"
PYTHON = "/opt/iot-pipeline/current/bin/python"


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
