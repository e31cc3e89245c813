"""Foundations of the service: settings, metrics, callers, turns and problem responses.

Every folder of `app` may import it; it imports none of them.
"""
