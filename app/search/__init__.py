"""The search engine: queries become ranked matches. Knows nothing of HTTP.

In: a `Query` and a `Snapshot` of the published index. Out: ranked matches, or an error of `search.errors`.
Imported by `api`, `writes`, `main`, `server` and the CLI; it imports `core`, `dcar_core` and `index_jobs.store`.
"""
