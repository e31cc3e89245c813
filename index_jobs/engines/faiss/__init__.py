"""FAISS files: choose a kind, train, fill and tune it, and search it."""
