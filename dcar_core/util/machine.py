"""Features of the processor, by the names that the operating system gives them, and which libraries are installed."""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# One instruction set of either group suffices; the first group is of x86, the second of Arm.
_NEEDED = {
    "bf16": ({"avx512_bf16", "amx_bf16"}, {"bf16"}),
    "int8": ({"avx512_vnni", "avx_vnni", "amx_int8"}, {"i8mm", "asimddp"}),
}
_CPUINFO = Path("/proc/cpuinfo")


def is_installed(library: str) -> bool:
    """Return whether a library is installed, without importing it."""
    return find_spec(library) is not None


def available_cores() -> int:
    """Return the number of cores that this process may use; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_instructions(kind: str) -> str | None:
    """Return the reason why this processor cannot compute in "bf16" or "int8" natively; None if it can."""
    needed, found = _NEEDED[kind], _cpuinfo("flags", "features").split()
    if any(group.intersection(found) for group in needed):
        return None
    return f"this processor has no {kind} instructions ({', '.join(sorted(needed[0] | needed[1]))})"


@cache
def _cpuinfo(*names: str) -> str:
    """Return the first line of /proc/cpuinfo with one of these names; empty if there is none."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(names)), "")
