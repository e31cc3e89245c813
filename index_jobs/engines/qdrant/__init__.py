"""Vectors and the fields of items in a Qdrant, which evaluates filters itself.

In: blocks of vectors and a table of fields. Out: collections, searched by conditions.
Loaded by its name in `engines.protocol`; it imports `engines.protocol`, `engines.measure` and the tuning of FAISS.
"""
