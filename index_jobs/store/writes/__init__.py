"""Changes of an index's items that were accepted over HTTP and wait to be published.

In: items with their image files, or ids. Out: durable jobs, in order, and how each of them ended.
The service writes to the queue, and `index_jobs.jobs.apply` applies it; it imports `store`, and copies a
checkpoint by `dcar_core.model`.
"""
