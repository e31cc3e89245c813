"""Foundations of the service: settings, metrics, callers, Redis, turns and batches, problem responses.

In: environment variables, queued calls and errors. Out: `Settings`, results in turns, and problems with their statuses.
Every folder of `app` may import it; it imports none of them.
"""
