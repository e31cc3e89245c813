"""Logs of feedback for the tests of their readers."""

from collections.abc import Iterable
from pathlib import Path

from app.feedback.log import EventRow, QueryRow, Store


def write_log(
    folder: Path,
    queries: Iterable[QueryRow],
    events: Iterable[EventRow] = (),
) -> Path:
    """Add rows to the log of this host, events first, as if another host had answered
    the searches.
    """
    store = Store(folder)
    store.add([], [*events])
    store.add([*queries], [])
    store.close()
    return folder
