"""Re-ranking and explanation of (query, result) pairs.

- Re-ranking encodes the query once for each candidate, with DCAR's exact weights for the pair, and compares it with the
  vector of the candidate again. A candidate without its image keeps its score and comes after the others.
- Explanations are measured, and need only the encoder: how much the score falls when a part of the image is blanked, or
  when a word of the query is left out.
- Images are encoded in small chunks, one at a time for all requests, so other queries get their turn.
- The full model is loaded by the first query that needs it: see `Snapshot.pair_weights`.
- The feature that the frozen image encoder has for a candidate is computed once and cached: see `Snapshot.frozen`.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.search.compute import Compute
from app.search.errors import UnavailableError, UnsupportedQueryError, without_directories
from app.search.query import Explanation, ObjectFit, WordEffects
from app.search.ranking.rank import RankedRow
from app.search.ranking.rows import row_vectors
from app.search.snapshots import Snapshot, drop_oldest
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import DcarError

if TYPE_CHECKING:
    from dcar_core.serving.pair_weights import PairWeights

logger = logging.getLogger(__name__)

MAX_PARTS = 6  # of a relevance map, in each direction
_MAX_WORDS = 32  # of a query, of which the effect is measured
_CHUNK = 4  # images of one forward pass, so other queries wait for a short one only
_FITS: dict[str, ObjectFit] = {"shortest": "cover", "squash": "fill", "longest": "contain"}  # by `Preprocess.resize`
_NO_IMAGES = "This query needs the images of its results, and none of them is in the gallery any more."
_MAX_FROZEN_BYTES = 40 * 2**20  # of cached features: 20,000 of 512 dimensions


async def rerank(compute: Compute, snapshot: Snapshot, text: str, ranked: Sequence[RankedRow]) -> list[RankedRow]:
    """Return the same rows, scored and sorted by the exact pair weights.

    Raises:
        UnsupportedQueryError: the model was trained without token weights, or every image is missing.
        UnavailableError: the full model cannot be loaded.
    """
    if not snapshot.encoder.state.uses_token_weights:
        raise UnsupportedQueryError(
            "This model was trained without token weights, so it cannot re-rank. Leave `rerank` out, or train with "
            "`--method dcar+`."
        )
    if not ranked:
        return []
    pairs = await _pair_weights(compute, snapshot)
    frozen = await _frozen_features(compute, snapshot, [each.row for each in ranked])
    candidates = [each for each in ranked if each.row in frozen]
    if not candidates:
        raise UnsupportedQueryError(_NO_IMAGES)
    features = np.stack(list(frozen.values()))
    factors = await compute.run("model", pairs.factors, text, features)  # [C, n]
    texts = await compute.weighted_text(snapshot, text, factors)  # [C, E]
    rows = [each.row for each in candidates]
    images = await compute.run("search", row_vectors, snapshot.artifact, rows)  # [C, E]
    scores = np.einsum("ce,ce->c", texts, images)
    scored = [replace(each, rerank_score=float(score)) for each, score in zip(candidates, scores, strict=True)]
    scored.sort(key=lambda each: -(each.rerank_score or 0.0))
    return scored + [each for each in ranked if each.row not in frozen]


async def explain(
    compute: Compute, snapshot: Snapshot, text: str, vector: Floats, ranked: Sequence[RankedRow]
) -> list[Explanation | None]:
    """Explain the scores of results by the vector (E,) of the query, and by the words of its text.

    Raises:
        UnsupportedQueryError: every image is missing.
    """
    effects = await _word_effects(compute, snapshot, text, [each.row for each in ranked])
    # One after the other: other queries get their turn.
    explanations = [
        await _explain_row(compute, snapshot, vector, each.row, words)
        for each, words in zip(ranked, effects, strict=True)
    ]
    if ranked and not any(explanations):
        raise UnsupportedQueryError(_NO_IMAGES)
    return explanations


async def _word_effects(compute: Compute, snapshot: Snapshot, text: str, rows: list[int]) -> list[WordEffects | None]:
    """Return the fall of each row's similarity to the text when a word is left out; None for a single word."""
    words = text.split()
    places = range(min(len(words), _MAX_WORDS))
    if len(words) < 2 or not rows:
        return [None] * len(rows)
    shorter = [" ".join(words[:place] + words[place + 1 :]) for place in places]
    whole, *without = await compute.texts(snapshot, [text, *shorter])
    images = await compute.run("search", row_vectors, snapshot.artifact, rows)  # [C, E]
    falls = images @ (whole - np.stack(without)).T  # [C, n]
    return [[(words[place], float(fall[place])) for place in places] for fall in falls]


async def _explain_row(
    compute: Compute, snapshot: Snapshot, vector: Floats, row: int, words: WordEffects | None
) -> Explanation | None:
    """Return None if the image of the row is missing."""
    pixels = (await compute.gallery_pixels(snapshot, [row])).get(row)
    if pixels is None:
        return None
    encoder = snapshot.encoder
    variants, part_of_patch = await compute.run(
        "search", blank_parts, pixels, encoder.preprocess.blank(), encoder.state.patch_grid
    )
    original, *blanked = await _in_chunks(compute, partial(compute.pixels, snapshot), [pixels, *variants])
    falls = np.array([float(vector @ (original - each)) for each in blanked])
    return Explanation(np.round(falls[part_of_patch], 4).tolist(), _FITS[snapshot.preprocess.resize], words)


async def _frozen_features(compute: Compute, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Floats]:
    """Return the frozen features of the rows whose images exist, by row and in their order."""
    cache = snapshot.frozen
    features = {row: cache[row] for row in rows if row in cache}  # the cache may drop them during the await below
    images = await compute.gallery_pixels(snapshot, [row for row in rows if row not in features])
    if images:
        features_of = (await _pair_weights(compute, snapshot)).image_features
        computed = await _in_chunks(
            compute, lambda chunk: compute.run("model", features_of, np.stack(chunk)), list(images.values())
        )
        new = dict(zip(images, computed, strict=True))
        features |= new
        cache.update(new)
        drop_oldest(cache, _MAX_FROZEN_BYTES // computed[0].nbytes)
    return {row: features[row] for row in rows if row in features}


async def _in_chunks(
    compute: Compute, encode: Callable[[list[Pixels]], Awaitable[Iterable[Floats]]], images: list[Pixels]
) -> list[Floats]:
    vectors: list[Floats] = []
    for start in range(0, len(images), _CHUNK):
        async with compute.chunk_turn:
            vectors.extend(await encode(images[start : start + _CHUNK]))
    return vectors


async def _pair_weights(compute: Compute, snapshot: Snapshot) -> "PairWeights":
    try:
        return await compute.run("load", snapshot.pair_weights)  # may load the model
    except DcarError as error:
        index = snapshot.artifact.path.parents[1]
        logger.error("cannot load the full model of %s: %s", index, error)
        message = f"This query needs the full model, which cannot be loaded: {without_directories(str(error), index)}"
        raise UnavailableError(message, retry_after_s=30) from None


def blank_parts(pixels: Pixels, blank: Pixels, patches: int) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Blank each part of an image in turn. A part consists of whole patches.

    Args:
        pixels, blank: (3, S, S).
        patches: number of patches in each direction.

    Returns:
        One image (3, S, S) for each part, and the number of the part of each patch: int64 (patches, patches).
    """
    size = pixels.shape[1]
    edges = np.linspace(0, patches, min(MAX_PARTS, patches) + 1).round().astype(int)
    spans = [slice(start, end) for start, end in pairwise(size * edges // patches)]  # pixels of the parts
    images: list[Pixels] = []
    for rows, columns in product(spans, spans):
        image = pixels.copy()
        image[:, rows, columns] = blank[:, rows, columns]
        images.append(image)
    part = np.repeat(np.arange(len(spans)), np.diff(edges))  # of each patch in one direction
    return images, part[:, None] * len(spans) + part
