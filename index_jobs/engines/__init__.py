"""Vector engines: what stores the vectors of a version and searches them. FAISS files are the default.

In: vectors by row number. Out: the rows nearest to a query. `engines.protocol` says what an engine does, and finds one
by its name, plug-ins included. Engines import only `row_filter`, `spec` and `checks`.
"""
