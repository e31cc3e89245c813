"""Foundations of the service: settings, metrics, callers, Redis, turns and batches, problem responses.

Every folder of `app` may import it; it imports none of them.
"""
