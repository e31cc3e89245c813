"""Captions for pictures of one's own, from any OpenAI-compatible vision endpoint: `dcar data caption`."""
