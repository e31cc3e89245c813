"""FAISS on a CUDA device: exact search, inverted lists, and the CAGRA graph, where FAISS was built with them.

- What is written to disk is always the CPU form, so a version opens anywhere; with a GPU at hand it is searched there.
- FAISS's GPU indexes are not safe even for concurrent readers, so that one search runs at a time, behind a lock.
- Filtered searches and vectors by row go to the CPU form, which stays memory-mapped beside it.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.errors import MissingExtraError
from index_jobs.kinds import Choice, create
from index_jobs.selecting import Found
from index_jobs.tuning import Blocks, sample

_TRAINED_ON = 64 * 4096
MOST_K = 2048  # results of a search; more are asked of the CPU form


def memory() -> int:
    """Bytes of the first GPU that an index may take: half of what is free; 0 without a GPU or FAISS's GPU build."""
    import faiss
    import torch

    library: Any = faiss
    if not hasattr(library, "StandardGpuResources") or not library.get_num_gpus() or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.mem_get_info(0)[0] // 2)


def fill(choice: Choice, dim: int, blocks: Blocks, count: int) -> Any:
    """Train and fill on the GPU; gives the CPU form."""
    import faiss

    library: Any = faiss
    resources = library.StandardGpuResources()
    if choice.factory == "CAGRA":
        if "CUVS" not in library.get_compile_options():
            raise MissingExtraError("CAGRA, with a FAISS built with NVIDIA cuVS such as conda's faiss-gpu-cuvs,", "gpu")
        index = library.GpuIndexCagra(resources, dim, library.METRIC_INNER_PRODUCT, library.GpuIndexCagraConfig())
        index.train(np.concatenate([np.asarray(block) for block in blocks()]))  # the graph is made of all at once
        return library.index_gpu_to_cpu(index)
    index = library.index_cpu_to_gpu(resources, 0, create(choice.factory, dim))
    if not index.is_trained:
        index.train(sample(blocks, count, _TRAINED_ON))
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    index = library.index_gpu_to_cpu(index)
    if (inverted := library.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()
    return index


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
