"""Published indexes on disk: versions, manifests, items, filters, vectors, and the atomic switch of CURRENT.

In: an index directory. Out: opened versions to search, and functions that publish, verify and roll back.
With `jobs.apply`, all of `index_jobs` that the service (`app`, except its CLI) may import.
"""
