"""Features of the processor, by the names that the operating system gives them, and which libraries are installed."""

import os
from importlib.util import find_spec
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def is_installed(library: str) -> bool:
    """Return whether a library is installed, without importing it."""
    return find_spec(library) is not None


def available_cores() -> int:
    """Return the number of cores that this process may use; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_bf16() -> str | None:
    """Return the reason why this processor cannot compute in bfloat16 natively; None if it can."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "features"))), "")
    if _BF16.intersection(flags.split()):
        return None
    return f"this processor has no bf16 instructions ({', '.join(sorted(_BF16))})"
