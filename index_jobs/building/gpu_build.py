"""Build a FAISS index on a CUDA device: exact search, inverted lists, and the CAGRA graph."""

from typing import Any

import numpy as np

from dcar_core.util.arrays import Blocks
from dcar_core.util.errors import MissingExtraError
from index_jobs.building.kinds import IndexChoice, create_index
from index_jobs.building.tuning import sample_vectors

_TRAINING_VECTORS = 64 * 4096


def fill_on_gpu(choice: IndexChoice, dim: int, blocks: Blocks, count: int) -> Any:
    """Train and fill an index on the GPU, and return its CPU form."""
    import faiss

    library: Any = faiss
    resources = library.StandardGpuResources()
    if choice.factory == "CAGRA":
        if "CUVS" not in library.get_compile_options():
            raise MissingExtraError("CAGRA, with a FAISS built with NVIDIA cuVS such as conda's faiss-gpu-cuvs,", "gpu")
        index = library.GpuIndexCagra(resources, dim, library.METRIC_INNER_PRODUCT, library.GpuIndexCagraConfig())
        index.train(np.concatenate([np.asarray(block) for block in blocks()]))  # builds the graph of all vectors
        return library.index_gpu_to_cpu(index)
    index = library.index_cpu_to_gpu(resources, 0, create_index(choice.factory, dim))
    if not index.is_trained:
        index.train(sample_vectors(blocks, count, _TRAINING_VECTORS))
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    index = library.index_gpu_to_cpu(index)
    if (inverted := library.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()
    return index
