"""Prints the versions of what runs on this host, as JSON.

Runs on a host as root. It looks at what is there: an app's environment, Kafka, the system.
"""

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PYTHON = "/opt/iot-pipeline/current/bin/python"
PACKAGES = ("iot-pipeline", "kafka-python", "Pillow", "couchdb", "timm", "openvino", "onnxruntime")
# As iot_pipeline.processor has them, which is not on every host.
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)
ASK = """
import importlib.metadata, json
found = {}
for name in NAMES:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
try:
    import torch
    found["torch"] = torch.__version__
except ImportError:
    pass
print(json.dumps(found))
"""


def release() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    named = dict(line.split("=", 1) for line in lines if "=" in line)
    return named["PRETTY_NAME"].strip('"')


def packages() -> dict[str, str]:
    if not Path(PYTHON).exists():
        return {}
    words = [PYTHON, "-c", ASK.replace("NAMES", repr(PACKAGES))]
    found: dict[str, str] = json.loads(subprocess.check_output(words, text=True))
    return found


def java() -> str:
    try:
        said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r'"(.+?)"', said.stderr)
    return found.group(1) if found else ""


def machine() -> dict[str, Any]:
    """The processor and memory that this host shows."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = [[word.strip() for word in line.split(":", 1)] for line in lines if ":" in line]
    known = dict(reversed(pairs))
    flags = known.get("flags", "").split()
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines())
    return {
        "processor": known.get("model name", platform.machine()),
        "cores": sum(name == "processor" for name, _ in pairs),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gb": round(int(memory.split()[1]) * 1024 / 1e9, 1),
        "kernel": ".".join(platform.release().split(".")[:2]),
    }


def main() -> None:
    found: dict[str, Any] = {"system": release(), "python": platform.python_version(), **packages()}
    found["machine"] = machine()
    kafka = Path("/opt/kafka")
    if kafka.exists():
        found |= {"kafka": kafka.resolve().name.removeprefix("kafka-"), "java": java()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
