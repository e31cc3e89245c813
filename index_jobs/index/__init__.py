"""Published indexes as blobs, on disk and in object storage: versions, items, filters,
and the switch of CURRENT.

In: an index directory. Out: opened versions to search, and functions that publish,
verify and roll back. With `jobs.update` and the modules beside the folders, all of
`index_jobs` that the service may import.
"""
