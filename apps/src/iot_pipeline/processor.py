"""What this host's processor can do, as the kernel says."""

from __future__ import annotations

from pathlib import Path

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
"""Those that engines choose their kernels by, as Linux names them."""


def instructions(file: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of INSTRUCTIONS that the processor has; none where the kernel does not say."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return [name for name in INSTRUCTIONS if name in flags]
