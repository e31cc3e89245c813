"""Foundations of the service: settings, metrics, callers, Redis, turns and batches,
problem responses.

In: environment variables, calls that wait for a turn, and errors. Out: `Settings`, what
the calls return, and problems. Every folder of `app` may import it; it imports none of
them.
"""
