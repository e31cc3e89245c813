"""Runtimes: the two frozen towers on PyTorch or OpenVINO, behind one small protocol.

In: tokens, pixels and the arrays of an encoder. Out: features of both towers as NumPy arrays.
`serving` and the other packages import it; it imports `model` and `util`, and a library only when a runtime opens.
"""
