"""Texts before the text tower: cleaning, tokenizers, and where a tokenized text begins and ends. Needs no PyTorch.

In: user text, the files of a vocabulary. Out: token ids and their layout.
Every folder above `util` and the service's query form may import it; it imports only `util`.
"""
