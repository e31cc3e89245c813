"""A cache of decoded, resized images: a rebuild after retraining need not decode or fetch them again.

- One SQLite file per preprocessing, one row per image: its pixels, then the width and height of its file. The cache
  survives kills, worker processes share it, and an image is found wherever it stands in a gallery that has grown.
- The key holds the location and its version, so a changed image is decoded again. Failures are not cached.
- A disk that fills up, or a file that breaks during the job, costs a warning and the time to decode. A cache that
  cannot be opened is an error before anything is encoded.
- An image of 224 pixels takes 150 KB. Nothing is ever removed; delete the directory to free the space.
"""

import hashlib
import logging
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from dcar_core.images.workers import Decoded
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import DcarError
from dcar_core.util.files import canonical_json, hash_json
from index_jobs.gallery.storage import ImageLocation

logger = logging.getLogger(__name__)

_TIMEOUT_S = 60  # for another process's write
_PAGE_BYTES = 32_768  # a few pages per image
_SIZE = struct.Struct("<II")


class PixelCache:
    """The cache of one preprocessing. Threads and processes share it; a connection lasts for one window."""

    def __init__(self, folder: Path, preprocess: Preprocess) -> None:
        """Open the cache in `folder`, which is created if necessary. Raise DcarError if it cannot be used."""
        self.path, self._side = folder / f"pixels-{hash_json(preprocess.to_dict())[:16]}.sqlite", preprocess.size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._connection() as connection:
                connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS pixels (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            reason = f"the pixel cache {self.path} cannot be used: {error}; delete it or name another"
            raise DcarError(reason) from error

    def get(self, root: str, locations: Sequence[ImageLocation]) -> dict[int, Decoded]:
        """Return gallery row -> image of the cached ones among these, with pixels uint8 (3, S, S)."""
        cached, pixels = dict[int, Decoded](), 3 * self._side**2
        try:
            with self._connection() as connection:
                for location in locations:
                    key = (_cache_key(root, location),)
                    found = connection.execute("SELECT value FROM pixels WHERE key = ?", key).fetchone()
                    if found and len(found[0]) == pixels + _SIZE.size:
                        image = np.frombuffer(found[0], np.uint8, pixels).reshape(3, self._side, self._side)
                        cached[location.row] = Decoded(image, *_SIZE.unpack_from(found[0], pixels))
        except sqlite3.Error as error:
            logger.warning("the pixel cache %s cannot be read (%s); images are decoded instead", self.path, error)
        return cached

    def put(self, root: str, images: Mapping[ImageLocation, Decoded]) -> None:
        rows = [
            (_cache_key(root, location), pixels.tobytes() + _SIZE.pack(width, height))
            for location, (pixels, width, height) in images.items()
        ]
        try:
            with self._connection() as connection, connection:
                connection.executemany("INSERT OR REPLACE INTO pixels VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            logger.warning("the pixel cache %s cannot be written (%s); the job continues without it", self.path, error)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_TIMEOUT_S)) as connection:
            connection.execute("PRAGMA synchronous=NORMAL")
            yield connection


def _cache_key(root: str, location: ImageLocation) -> bytes:
    """Return 16 bytes that identify one version of one image."""
    parts = [root, location.location, location.offset, location.size, location.version]
    return hashlib.blake2b(canonical_json(parts), digest_size=16).digest()
