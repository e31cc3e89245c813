"""Foundations of the service: settings, metrics, callers, Redis, turns and problem responses.

Every folder of `app` may import it; it imports none of them.
"""
