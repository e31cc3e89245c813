"""Foundations of the service: settings, metrics, traces, logs, keys, Redis, and problem responses.

In: the environment. Out: typed objects that the other folders share.
Every folder of `app` may import it; it imports none of them.
"""
