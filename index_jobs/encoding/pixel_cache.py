"""A cache of decoded, resized pictures: a rebuild after retraining need not decode again, nor fetch what lies far away.

- One SQLite file for each preprocessing, a row a picture: safe against being killed, shared by worker processes, and a
  picture is found again wherever it stands in a gallery that has grown.
- The key holds where the picture lies and its version, so one that changed is decoded again. Failures are not kept.
- It is a convenience: a disk that fills up, or a file that breaks under way, costs a warning and the time to decode.
  One that cannot be opened is an error before anything is encoded.
- At 224 pixels a picture takes 150 KB. Nothing is ever removed; delete the directory to be rid of it.
"""

import hashlib
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import DcarError
from dcar_core.util.files import canonical_json
from index_jobs.gallery.storage import ImageLocation

logger = logging.getLogger(__name__)

Pixel = NDArray[np.uint8]
_WAIT_S = 60  # for another process's write
_PAGE = 32_768  # few pages a picture
_ASKED = 500  # keys a query; SQLite takes 999 in its oldest builds


@dataclass(frozen=True)
class PixelCache:
    """Picklable, so that worker processes share it; a connection lasts for one window. Build it with `open`."""

    path: Path
    side: int

    @classmethod
    def open(cls, folder: Path, preprocess: Preprocess) -> "PixelCache":
        """The cache of one preprocessing in `folder`, which is made when it is missing.

        Raises:
            DcarError: it cannot be written, or is no cache.
        """
        name = hashlib.sha256(canonical_json(preprocess.to_dict())).hexdigest()[:16]
        cache = cls(folder / f"pixels-{name}.sqlite", preprocess.size)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with cache._connection() as connection:
                connection.execute(f"PRAGMA page_size={_PAGE}")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS pixels (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise DcarError(
                f"the pixel cache {cache.path} cannot be used: {error}; delete it or name another"
            ) from error
        return cache

    def get(self, root: str, places: Sequence[ImageLocation]) -> dict[int, Pixel]:
        """Gallery row -> uint8 (3, S, S), of the places that are here."""
        rows = {cache_key(root, place): place.row for place in places}
        keys, found = list(rows), dict[int, Pixel]()
        try:
            with self._connection() as connection:
                for start in range(0, len(keys), _ASKED):
                    part = keys[start : start + _ASKED]
                    marks = ",".join("?" * len(part))
                    query = f"SELECT key, value FROM pixels WHERE key IN ({marks})"
                    for key, value in connection.execute(query, part):
                        if len(value) == 3 * self.side**2:
                            found[rows[key]] = np.frombuffer(value, np.uint8).reshape(3, self.side, self.side)
        except sqlite3.Error as error:
            logger.warning("the pixel cache %s cannot be read (%s); pictures are decoded instead", self.path, error)
        return found

    def put(self, root: str, pixels: Mapping[ImageLocation, Pixel]) -> None:
        """Keep uint8 (3, S, S) of each place."""
        rows = [(cache_key(root, place), value.tobytes()) for place, value in pixels.items()]
        try:
            with self._connection() as connection, connection:
                connection.executemany("INSERT OR REPLACE INTO pixels VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            logger.warning("the pixel cache %s cannot be written (%s); the job goes on without", self.path, error)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as connection:
            connection.execute("PRAGMA synchronous=NORMAL")
            yield connection


def cache_key(root: str, place: ImageLocation) -> bytes:
    """16 bytes that stand for one version of one picture."""
    parts = [root, place.location, place.offset, place.size, place.version]
    return hashlib.blake2b(canonical_json(parts), digest_size=16).digest()
