"""Foundations of the service: settings, metrics, logs, tracing, keys, Redis, and problem responses.

In: the environment. Out: typed objects that the other folders share.
Every folder of `app` may import it; it imports none of them.
"""
