"""ASGI middleware around the routes: request ids and logs, keys and rate limits, body limits, the HTTP protocol.

In: raw ASGI messages. Out: the same messages, limited, counted and logged.
Imported by `main`, `server` and `api`; it imports `core` alone.
"""
