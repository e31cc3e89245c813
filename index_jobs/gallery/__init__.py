"""Galleries as tables: find images in folders, tars, lists or URLs, and read their captions and metadata.

In: a path or URL. Out: an Arrow table with one row per image, in a stable order, and the bytes of each image.
Every other folder of `index_jobs` may import it; it imports none of them.
"""
