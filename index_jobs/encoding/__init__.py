"""Encoding of a gallery: images to vector shards, resumable, on this machine or a Ray cluster.

In: a scanned gallery and an encoder. Out: checksummed shards of float32 vectors and the list of failures.
`jobs` imports it; it imports `gallery` and `index`.
"""
