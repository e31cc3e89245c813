"""What requests pass on their way to an endpoint: the connection, the envelope of every response, keys, body sizes.

In: raw ASGI messages. Out: the same messages, limited, counted and logged.
Imported by `main`, `server` and `api`; it imports `core` alone.
"""
