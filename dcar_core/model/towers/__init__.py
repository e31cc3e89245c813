"""The two encoders of every family, whose sequences have room for prompts and adapters.

In: open_clip's model, tokens or pixels. Out: features. `model` alone imports it, and
`encoder.graphs`.
"""
