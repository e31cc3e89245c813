"""Captions for a folder of images, written by any OpenAI-compatible vision endpoint: `dcar data caption`.

In: images in one folder per category and an endpoint. Out: `pairs.jsonl`, with a journal that makes runs resumable.
The CLI imports it; it imports `data`, `negatives` and `util`.
"""
