"""Inference without training code: `Encoder`, with a fast start on the best runtime.

In: a checkpoint or model name, then texts and images. Out: L2-normalized float32 vectors and their fingerprint.
The service and the index jobs import it; it imports `model`, `runtimes`, `images` and `util`.
"""
