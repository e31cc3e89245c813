"""Image files of the gallery, sent in pieces: a response holds one piece in memory, however slowly it is read."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import suppress
from typing import BinaryIO

from app.search.errors import ImageUnavailableError
from dcar_core.images import sniff_format
from dcar_core.util.errors import ArtifactError, ImageError
from index_jobs.store.artifact import Artifact

PIECE_BYTES = 64 * 2**10


class GalleryImage:
    """An opened image file.

    Attributes:
        digest: of the whole file, 32 hexadecimal digits.
        size: in bytes.
    """

    def __init__(self, artifact: Artifact, row: int) -> None:
        """Open and hash the image of a row. Raise ImageUnavailableError if there is none that may be served."""
        try:
            self._file, self.size = artifact.open_image(row)
            try:
                self._inspect(self._file)
            except BaseException:
                self._file.close()
                raise
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
        if self.size <= PIECE_BYTES:
            file.close()
        else:
            file.seek(begin + PIECE_BYTES)

    async def pieces(self, threads: Executor) -> AsyncIterator[bytes]:
        """Yield the file piece by piece. Raise ImageUnavailableError if it has become shorter meanwhile."""
        loop, piece, left = asyncio.get_running_loop(), self._start, self.size
        while True:
            yield piece
            left -= len(piece)
            if left <= 0:
                return
            piece = await loop.run_in_executor(threads, self._file.read, min(left, PIECE_BYTES))
            if not piece:
                raise ImageUnavailableError

    def close(self, threads: Executor) -> None:
        """Close the file, after a read that a cancelled caller has left in a thread."""
        if not self._file.closed:
            with suppress(RuntimeError):  # the threads end with the service
                threads.submit(self._file.close)
