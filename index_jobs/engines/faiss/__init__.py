"""FAISS files: choose a kind, train, fill and tune it, and search it.

In: blocks of vectors. Out: a memory-mapped index with its measured recall and latency.
Found by `engines.registry`; it imports `engines.protocol` and `engines.measure`.
"""
