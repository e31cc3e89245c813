"""Journal of a captioning run in SQLite: a response is on disk before it is used, so
that none is requested twice.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

from dcar_caption.endpoint import CaptionError


class Journal:
    """JSON values by image, kind and turn. Raise CaptionError for a file of other
    settings, or that cannot be used.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file = file
        self._database = sqlite3.connect(file, isolation_level=None)
        self.close = self._database.close
        self._execute(
            "CREATE TABLE IF NOT EXISTS journal (image, kind, turn, value, PRIMARY KEY"
            " (image, kind, turn))"
        )
        before = self.get("", "settings") or settings
        other = [
            f"{name} (was {before.get(name)!r:.80})"
            for name in settings
            if before.get(name) != settings[name]
        ]
        if other:
            hint = "use those, or give another --out or --restart"
            raise CaptionError(
                f"{file} was made with other settings: {', '.join(other)}; {hint}"
            )
        self.put(settings, "", "settings")

    def get(self, image: str, kind: str, turn: int = 0) -> Any:
        query = "SELECT value FROM journal WHERE image = ? AND kind = ? AND turn = ?"
        row = self._execute(query, image, kind, turn).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, value: Any, image: str, kind: str, turn: int = 0) -> None:
        self._execute(
            "INSERT OR REPLACE INTO journal VALUES (?, ?, ?, ?)",
            image,
            kind,
            turn,
            json.dumps(value),
        )

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.DatabaseError as error:
            hint = "free the disk, or move the file if it is no journal"
            raise CaptionError(
                f"{self._file} cannot be used: {error}; {hint}"
            ) from error
