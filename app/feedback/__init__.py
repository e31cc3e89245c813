"""Feedback: what callers did with the results of their searches, and what follows from
it.

In: searches and events of the service. Out: a log in SQLite, and from it training
pairs, judged lists and figures; comparisons of versions by a judged list. `api`,
`main`, `server` and `cli` import it; it imports `core`, `search` and the store of
indexes.
"""
