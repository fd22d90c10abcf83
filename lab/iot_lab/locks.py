"""`lab lock`: renews the hash-locked requirements after a change of what they are made from."""

from __future__ import annotations

from iot_lab import paths
from iot_lab.console import say, step
from iot_lab.shell import answer, shown

UV = paths.STATE / "venv" / "uv"
EXTRAS = (
    "producer",
    "inference",
    "inference-onnxruntime",
    "inference-openvino",
    "storage",
)
# One lock serves every Python that a host or a control host can have.
OPTIONS = ("--quiet", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-header")


def renew() -> None:
    """Write lab/requirements/tools.txt and apps/requirements/*.txt anew.

    Raises LabError when the packages cannot be resolved.
    """
    uv = UV / "bin" / "uv"
    if not uv.exists():
        with step("Install uv, which writes the locks"):
            answer("/usr/bin/python3", "-m", "venv", "--clear", str(UV))
            answer(str(UV / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv")
    compile_command = (str(uv), "pip", "compile", *OPTIONS)
    tools = paths.ROOT / "lab" / "requirements"
    with step("Lock the tools"):
        answer(*compile_command, shown(tools / "tools.in"), "-o", shown(tools / "tools.txt"))
        say(f"    {shown(tools / 'tools.txt')}")
    apps = paths.ROOT / "apps"
    for extra in EXTRAS:
        with step(f"Lock the apps' {extra}"):
            lock = apps / "requirements" / f"{extra}.txt"
            answer(
                *(*compile_command, "--only-binary", ":all:", "--extra", extra),
                *("pyproject.toml", "-o", str(lock.relative_to(apps))),
                folder=apps,
            )
            say(f"    {shown(lock)}")
