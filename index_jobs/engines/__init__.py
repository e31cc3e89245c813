"""Vector engines: what stores the vectors of a version and searches them. FAISS files are the default.

In: vectors by row number. Out: the rows nearest to a query. `engines.protocol` says what an engine does, and a line
of it adds one. `store` and `jobs` load them by name; engines import only `selection`, `spec` and `checks`.
"""
