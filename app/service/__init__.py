"""The service around the search engine: shared work of concurrent searches, and the
life and changes of the indexes.

In: queries and changes of published indexes. Out: results of `app.search`, from
batches, caches and threads that all requests share, within limits on the work in
progress; jobs that a process of its own applies. Imported by `api`, `main` and
`server`; it imports `search` and `core`, and knows nothing of HTTP.
"""
