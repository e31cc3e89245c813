"""The service around the search engine: shared work of concurrent searches, and the life of the indexes.

In: queries and changes of published indexes. Out: results of `app.search`, from batches, caches and threads that all
requests share, within limits on the work in progress. Imported by `api`, `writes`, `main` and `server`; it imports
`search` and `core`, and knows nothing of HTTP.
"""
