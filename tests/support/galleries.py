"""Reading scanned galleries."""

import json
from typing import Any

from index_jobs.gallery.scan import Gallery


def rows_of(gallery: Gallery) -> dict[str, dict[str, Any]]:
    """Return the rows by name, with their metadata parsed."""
    return {row["name"]: row | {"metadata": json.loads(row["metadata"])} for row in gallery.table.to_pylist()}
