"""Where a search computes: `Compute` is what a search needs, and `Direct` computes in the calling thread.

The service has another: it batches the model's work of all requests, and has caches and threads.
"""

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from app.core.metrics import Stage
from app.search.query import Crop
from app.search.snapshots import Snapshot
from dcar_core.images import OpenedImage
from dcar_core.model.preprocess import decode_part
from dcar_core.serving.multi_encoder_batch import TextRow, encode_text_rows
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, ImageError

T = TypeVar("T")
Place = Literal["search", "filter", "model", "load"]  # kinds of blocking work


class Compute(Protocol):
    """What a search awaits; nothing else."""

    @property
    def chunk_turn(self) -> AbstractAsyncContextManager[Any]:
        """Held while a chunk of a long series of images is in the model's queue."""

    async def query_texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[tuple[Floats, bool]]:
        """Return the vectors (E,) of normalized texts, each with True if it was cached."""

    async def image(self, snapshot: Snapshot, data: bytes, crop: Crop | None) -> tuple[Floats, bool]:
        """Return the vector (E,) of an image file, or of a part of it, and True if it was cached.

        Raises:
            ImageError: the file cannot be read; the message is the reason.
        """

    async def texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[Floats]:
        """Return the vectors (E,) of normalized texts. Not cached."""

    async def weighted_text(self, snapshot: Snapshot, text: str, factors: Floats) -> Floats:
        """Return the vectors (C, E) of a text under C weightings of its tokens, factors (C, n)."""

    async def pixels(self, snapshot: Snapshot, images: Sequence[Pixels]) -> list[Floats]:
        """Return the vectors (E,) of decoded images."""

    async def gallery_pixels(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Pixels]:
        """Return the images that are still in the gallery, by row and in their order."""

    async def run(self, place: Place, call: Callable[..., T], *args: Any) -> T:
        """Return what a call returns that blocks."""

    def timed(self, stage: Stage) -> AbstractContextManager[None]:
        """Measure a stage of the search."""


class Direct:
    """Compute at once, in the calling thread."""

    chunk_turn = nullcontext()

    async def query_texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[tuple[Floats, bool]]:
        return [(vector, False) for vector in await self.texts(snapshot, texts)]

    async def texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[Floats]:
        return list(snapshot.encoder.encode_text([*texts])) if texts else []

    async def image(self, snapshot: Snapshot, data: bytes, crop: Crop | None) -> tuple[Floats, bool]:
        preprocess, opened = snapshot.preprocess, OpenedImage(data)
        decoded = preprocess.decode(opened) if crop is None else decode_part(opened, preprocess, crop.box)
        return snapshot.encoder.encode_pixels(preprocess.finish(decoded)[None])[0], False

    async def weighted_text(self, snapshot: Snapshot, text: str, factors: Floats) -> Floats:
        return encode_text_rows([TextRow(snapshot.encoder, text, each) for each in factors])

    async def pixels(self, snapshot: Snapshot, images: Sequence[Pixels]) -> list[Floats]:
        return list(snapshot.encoder.encode_pixels(np.stack(images)))

    async def gallery_pixels(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Pixels]:
        found: dict[int, Pixels] = {}
        for row in rows:
            try:
                found[row] = snapshot.encoder.preprocess(snapshot.artifact.image_bytes(row))
            except (ArtifactError, ImageError, OSError):
                continue
        return found

    async def run(self, place: Place, call: Callable[..., T], *args: Any) -> T:
        return call(*args)

    def timed(self, stage: Stage) -> AbstractContextManager[None]:
        return nullcontext()


def finish(search: Coroutine[Any, Any, T]) -> T:
    """Run a search that uses `Direct` to its end, without an event loop.

    Raises:
        RuntimeError: it waits for something.
    """
    try:
        search.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    search.close()
    raise RuntimeError("a search with Direct waits for something")
