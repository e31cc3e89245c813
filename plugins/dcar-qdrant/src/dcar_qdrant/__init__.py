"""The engine `qdrant` of DCAR: vectors and the fields of items in a Qdrant, which
evaluates filters itself.
"""
