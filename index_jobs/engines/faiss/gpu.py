"""Search of a FAISS index on a CUDA device.

- A version on disk holds the CPU form, so it opens on any machine; with a GPU, searches run there.
- FAISS's GPU indexes are not safe for concurrent readers, so a lock admits one search at a time.
- Filtered searches and vectors by row use the CPU form, which stays memory-mapped.
"""

import threading
from typing import Any

import faiss

from dcar_core.util.arrays import Floats
from index_jobs.engines.protocol import ScoredRows

MAX_K = 2048  # results of a GPU search; larger searches run on the CPU


def free_gpu_memory() -> int:
    """Return the bytes of the first GPU that an index may take: half of the free memory.

    Returns 0 without a GPU or FAISS's GPU build.
    """
    import torch

    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus() or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.mem_get_info(0)[0] // 2)


class GpuSearch:
    """A GPU copy of an index. Safe for many threads; one searches at a time."""

    def __init__(self, index: Any) -> None:
        self._resources = faiss.StandardGpuResources()  # must outlive the index
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, index)
        self._lock = threading.Lock()

    def search(self, vectors: Floats, k: int) -> ScoredRows:
        """Search all rows, as `VectorIndex.search` does."""
        with self._lock:
            scores, rows = self._index.search(vectors, k)
        return scores, rows
