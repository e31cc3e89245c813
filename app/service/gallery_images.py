"""Images of items: their files in the gallery, read in pieces, and thumbnails.

- A response holds one piece of a file in memory, however slowly it is read.
- Thumbnails are made by the processes that decode images, and cached on disk.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future
from functools import partial
from typing import BinaryIO

from app.core.settings import Settings
from app.core.thumbnail_cache import ThumbnailCache
from app.search.errors import ImageUnavailableError
from app.search.plan import row_of
from app.search.snapshots import Snapshot
from app.service.batching import Admission
from app.service.compute import SharedCompute
from dcar_core.images import sniff_format
from dcar_core.images.decoding import ThumbnailFormat, make_thumbnail
from dcar_core.util.errors import ArtifactError, ImageError, ImageFault
from dcar_core.util.files import default_cache_directory
from index_jobs.store.artifact import Artifact

PIECE_BYTES = 64 * 2**10


class ImageFile:
    """An opened image file.

    Attributes:
        digest: of the whole file, 32 hexadecimal digits.
        size: in bytes.
    """

    def __init__(self, artifact: Artifact, row: int) -> None:
        """Open and hash the image of a row. Raise ImageUnavailableError if there is none that may be served."""
        try:
            self._file, self.size = artifact.open_image(row)
            self._reading: Future[bytes] | None = None
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


class ItemImages:
    """Opens the images of items, and makes their thumbnails."""

    def __init__(self, settings: Settings, compute: SharedCompute, admission: Admission) -> None:
        self._decode = compute.decode
        self._admission = admission
        self.threads = compute.image_threads
        folder = settings.thumbnail_cache or default_cache_directory() / "thumbnails"
        self._thumbnails = ThumbnailCache(folder, settings.thumbnail_cache_bytes)

    async def open(self, snapshot: Snapshot, item_id: str) -> ImageFile:
        """Open the image of an item, which the caller closes.

        Raises:
            ItemNotFoundError: no item has this id.
            ImageUnavailableError: the gallery has no image there that may be served.
        """
        row = row_of(snapshot, item_id)
        async with self._admission(kind="pictures"):
            opening = self.threads.submit(ImageFile, snapshot.artifact, row)
            try:
                return await asyncio.wrap_future(opening)
            except asyncio.CancelledError:  # the thread continues and opens the file
                opening.add_done_callback(self._close)
                raise

    @staticmethod
    def _close(opening: Future[ImageFile]) -> None:
        if not (opening.cancelled() or opening.exception()):
            opening.result().close()

    async def check(self, snapshot: Snapshot, data: bytes) -> None:
        """Decode an image file that is to become an item's, within the limits of query images and of index jobs.

        Raises:
            ImageError: the file cannot be read; the message is the reason.
        """
        async with self._admission(kind="pictures"):
            await self._decode(data, snapshot.encoder.preprocess.decode, is_query=True)

    async def thumbnail(
        self, snapshot: Snapshot, item_id: str, side: int, thumbnail_format: ThumbnailFormat
    ) -> tuple[str, bytes]:
        """Return a name that changes with an item's image, and a thumbnail of it, from the cache or made now.

        An image that takes too much memory to decode is returned as it is.

        Args:
            side: pixels that its longer side has at most.

        Raises:
            ItemNotFoundError: no item has this id.
            ImageUnavailableError: the gallery has no image there that may be served, or it cannot be decoded.
        """
        row, artifact = row_of(snapshot, item_id), snapshot.artifact
        loop = asyncio.get_running_loop()

        def read() -> tuple[str, bytes | None, bytes | None]:
            name = f"{artifact.image_key(row)}_{side}.{thumbnail_format}"
            data = self._thumbnails.get(name)
            return name, data, None if data else artifact.image_bytes(row)

        try:
            async with self._admission(kind="pictures"):
                name, data, source = await loop.run_in_executor(self.threads, read)
                if source is not None:
                    make = partial(make_thumbnail, side=side, thumbnail_format=thumbnail_format)
                    data = await self._decode(source, make)
                    await loop.run_in_executor(self.threads, self._thumbnails.put, name, data)
        except ImageError as error:
            if error.fault != ImageFault.TOO_LARGE or source is None:
                raise ImageUnavailableError from None
            data = source
        except (ArtifactError, OSError):
            raise ImageUnavailableError from None
        assert data is not None
        return name, data
