"""Feedback: what callers did with the results of their searches, and what follows from it for training.

In: searches and events of the service, in the columns of OpenSearch's User Behavior Insights. Out: a log of Parquet
files, and from it training pairs and judged lists. `api`, `main`, `server` and `cli` import it; it imports `core`,
`search` and the store of indexes.
"""
