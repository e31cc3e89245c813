"""The search engine: a query becomes a plan, a vector, hits and results. Knows nothing
of HTTP.

    from app.search import Index
    index = Index.open("data/index/twemoji")
    body = index.search("crying cat", k=3)  # its "results" have id, score and level

In: a `Query` and a `ServedVersion` of the published index. Out: a `SearchResponse` as
it is sent, or an error of `search.errors`. Imported by `service`, `api` and the CLI;
imports `core`, `dcar_core` and `index_jobs.index`.
"""

from app.search.index import Index

__all__ = ["Index"]
