"""What looks at a query together with each of some results: re-ranking, and explaining.

- Re-ranking encodes the query once for every candidate, with DCAR's exact weights for that pair, and compares it with
  the candidate's vector again. Every candidate is treated alike; one whose picture is gone fails the request.
- A word's weight is what the model's head predicts from the text; for a result it is the exact one of the pair.
- A picture's relevance map is measured: how much the score falls when a part of it is blanked. It needs nothing but the
  encoder, and holds for whatever the query consists of.

The model itself is loaded when the first query needs it: see `Snapshot.pairs`.

A candidate's feature from the frozen image encoder is computed from its picture at first need and kept for the
version's life: see `Snapshot.frozen`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.batching import Vector
from app.embedding import Embedder, Pixels
from app.finding import Hit, vectors_of
from app.problems import Problem
from app.snapshots import Snapshot
from dcar_core.errors import ArtifactError, DcarError, ImageError

if TYPE_CHECKING:
    from dcar_core.pairs import Pairs

Words = list[tuple[str, float]]

PARTS = 6  # a map has at most so many parts a side
_KEPT = 40 * 2**20  # bytes of features: 20,000 of 512 dimensions, fewer where each patch has one


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one result. relevance: what each patch adds to the score, row by row; words: None without a text."""

    relevance: list[list[float]]
    words: Words | None


class Pairing:
    """Works with the embedder's threads."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def rerank(self, snapshot: Snapshot, text: str, hits: Sequence[Hit]) -> list[Hit]:
        """The same hits, scored and sorted by the exact pair weights.

        Raises:
            Problem: the model knows no token weights, or a picture is gone.
        """
        if not snapshot.encoder.domain.weighs:
            raise Problem(409, "This model was trained without token weights, so there is nothing to re-rank by.")
        if not hits:
            return []
        pairs = await _pairs(snapshot)
        frozen = await self._frozen(snapshot, [hit.row for hit in hits])  # [C, E]
        factors = await self._embedder.with_model(pairs.weights, text, frozen)  # [C, n]
        texts = await self._embedder.weighted(snapshot, text, factors)  # [C, E]
        images = await asyncio.to_thread(vectors_of, snapshot, [hit.row for hit in hits])  # [C, E]
        scores = np.einsum("ce,ce->c", texts, images)
        scored = [replace(hit, reranked=float(score)) for hit, score in zip(hits, scores, strict=True)]
        return sorted(scored, key=lambda hit: -(hit.reranked or 0.0))

    async def words(self, snapshot: Snapshot, text: str) -> Words:
        """The query's words with the weights that the text alone gives them."""
        pairs = await _pairs(snapshot)
        factors = await self._embedder.with_model(pairs.predicted, text)
        return pairs.words(text, factors)

    async def explain(self, snapshot: Snapshot, text: str, vector: Vector, hit: Hit) -> Explanation:
        """Why a result has its score: by the query's vector (E,), and by its words if it has any."""
        (pixels,) = await self._pictures(snapshot, [hit.row])
        parts, part_of = blanked(pixels, snapshot.encoder.preprocess.blank(), snapshot.encoder.domain.patches)
        whole, *without = await self._embedder.pixels(snapshot, [pixels, *parts])
        falls = np.array([float(vector @ (whole - each)) for each in without])
        words = None
        if text and snapshot.encoder.domain.weighs:
            pairs = await _pairs(snapshot)
            frozen = await self._frozen(snapshot, [hit.row])
            factors = await self._embedder.with_model(pairs.weights, text, frozen)
            words = pairs.words(text, factors[0])
        return Explanation(np.round(falls[part_of], 4).tolist(), words)

    async def _frozen(self, snapshot: Snapshot, rows: Sequence[int]) -> Vector:
        kept = snapshot.frozen
        known = {row: kept[row] for row in rows if row in kept}  # what others let go of meanwhile is still here
        missing = [row for row in rows if row not in known]
        if missing:
            pixels = await self._pictures(snapshot, missing)
            pairs = await _pairs(snapshot)
            features = await self._embedder.with_model(pairs.frozen, np.stack(pixels))
            found = dict(zip(missing, features, strict=True))
            known |= found
            kept.update(found)
            most = _KEPT // features[0].nbytes
            while len(kept) > most:
                del kept[next(iter(kept))]
        return np.stack([known[row] for row in rows])

    async def _pictures(self, snapshot: Snapshot, rows: Sequence[int]) -> list[Pixels]:
        async def picture(row: int) -> Pixels:
            data = await asyncio.to_thread(snapshot.artifact.image_bytes, row)
            return await self._embedder.decode(data, snapshot.encoder.preprocess)

        try:
            return await asyncio.gather(*map(picture, rows))
        except (ArtifactError, ImageError, OSError):
            raise Problem(409, "This needs the results' pictures, and one is no longer in the gallery.") from None


async def _pairs(snapshot: Snapshot) -> "Pairs":
    try:
        return await asyncio.to_thread(snapshot.pairs)
    except DcarError as error:
        detail = f"This needs the model itself, and it cannot be loaded: {error}"
        raise Problem(503, detail, headers={"Retry-After": "30"}) from None


def blanked(pixels: Pixels, blank: Pixels, patches: int) -> tuple[list[Pixels], NDArray[np.int64]]:
    """The picture (3, S, S) with each part of it in turn taken from the blank one; parts consist of whole patches.

    Returns:
        the pictures, and the number of its part for each patch, int64 (patches, patches).
    """
    size = pixels.shape[1]
    edges = np.linspace(0, patches, min(PARTS, patches) + 1).round().astype(int)
    part_of = np.empty((patches, patches), np.int64)
    pictures: list[Pixels] = []
    for top, bottom in pairwise(edges):
        for left, right in pairwise(edges):
            part_of[top:bottom, left:right] = len(pictures)
            area = (
                slice(None),
                slice(size * top // patches, size * bottom // patches),
                slice(size * left // patches, size * right // patches),
            )
            picture = pixels.copy()
            picture[area] = blank[area]
            pictures.append(picture)
    return pictures, part_of
