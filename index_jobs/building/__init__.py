"""Construction of the vector index: choose a FAISS kind, train, fill and tune it.

In: blocks of vectors. Out: a FAISS index with its measured recall and latency.
`jobs` imports it; it imports `store` for the search code that tuning measures.
"""
