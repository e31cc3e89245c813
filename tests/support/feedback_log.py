"""Logs of feedback for the tests of their readers."""

import json
from collections.abc import Iterable
from pathlib import Path

from app.feedback.log import EventRow, QueryRow, Store


def write_log(folder: Path, queries: Iterable[QueryRow], events: Iterable[EventRow] = ()) -> Path:
    """Add rows to the log of this host, events first, as if another host had answered the searches."""
    store = Store(folder)
    store.add([], [*events])
    facts = {
        row.query_id: {name: value for name, value in row._asdict().items() if name != "query_id"} for row in queries
    }
    store.add([f"{json.dumps(query_id)}:{json.dumps(each)}" for query_id, each in facts.items()], [])
    store.close()
    return folder
