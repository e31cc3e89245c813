"""HTTP routes and their schemas: requests become queries, results become JSON.

In: HTTP requests. Out: responses and the OpenAPI document.
Imported by `main` alone; it imports `search`, `service`, `feedback` and `core`.
"""
