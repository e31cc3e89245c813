"""Weights stay in their file and are mapped from there, so that memory holds only what is really read.

A service that runs exported graphs needs the model's own weights for a check at the start and for explanations, seldom
afterwards; and processes that serve the same file share its pages. A file that is mapped must be replaced by renaming
another one onto its name, never written into.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_FILE = "open_clip_model.safetensors"


def map_weights(model: "nn.Module", file: Path) -> None:
    """Put the file's tensors into a model that was loaded from it; nothing is done where they are others.

    Tensors of another name, shape or type (half precision in the file, float32 in the model) cannot be used as they
    lie, and Windows keeps a mapped file from being replaced.
    """
    if sys.platform == "win32" or file.suffix != ".safetensors" or not file.is_file():
        return
    from safetensors.torch import load_file

    lying, loaded = load_file(str(file)), model.state_dict()
    if {name: (t.shape, t.dtype) for name, t in lying.items()} == {n: (t.shape, t.dtype) for n, t in loaded.items()}:
        model.load_state_dict(lying, assign=True)


def release_pages(places: Iterable[Path]) -> None:
    """Let go of the pages mapped from these files, or files below these directories, where they are as the file is;
    they are read again when they are needed. Nothing is done where the system cannot.
    """
    advise = getattr(mmap, "MADV_DONTNEED", None)
    if advise is None or not Path("/proc/self/smaps").is_file():
        return
    known = {place.resolve() for place in places}
    libc = ctypes.CDLL(None)
    for start, end, path, fields in _mappings():
        written = fields.get("Anonymous")  # pages of our own, which would be lost
        if path.startswith("/") and not written and not known.isdisjoint([Path(path), *Path(path).parents]):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advise)


def trim_heap() -> None:
    """Give back to the system what was freed: glibc keeps it, for each thread that loads a model anew."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def _mappings() -> list[tuple[int, int, str, dict[str, int]]]:
    """Start, end, file and sizes in bytes of every mapping of a file."""
    found: list[tuple[int, int, str, dict[str, int]]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split(maxsplit=5)
        if name.endswith(":"):
            if found and rest[-1:] == ["kB"]:
                found[-1][3][name[:-1]] = int(rest[0]) * 1024
        else:
            start, end = (int(part, 16) for part in name.split("-"))
            found.append((start, end, rest[4] if len(rest) > 4 else "", {}))
    return found
