"""Runtimes: the two frozen towers on PyTorch or OpenVINO, behind one small protocol.

In: tokens, pixels and the arrays of an encoder. Out: features of both towers as NumPy arrays.
`serving` imports it, and the other packages its names and protocol; it imports `model` and `util`, and each library
only when its runtime is opened.
"""
