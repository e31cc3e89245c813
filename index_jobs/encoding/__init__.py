"""Encoding of a gallery: images to vector shards, resumable, on this machine or a Ray
cluster.
"""
