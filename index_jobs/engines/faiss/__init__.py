"""FAISS files: choose a kind, train, fill and tune it, and search it.

In: blocks of vectors. Out: a memory-mapped index with its measured recall and latency.
Loaded by its name in `engines.protocol`; it imports `engines.protocol` and `engines.measure`.
"""
