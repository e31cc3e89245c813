"""The machine: its processor, the libraries installed on it, and memory-mapped weights.

- Of mapped weights, memory holds only the pages that are read, and processes that serve
  the same file share them.
- Replace a mapped file by renaming another one onto its name; never write into it.
"""

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

CPUINFO = Path("/proc/cpuinfo")
WEIGHTS_FILE = "open_clip_model.safetensors"
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def is_installed(library: str) -> bool:
    """Return whether a library is installed, without importing it."""
    return find_spec(library) is not None


def available_cores() -> int:
    """Return the number of cores that this process may use; a container may have fewer
    than the machine.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def missing_bf16() -> str | None:
    """Return the reason why this processor cannot compute in bfloat16 natively; None if
    it can.
    """
    if CPUINFO.is_file() and _BF16.intersection(
        CPUINFO.read_text(encoding="utf-8", errors="replace").split()
    ):
        return None
    return f"this processor has no bf16 instructions ({', '.join(sorted(_BF16))})"


def map_weights(model: "nn.Module", file: Path) -> None:
    """Replace the tensors of a loaded model by those mapped from its file, unless
    names, shapes or types differ.
    """
    if file.suffix != ".safetensors" or not file.is_file():
        return
    from safetensors.torch import load_file

    mapped = load_file(str(file))
    loaded = model.state_dict()
    if {name: (t.shape, t.dtype) for name, t in mapped.items()} == {
        n: (t.shape, t.dtype) for n, t in loaded.items()
    }:
        model.load_state_dict(mapped, assign=True)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a file of weights, by name, without reading
    their values.
    """
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), "np") as tensors:
            return {
                name: tuple(tensors.get_slice(name).get_shape())
                for name in tensors.keys()  # noqa: SIM118
            }
    import torch

    content = torch.load(file, map_location="meta", weights_only=True)
    state = content.get("state_dict", content)
    return {
        name.removeprefix("module."): tuple(item.shape)
        for name, item in state.items()
        if hasattr(item, "shape")
    }


def release_pages(paths: Iterable[Path]) -> None:
    """Release the unmodified pages mapped from these files, or files in these
    directories, where `madvise` exists.
    """
    advise = getattr(mmap, "MADV_DONTNEED", None)
    roots = "|".join(
        re.escape(str(path.resolve()))
        for root in paths
        for path in (root, *root.glob("*"))
    )
    if not roots or advise is None or not Path("/proc/self/smaps").is_file():
        return
    # Start and end of a mapping without modified pages, which releasing would lose.
    unmodified = (
        r"(?m)^([0-9a-f]+)-([0-9a-f]+) .*"
        rf" (?:{roots})(?:/.*)?\n(?:\w+:.*\n)*?Anonymous: +0 kB"
    )
    libc = ctypes.CDLL(None)
    for start, end in re.findall(unmodified, Path("/proc/self/smaps").read_text()):
        libc.madvise(
            ctypes.c_void_p(int(start, 16)),
            ctypes.c_size_t(int(end, 16) - int(start, 16)),
            advise,
        )


def trim_heap() -> None:
    """Return freed memory to the system; glibc keeps it for every thread that has
    loaded a model.
    """
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    else:
        malloc_trim = None
    if malloc_trim is not None:
        malloc_trim(0)
