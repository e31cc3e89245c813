"""Galleries as tables: images in folders, tars, lists or URLs, their captions, metadata
and bytes.
"""
