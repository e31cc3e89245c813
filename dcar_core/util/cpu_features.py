"""What this processor can do, by the names that the operating system gives its instructions; what is installed."""

import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Any one of them will do. The first group is x86's, the second Arm's.
_NEEDED = {
    "bf16": ({"avx512_bf16", "amx_bf16"}, {"bf16"}),
    "int8": ({"avx512_vnni", "avx_vnni", "amx_int8"}, {"i8mm", "asimddp"}),
}
_CPUINFO = Path("/proc/cpuinfo")


def installed_versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of those that are installed, by name."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def available_cores() -> int:
    """Those that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def instruction_sets() -> frozenset[str]:
    """The processor's instruction sets; empty where the system does not tell."""
    return frozenset(_said("flags", "features").split())


@cache
def processor_id() -> str:
    """What distinguishes this processor from another one, for remembering what was measured on it."""
    kinds = sorted(kind for kind in _NEEDED if missing_instructions(kind) is None)
    return f"{_said('model name') or 'unknown'} {'+'.join(kinds)}"


def missing_instructions(kind: str) -> str | None:
    """Why this processor cannot compute in "bf16" or "int8" by itself; None when it can."""
    needed = _NEEDED[kind]
    if any(group & instruction_sets() for group in needed):
        return None
    names = ", ".join(sorted(needed[0] | needed[1]))
    return f"this processor has no {kind} instructions ({names})"


def _said(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names; nothing where there is none."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(names)), "")
