"""The words of the items: ids, captions, categories and metadata fields, for hybrid search.

In: the table of items when a version is written; a query when it is searched. Out: rows with the share of the query's
words that they contain. Used by `index_jobs.index`, by the jobs that write a version, and by `app.search`.
"""
