"""Memory-mapped weights, so that memory holds only the pages that are read.

- A service that runs exported graphs reads the model's own weights at the start and for explanations, seldom otherwise.
- Processes that serve the same file share its pages.
- Replace a mapped file by renaming another one onto its name; never write into it.
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
    """Replace the tensors of a loaded model by those mapped from its file.

    Nothing changes if names, shapes or types differ (half precision in the file, float32 in the model), or on Windows,
    which does not let a mapped file be replaced.
    """
    if sys.platform == "win32" or file.suffix != ".safetensors" or not file.is_file():
        return
    from safetensors.torch import load_file

    mapped, loaded = load_file(str(file)), model.state_dict()
    if {name: (t.shape, t.dtype) for name, t in mapped.items()} == {n: (t.shape, t.dtype) for n, t in loaded.items()}:
        model.load_state_dict(mapped, assign=True)


def release_pages(places: Iterable[Path]) -> None:
    """Release the unmodified pages mapped from these files, or from files below these directories.

    The system reads them again when they are needed. Does nothing on systems without `madvise`.
    """
    advise = getattr(mmap, "MADV_DONTNEED", None)
    if advise is None or not Path("/proc/self/smaps").is_file():
        return
    roots = {place.resolve() for place in places}
    libc = ctypes.CDLL(None)
    for start, end, path, fields in _mappings():
        is_modified = fields.get("Anonymous")  # releasing such pages would lose them
        if path.startswith("/") and not is_modified and not roots.isdisjoint([Path(path), *Path(path).parents]):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advise)


def trim_heap() -> None:
    """Return freed memory to the system; glibc keeps it for every thread that has loaded a model."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def _mappings() -> list[tuple[int, int, str, dict[str, int]]]:
    """Return start, end, file and sizes in bytes of every mapping of a file."""
    mappings: list[tuple[int, int, str, dict[str, int]]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split(maxsplit=5)
        if name.endswith(":"):
            if mappings and rest[-1:] == ["kB"]:
                mappings[-1][3][name[:-1]] = int(rest[0]) * 1024
        else:
            start, end = (int(part, 16) for part in name.split("-"))
            mappings.append((start, end, rest[4] if len(rest) > 4 else "", {}))
    return mappings
