"""What looks at a query together with each of some results: re-ranking, and explaining.

- Re-ranking encodes the query once for every candidate, with DCAR's exact weights for that pair, and compares it with
  the candidate's vector again. Every candidate is treated alike, but one whose picture is gone keeps its score and
  comes after the others; it has no map either.
- A word's weight is what the model's head predicts from the text; for a result it is the exact one of the pair.
- A picture's relevance map is measured: how much the score falls when a part of it is blanked. It needs nothing but the
  encoder, and holds for whatever the query consists of.

The model itself is loaded when the first query needs it: see `Snapshot.pairs`.

A candidate's feature from the frozen image encoder is computed from its picture at first need and kept for the
version's life: see `Snapshot.frozen`.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from app.core.problems import Problem
from app.core.threads import in_own_thread
from app.search.batching import Vector
from app.search.embedding import Embedder
from app.search.ranking import Hit, vectors_of
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Pixels
from dcar_core.util.errors import ArtifactError, DcarError, ImageError

if TYPE_CHECKING:
    from dcar_core.serving.pair_weights import PairWeights

Fit = Literal["cover", "fill", "contain"]
Words = list[tuple[str, float]]

_FITS: dict[str, Fit] = {"shortest": "cover", "squash": "fill", "longest": "contain"}  # by `Preprocess.resize`

PARTS = 6  # a map has at most so many parts a side
_KEPT = 40 * 2**20  # bytes of features: 20,000 of 512 dimensions, fewer where each patch has one


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one result. relevance: what each patch adds to the score, row by row; words: None without a text.

    fit: how a square shows of the picture what the model sees, in CSS's words.
    """

    relevance: list[list[float]]
    fit: Fit
    words: Words | None


class Pairing:
    """Works with the embedder's threads, and reads the gallery's pictures in those that are given."""

    def __init__(self, embedder: Embedder, reading: Executor) -> None:
        self._embedder = embedder
        self._reading = reading

    async def rerank(self, snapshot: Snapshot, text: str, hits: Sequence[Hit]) -> list[Hit]:
        """The same hits, scored and sorted by the exact pair weights.

        Raises:
            Problem: the model knows no token weights, or every picture is gone.
        """
        if not snapshot.encoder.adapter.uses_token_weights:
            raise Problem(409, "This model was trained without token weights, so there is nothing to re-rank by.")
        if not hits:
            return []
        pairs = await _pairs(snapshot)
        frozen = await self._frozen(snapshot, [hit.row for hit in hits])
        there, gone = [hit for hit in hits if hit.row in frozen], [hit for hit in hits if hit.row not in frozen]
        if not there:
            raise _no_pictures()
        factors = await self._embedder.with_model(pairs.factors, text, np.stack(list(frozen.values())))  # [C, n]
        texts = await self._embedder.weighted(snapshot, text, factors)  # [C, E]
        images = await asyncio.to_thread(vectors_of, snapshot, [hit.row for hit in there])  # [C, E]
        scores = np.einsum("ce,ce->c", texts, images)
        scored = [replace(hit, reranked=float(score)) for hit, score in zip(there, scores, strict=True)]
        return sorted(scored, key=lambda hit: -(hit.reranked or 0.0)) + gone

    async def words(self, snapshot: Snapshot, text: str) -> Words:
        """The query's words with the weights that the text alone gives them."""
        pairs = await _pairs(snapshot)
        factors = await self._embedder.with_model(pairs.predicted_factors, text)
        return pairs.word_factors(text, factors)

    async def explain(
        self, snapshot: Snapshot, text: str, vector: Vector, hits: Sequence[Hit]
    ) -> list[Explanation | None]:
        """Why results have their scores: by the query's vector (E,), and by its words if it has any.

        Raises:
            Problem: every picture is gone.
        """
        explained = []
        for hit in hits:  # one after the other: others get their turn
            explained.append(await self._explained(snapshot, text, vector, hit))
        if hits and not any(explained):
            raise _no_pictures()
        return explained

    async def _explained(self, snapshot: Snapshot, text: str, vector: Vector, hit: Hit) -> Explanation | None:
        pixels = (await self._pictures(snapshot, [hit.row])).get(hit.row)
        if pixels is None:
            return None
        parts, part_of = blanked(pixels, snapshot.encoder.preprocess.blank(), snapshot.encoder.adapter.patch_grid)
        whole, *without = await self._embedder.pixels(snapshot, [pixels, *parts])
        falls = np.array([float(vector @ (whole - each)) for each in without])
        words = None
        if text and snapshot.encoder.adapter.uses_token_weights:
            pairs = await _pairs(snapshot)
            frozen = (await self._frozen(snapshot, [hit.row])).get(hit.row)
            if frozen is None:
                return None
            factors = await self._embedder.with_model(pairs.factors, text, frozen[None])
            words = pairs.word_factors(text, factors[0])
        return Explanation(np.round(falls[part_of], 4).tolist(), _FITS[snapshot.preprocess.resize], words)

    async def _frozen(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Vector]:
        """By row, in their order, the frozen features of those whose pictures are there."""
        kept = snapshot.frozen
        known = {row: kept[row] for row in rows if row in kept}  # what others let go of meanwhile is still here
        missing = [row for row in rows if row not in known]
        pixels = await self._pictures(snapshot, missing)
        if pixels:
            pairs = await _pairs(snapshot)
            features = await self._embedder.with_model(pairs.image_features, np.stack(list(pixels.values())))
            found = dict(zip(pixels, features, strict=True))
            known |= found
            kept.update(found)
            most = _KEPT // features[0].nbytes
            while len(kept) > most:
                del kept[next(iter(kept))]
        return {row: known[row] for row in rows if row in known}

    async def _pictures(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Pixels]:
        """By row, in their order, the pictures that are still in the gallery."""

        async def picture(row: int) -> Pixels | None:
            try:
                read = asyncio.get_running_loop().run_in_executor(self._reading, snapshot.artifact.image_bytes, row)
                data = await read
                return await self._embedder.decode(data, snapshot.encoder.preprocess)
            except (ArtifactError, ImageError, OSError):
                return None

        found = zip(rows, await asyncio.gather(*map(picture, rows)), strict=True)
        return {row: pixels for row, pixels in found if pixels is not None}


def _no_pictures() -> Problem:
    return Problem(409, "This needs the results' pictures, and none of them is in the gallery any more.")


async def _pairs(snapshot: Snapshot) -> "PairWeights":
    try:
        return await in_own_thread(snapshot.pairs)  # which may have to load the model first
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
