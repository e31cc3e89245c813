"""What requests pass on their way to an endpoint: the envelope of every response, then policies.

Imported by `main` and `api`; it imports `core` alone.
"""
