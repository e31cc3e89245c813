"""Search a FAISS index on a CUDA device.

- A version on disk always holds the CPU form, so it opens on any machine; with a GPU it is searched there.
- FAISS's GPU indexes are not safe for concurrent readers: one search runs at a time, behind a lock.
- Filtered searches and vectors by row use the CPU form, which stays memory-mapped beside the GPU copy.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_jobs.store.faiss_search import Found

MOST_K = 2048  # results of a search; more are asked of the CPU form


def memory() -> int:
    """Bytes of the first GPU that an index may take: half of what is free; 0 without a GPU or FAISS's GPU build."""
    import faiss
    import torch

    library: Any = faiss
    if not hasattr(library, "StandardGpuResources") or not library.get_num_gpus() or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.mem_get_info(0)[0] // 2)


class GpuSearch:
    """A GPU copy of an index. Safe for many threads; one searches at a time."""

    def __init__(self, index: Any) -> None:
        import faiss

        library: Any = faiss
        self._resources = library.StandardGpuResources()  # must outlive the index
        self._index = library.index_cpu_to_gpu(self._resources, 0, index)
        self._turn = threading.Lock()

    def search(self, vectors: NDArray[np.float32], k: int) -> Found:
        """As `VectorIndex.search`, over all rows."""
        with self._turn:
            scores, rows = self._index.search(vectors, k)
        return scores, rows
