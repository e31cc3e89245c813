"""Application of the changes that wait in an index's queue: `dcar index apply`.

In: an index with accepted jobs. Out: new versions that contain them, and a record of how each job ended.
The command line imports it, and so do tests; it may import the jobs beside it and the store.
"""
