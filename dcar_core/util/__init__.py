"""Helpers without knowledge of CLIP: errors, durable files, JSON, console streams,
array aliases.

In: paths, bytes, text. Out: plain Python and NumPy values. Every other folder may
import it; it imports none.
"""
