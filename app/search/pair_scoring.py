"""Re-ranking and explanation of (query, result) pairs.

- Re-ranking scores the query with each candidate's image again, by the model's second stage. A candidate without its
  image keeps its score and comes after the others.
- Explanations are measured, and need only the encoder: how much the score falls when a part of the image is blanked, or
  when a word of the query is left out.
- Images are encoded in small chunks, one at a time for all requests, so other queries get their turn.
- The first query that needs the full model loads it. What a candidate's image gives, whatever the query, is cached.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import pairwise, product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.search.compute import Compute
from app.search.errors import UnavailableError, UnsupportedQueryError, without_directories
from app.search.query import Match, ObjectFit
from app.search.rows import row_vectors
from app.search.snapshots import Snapshot
from dcar_core.serving.encoder import ImageRow, TextRow
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import DcarError, MissingExtraError

logger = logging.getLogger(__name__)

T = TypeVar("T", Pixels, Floats)

MAX_PARTS = 6  # of a relevance map, in each direction
MAX_FEATURE_BYTES = 40 * 2**20  # of cached features: 540 images of a ViT-B/32
_MAX_WORDS = 32  # of a query, of which the effect is measured
_CHUNK = 4  # images of one forward pass, so other queries wait for a short one only
_FITS: dict[str, ObjectFit] = {"shortest": "cover", "squash": "fill", "longest": "contain"}  # by `Preprocess.resize`
_NO_IMAGES = "This query needs the images of its results, and none of them is in the gallery any more."


async def rerank(compute: Compute, snapshot: Snapshot, text: str, ranked: Sequence[Match]) -> list[Match]:
    """Return the same matches, scored and sorted by the second stage.

    Raises:
        UnsupportedQueryError: every image is missing, or PyTorch is not installed.
        UnavailableError: the full model cannot be loaded.
    """
    if not ranked:
        return []
    stage = await _second_stage(compute, snapshot)
    features = await _image_features(compute, snapshot, stage, [match.row for match in ranked])
    if not features:
        raise UnsupportedQueryError(_NO_IMAGES)
    second = await _in_chunks(
        compute, lambda chunk: compute.run("model", stage.query_scores, text, np.stack(chunk)), list(features.values())
    )
    added = dict(zip(features, map(float, second), strict=True))
    for match in ranked:
        match.rerank_score = match.score + added[match.row] if match.row in added else None
    return sorted(ranked, key=lambda match: math.inf if match.rerank_score is None else -match.rerank_score)


async def explain(compute: Compute, snapshot: Snapshot, text: str, vector: Floats, page: Sequence[Match]) -> None:
    """Explain the scores of matches by the vector (E,) of the query, and by the words of its text.

    Raise UnsupportedQueryError if every image is missing.
    """
    effects = await _word_effects(compute, snapshot, text, [match.row for match in page])
    for match, words in zip(page, effects, strict=True):  # one after the other: other queries get their turn
        relevance = await _relevance(compute, snapshot, vector, match.row)
        if relevance is not None:
            match.explanation = {"relevance": relevance, "fit": _FITS[snapshot.preprocess.resize], **words}
    if page and not any(match.explanation for match in page):
        raise UnsupportedQueryError(_NO_IMAGES)


async def _word_effects(compute: Compute, snapshot: Snapshot, text: str, rows: list[int]) -> list[dict[str, Any]]:
    """Return the fall of each row's similarity to the text when a word is left out; nothing for a single word."""
    words = text.split()
    places = range(min(len(words), _MAX_WORDS))
    if len(words) < 2 or not rows:
        return [{} for _ in rows]
    shorter = [" ".join(words[:place] + words[place + 1 :]) for place in places]
    whole, *without = await compute.texts([TextRow(snapshot.encoder, each) for each in (text, *shorter)])
    images = await compute.run("search", row_vectors, snapshot.artifact, rows)  # [C, E]
    falls = images @ (whole - np.stack(without)).T  # [C, n]
    return [
        {"words": [{"word": word, "effect": effect} for word, effect in zip(words, fall, strict=False)]}
        for fall in falls.astype(float).round(4).tolist()
    ]


async def _relevance(compute: Compute, snapshot: Snapshot, vector: Floats, row: int) -> list[list[float]] | None:
    """Return the fall of the score when a part is blanked, for each patch; None if the image is missing."""
    pixels = (await compute.gallery_pixels(snapshot, [row])).get(row)
    if pixels is None:
        return None
    encoder = snapshot.encoder
    variants, part_of_patch = await compute.run(
        "search", blank_parts, pixels, encoder.preprocess.blank(), encoder.state.patch_grid
    )
    original, *blanked = await _in_chunks(
        compute, lambda chunk: compute.pixels([ImageRow(encoder, each) for each in chunk]), [pixels, *variants]
    )
    falls = np.array([float(vector @ (original - each)) for each in blanked])
    relevance: list[list[float]] = np.round(falls[part_of_patch], 4).tolist()
    return relevance


async def _image_features(compute: Compute, snapshot: Snapshot, stage: Any, rows: Sequence[int]) -> dict[int, Floats]:
    """Return the `image_features` of the rows whose images exist, by row and in their order."""
    cache = snapshot.image_features
    features = {row: cache[row] for row in rows if row in cache}  # the cache may drop them during the await below
    images = await compute.gallery_pixels(snapshot, [row for row in rows if row not in features])
    computed = await _in_chunks(
        compute, lambda chunk: compute.run("model", stage.image_features, np.stack(chunk)), list(images.values())
    )
    for row, feature in zip(images, computed, strict=True):
        features[row], cache.size = feature, MAX_FEATURE_BYTES // feature.nbytes
        cache.keep(row, feature)
    return {row: features[row] for row in rows if row in features}


async def _in_chunks(
    compute: Compute, encode: Callable[[list[T]], Awaitable[Iterable[Floats]]], images: list[T]
) -> list[Floats]:
    vectors: list[Floats] = []
    for start in range(0, len(images), _CHUNK):
        async with compute.chunk_turn():
            vectors.extend(await encode(images[start : start + _CHUNK]))
    return vectors


async def _second_stage(compute: Compute, snapshot: Snapshot) -> Any:
    """Return the snapshot's `SecondStage`."""
    try:
        return await compute.run("load", lambda: snapshot.second_stage)  # may load the model
    except MissingExtraError as error:
        raise UnsupportedQueryError(f"This service runs without PyTorch: {error}; or leave `rerank` out.") from None
    except DcarError as error:
        index = snapshot.artifact.index
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
