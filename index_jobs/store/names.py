"""What an index is called, in messages and by engines. Imports nothing of the index."""

from pathlib import Path

URL_FILE = "store.url"  # in the mirror of an object store


def location_of(index: Path) -> str:
    """Return what messages call an index: its URL, or its path as given."""
    url = index / URL_FILE
    return url.read_text().strip() if url.is_file() else str(index)


def index_name(index: Path) -> str:
    """Return the name of an index, the same on every machine that publishes it: its URL, or its absolute path."""
    return location_of(index.absolute())
