"""Captions for a folder of images, written by any OpenAI-compatible vision endpoint:
`dcar data caption`.
"""
