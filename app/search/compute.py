"""Where a search computes: `Compute` does it at once, in the calling thread.

The service has another: it batches the model's work of all requests, and has caches and threads.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

from app.core.metrics import Stage
from app.search.query import Crop
from app.search.snapshots import Snapshot
from dcar_core.images import OpenedImage
from dcar_core.serving.encoder import ImageRow, TextRow, encode_image_rows, encode_text_rows
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, ImageError

T = TypeVar("T")
Place = Literal["search", "filter", "model", "load"]  # kinds of blocking work


class Compute:
    """What a search awaits; nothing else. chunk_turn: held while one chunk of many images is in the model's queue.

    encoded: vectors (E,) of normalized texts that were encoded before, in one batch.
    """

    chunk_turn: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext
    encoded: Mapping[str, Floats] = {}

    async def texts(self, rows: Sequence[TextRow]) -> list[Floats]:
        """Return the vectors (E,) of normalized texts. Not cached."""
        return list(encode_text_rows(rows)) if rows else []

    async def pixels(self, rows: Sequence[ImageRow]) -> list[Floats]:
        """Return the vectors (E,) of decoded images. Not cached."""
        return list(encode_image_rows(rows))

    async def query_texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[tuple[Floats, bool]]:
        """Return the vectors (E,) of normalized texts, each with True if it was cached."""
        found = {**self.encoded}
        new = [TextRow(snapshot.encoder, text) for text in texts if text not in found]
        found |= {row.text: vector for row, vector in zip(new, await self.texts(new), strict=True)}
        return [(found[text], False) for text in texts]

    async def image(self, snapshot: Snapshot, data: bytes, crop: Crop | None = None) -> tuple[Floats, bool]:
        """Return the vector (E,) of an image file, or of a part of it, and True if it was cached. Raise ImageError."""
        preprocess, opened = snapshot.preprocess, OpenedImage(data)
        decoded = preprocess.decoder(None if crop is None else crop.box)(opened)
        (vector,) = await self.pixels([ImageRow(snapshot.encoder, preprocess.finish(decoded))])
        return vector, False

    async def gallery_pixels(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Pixels]:
        """Return the images that are still in the gallery, by row and in their order."""
        found: dict[int, Pixels] = {}
        for row in rows:
            try:
                found[row] = snapshot.encoder.preprocess(snapshot.artifact.image_bytes(row))
            except (ArtifactError, ImageError, OSError):
                continue
        return found

    async def run(self, place: Place, call: Callable[..., T], *args: Any) -> T:
        """Return what a call returns that blocks."""
        return call(*args)

    def timed(self, stage: Stage) -> AbstractContextManager[None]:
        """Measure a stage of the search."""
        return nullcontext()
