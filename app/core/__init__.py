"""Foundations of the service, which every folder of `app` may import; they import none of them."""
