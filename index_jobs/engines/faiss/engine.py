"""The engine `faiss`: one memory-mapped file in the version's folder."""

from pathlib import Path

from dcar_core.util.errors import DataError
from index_jobs.engines.faiss import gpu
from index_jobs.engines.faiss.index import FaissIndex, write_faiss
from index_jobs.engines.protocol import CreatedIndex, NewIndex
from index_jobs.spec import IndexSpec

VECTORS = "index.faiss"


class FaissEngine:
    """Vectors in a file; see `index_jobs.engines.protocol.Engine`. Building is imported when it is needed."""

    def __init__(self, uri: str = "") -> None:
        if uri:
            raise DataError(f"the engine faiss writes a file into the index, so it takes no location such as {uri!r}")

    def plan(self, spec: IndexSpec, count: int, dim: int, device: str) -> int:
        """Return the estimated bytes of the first kind that would be built."""
        from index_jobs.engines.faiss.kinds import choose_kinds

        return choose_kinds(spec.kind, count, dim, memory=spec.memory, gpu_memory=_gpu_memory(spec, device))[0].bytes

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        """Build and tune the file; see `build`."""
        from index_jobs.engines.faiss.build import build_index
        from index_jobs.engines.faiss.kinds import choose_kinds

        gpu_memory = _gpu_memory(spec, new.device)
        choices = choose_kinds(spec.kind, new.count, new.dim, memory=spec.memory, gpu_memory=gpu_memory)
        built = build_index(
            new.blocks, new.count, new.dim, choices, new.queries, target=spec.target_recall, folder=new.folder
        )
        file = new.folder / VECTORS
        write_faiss(built.index, file)
        measured = built.measured | {"bytes": file.stat().st_size}
        choice = built.choice
        return CreatedIndex(kind=choice.factory, reason=choice.reason, measured=measured, gpu=choice.gpu)

    def open(self, folder: Path, *, gpu: bool = False) -> FaissIndex:
        """Memory-map the file."""
        return FaissIndex.open(folder / VECTORS, gpu=gpu)

    def sync(self, index: Path, version: int) -> None:
        """Do nothing: files go with their folders."""


def _gpu_memory(spec: IndexSpec, device: str) -> int:
    """Return the bytes of a GPU that the index may take; 0 if neither the kind nor the device names one."""
    is_used = spec.kind.startswith("gpu-") or (spec.kind == "auto" and device.startswith("cuda"))
    return gpu.free_gpu_memory() if is_used else 0
