"""Captions for a folder of images, written by any OpenAI-compatible vision endpoint: `dcar data caption`.

In: images in one folder per category and an endpoint. Out: annotations in FDRD's format, and a journal that makes runs
resumable.
The CLI imports it; it imports `images`, `model`, `data`, `negatives` and `util`.
"""
