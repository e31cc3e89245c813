"""Files that the service reads in pieces: images of items, and those of a version to compare them with its checksums.

- A response holds one piece of an image in memory, however slowly it is read.
- Opening a version compares only the lengths of its files, since hashing a large index takes minutes. A flipped bit
  would give wrong results and no error, so it is looked for in the background.
"""

import asyncio
import hashlib
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from typing import BinaryIO

from app.search.errors import ImageUnavailableError
from dcar_core.images import sniff_format
from dcar_core.util.errors import ArtifactError, ImageError
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.storage import Directory, read_files

PIECE_BYTES = 64 * 2**10
_IDLE = 3.0  # seconds of sleep per second of reading and hashing


class ImageFile:
    """An opened image file.

    Attributes:
        digest: of the whole file, 32 hexadecimal digits.
        size: in bytes.
    """

    def __init__(self, artifact: IndexVersion, row: int) -> None:
        """Open and hash the image of a row. Raise ImageUnavailableError if there is none that may be served."""
        self._reading: Future[bytes] | None = None
        try:
            self._file, self.size = artifact.open_image(row)
            with ExitStack() as stack:
                stack.callback(self._file.close)
                self._inspect(self._file)
                if self.size > PIECE_BYTES:
                    stack.pop_all()  # the other pieces are read later
        except (ArtifactError, ImageError, OSError):
            raise ImageUnavailableError from None

    def _inspect(self, file: BinaryIO) -> None:
        begin = file.tell()
        self._start = file.read(min(self.size, PIECE_BYTES))
        image_format = sniff_format(self._start)
        if image_format is None:
            raise ImageUnavailableError
        self.media_type = f"image/{image_format}"
        digest, left = hashlib.blake2b(self._start, digest_size=16), self.size - len(self._start)
        while left > 0 and (piece := file.read(min(left, PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
        self.digest = digest.hexdigest()
        file.seek(begin + len(self._start))

    async def pieces(self, threads: Executor) -> AsyncIterator[bytes]:
        """Yield the file piece by piece. Raise ImageUnavailableError if it has become shorter meanwhile."""
        piece, left = self._start, self.size
        self._start = b""
        while True:
            yield piece
            left -= len(piece)
            if left <= 0:
                return
            self._reading = threads.submit(self._file.read, min(left, PIECE_BYTES))
            piece = await asyncio.wrap_future(self._reading)
            if not piece:
                raise ImageUnavailableError

    def close(self) -> None:
        """Close the file, after a read that a cancelled caller has left in a thread."""
        if self._reading is None:
            self._file.close()
        else:
            self._reading.add_done_callback(lambda _: self._file.close())


def find_damage(artifact: IndexVersion, is_served: Callable[[], bool]) -> str | None:
    """Return which file differs from its checksum or cannot be read; None if all are whole.

    Run it in a thread of its own, whose priority it lowers. It ends early, with None, once `is_served` returns False.
    """

    if sys.platform == "linux":  # where a priority may be that of one thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    started = time.perf_counter()
    try:
        for _ in read_files(Directory(artifact.index), artifact.manifest, set()):
            if not is_served():
                return None
            time.sleep(_IDLE * (time.perf_counter() - started))  # a quarter of the time of one core and of the disk
            started = time.perf_counter()
    except ArtifactError as error:
        return str(error) if is_served() else None  # an old version may have been deleted meanwhile
    return None
