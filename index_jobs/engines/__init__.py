"""Vector engines: what stores the vectors of a version and searches them. FAISS files are the default.

In: vectors by row number. Out: the rows nearest to a query. `engines.protocol` says what an engine does; a line in
`engines.registry` adds one. `store` and `jobs` import them by the registry; engines import only `spec` and `checks`.
"""
