"""The model: a frozen CLIP backbone and everything DCAR learns on top of it, with its
configuration and checkpoints.

In: tokens, pixels, a checkpoint directory. Out: PyTorch features and trainable
parameters. Imports `images` and `util`; every later stage (runtimes, training,
evaluation) builds on it.
"""
