"""Inference without training code: `Encoder`, and the two frozen towers on PyTorch or
OpenVINO.

In: a checkpoint or model name, then texts and images. Out: L2-normalized float32
vectors and their fingerprint. The service and the index jobs import it; it imports
`model`, `images` and `util`, and a library only when a runtime opens.
"""
