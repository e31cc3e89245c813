"""Changes of items over HTTP: accepted jobs, and the process that applies them.

In: checked items, or ids. Out: durable jobs, their status, and reloads of the indexes that they change.
Imported by `api`, `main` and `server`; it imports `search`, `core` and `index_jobs.store`.
"""
