"""The search engine: a query becomes a plan, a vector, ranked rows and items. Knows nothing of HTTP.

    from app.search import Index
    index = Index.open("data/index/twemoji")
    results = index.search("crying cat", k=3)  # each with item, score and level

In: a `Query` and a `Snapshot` of the published index. Out: `SearchResults`, or an error of `search.errors`. Imported by
`service`, which shares its work among requests, by `api` and by the CLI; it imports `core`, `dcar_core` and
`index_jobs.index`.
"""

from app.search.engine import Index

__all__ = ["Index"]
