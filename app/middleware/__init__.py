"""What requests pass on their way to an endpoint: the HTTP protocol, the log, and the policy and body limit of a route.

In: raw ASGI messages. Out: the same messages, limited, counted and logged.
Imported by `main`, `server` and `api`; it imports `core` alone.
"""
