"""Re-ranking and explanation of (query, result) pairs.

- Re-ranking scores the query with each candidate's image again, by the model's second
  stage. A candidate without its image keeps its score and comes after the others.
- Explanations are measured, and need only the encoder: how much the score falls when a
  part of the image is blanked, or when a word of the query is left out.
- Images are encoded in small chunks, one at a time for all requests, so other queries
  get their turn.
- The first query that needs the full model loads it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise, product
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic needs these before Python 3.12
    TypeVar,
)

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from app.search.errors import UnsupportedQueryError
from app.search.hits import Hits
from app.search.query import Plan
from app.search.served_version import ServedVersion, row_vectors
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, ImageError, MissingExtraError

T = TypeVar("T")
ObjectFit = Literal["cover", "fill", "contain"]  # values of CSS's object-fit

MAX_PARTS = 6  # of a relevance map, in each direction
_MAX_WORDS = 32  # of a query, of which the effect is measured
_CHUNK = 4  # images of one forward pass, so other queries wait for a short one only
# by `Preprocess.resize`
_FITS: dict[str, ObjectFit] = {
    "shortest": "cover",
    "squash": "fill",
    "longest": "contain",
}
_NO_IMAGES = (
    "This query needs the images of its results, and none of them is in the gallery any"
    " more."
)


class WordEffect(TypedDict):
    """A word of the query, and how much the similarity of text and image falls when the
    word is left out.
    """

    word: Annotated[str, Field(examples=["crying"])]
    effect: Annotated[float, Field(examples=[0.0721])]


class ResultExplanation(TypedDict):
    """Why a result has its score.

    relevance: for each patch of the image as the model sees it, its contribution to the
    score, row by row. fit: how to lay the square relevance map over the image, as CSS
    object-fit: cover (centre crop), fill (squeezed) or
        contain (letterboxed).
    words: the first 32 words of the query's text; absent if it has fewer than two.
    """

    relevance: list[list[float]]
    fit: ObjectFit
    words: NotRequired[list[WordEffect]]


class Compute:
    """The work of re-ranking and explaining, done at once in the calling thread. The
    service has another.
    """

    def model(self, call: Callable[..., Any], *args: Any) -> Any:
        """Return what a call of the model returns, for a few texts or images."""
        return call(*args)

    def gallery_pixels(
        self,
        served: ServedVersion,
        rows: Sequence[int],
    ) -> dict[int, Pixels]:
        """Return the images that are still in the gallery, by row and in their
        order.
        """
        images: dict[int, Pixels] = {}
        for row in rows:
            with suppress(ArtifactError, ImageError, OSError):
                images[row] = served.encoder.preprocess(served.index.image_bytes(row))
        return images


def rerank(compute: Compute, served: ServedVersion, plan: Plan, hits: Hits) -> Hits:
    """Score the first hits by the second stage, and sort them.

    Raises:
        UnsupportedQueryError: every image is missing, or PyTorch is not installed.
        DcarError: the full model cannot be loaded.
    """
    rows = hits.rows[: plan.rerank_depth].tolist()
    if not rows:
        return hits
    try:
        stage = served.second_stage
    except MissingExtraError:
        raise UnsupportedQueryError(
            "This service runs without PyTorch, which `rerank` needs; leave it out."
        ) from None
    images = compute.gallery_pixels(served, rows)
    if not images:
        raise UnsupportedQueryError(_NO_IMAGES)

    def score(chunk: list[Pixels]) -> Floats:
        return stage.query_scores(plan.text, stage.image_features(np.stack(chunk)))  # type: ignore[no-any-return]

    added = dict(
        zip(
            images,
            map(float, _in_chunks(compute, score, [*images.values()])),
            strict=True,
        )
    )
    scores = {
        row: cosine + added[row]
        for row, cosine in zip(rows, hits.cosines.tolist(), strict=False)
        if row in added
    }
    first = sorted(
        range(len(rows)), key=lambda position: -scores.get(rows[position], -math.inf)
    )
    order = [*first, *range(len(rows), len(hits.rows))]
    folded = [hits.folded[position] for position in order] if hits.folded else []
    return replace(hits.take(order), folded=folded, rerank_scores=scores)


def explain(
    compute: Compute,
    served: ServedVersion,
    plan: Plan,
    vector: Floats,
    hits: Hits,
    page: Sequence[Any],
) -> None:
    """Explain the scores of the first results by the vector (E,) of the query, and by
    the words of its text.

    Raise UnsupportedQueryError if every image is missing.
    """
    rows = hits.rows[plan.offset : plan.end][: plan.explained].tolist()
    effects = _word_effects(compute, served, plan.text, rows)
    # one by one: other queries get their turn
    for result, row, words in zip(page, rows, effects, strict=False):
        relevance = _relevance(compute, served, vector, row)
        if relevance is not None:
            explanation = ResultExplanation(
                relevance=relevance, fit=_FITS[served.preprocess.resize]
            )
            result["explanation"] = (
                explanation | {"words": words} if words else explanation
            )
    if rows and not any("explanation" in result for result in page):
        raise UnsupportedQueryError(_NO_IMAGES)


def _word_effects(
    compute: Compute,
    served: ServedVersion,
    text: str,
    rows: Sequence[int],
) -> list[list[WordEffect]]:
    """Return the fall of each row's similarity to the text when a word is left out;
    nothing for a single word.
    """
    words = text.split()
    positions = range(min(len(words), _MAX_WORDS))
    if len(words) < 2 or not rows:
        return [[] for _ in rows]
    shorter = [
        " ".join(words[:position] + words[position + 1 :]) for position in positions
    ]
    encoder = served.encoder
    variants = [(encoder.state, variant) for variant in (text, *shorter)]
    whole, *without = compute.model(encoder.runtime.encode_texts, variants)
    falls = row_vectors(served.index, [*rows]) @ (whole - np.stack(without)).T  # [C, n]
    return [
        [
            WordEffect(word=word, effect=effect)
            for word, effect in zip(words, fall, strict=False)
        ]
        for fall in falls.astype(float).round(4).tolist()
    ]


def _relevance(
    compute: Compute,
    served: ServedVersion,
    vector: Floats,
    row: int,
) -> list[list[float]] | None:
    """Return the fall of the score when a part is blanked, for each patch; None if the
    image is missing.
    """
    pixels = compute.gallery_pixels(served, [row]).get(row)
    if pixels is None:
        return None
    encoder = served.encoder
    variants, part_of_patch = blank_parts(
        pixels,
        encoder.preprocess.blank(),
        encoder.state.patch_grid,
    )
    images = [(encoder.state, variant) for variant in (pixels, *variants)]
    original, *blanked = _in_chunks(compute, encoder.runtime.encode_images, images)
    falls = np.array([float(vector @ (original - variant)) for variant in blanked])
    relevance: list[list[float]] = np.round(falls[part_of_patch], 4).tolist()
    return relevance


def _in_chunks(
    compute: Compute,
    encode: Callable[[list[T]], Iterable[Floats]],
    images: list[T],
) -> list[Floats]:
    chunks = (images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK))
    return [vector for chunk in chunks for vector in compute.model(encode, chunk)]


def blank_parts(
    pixels: Pixels,
    blank: Pixels,
    patches: int,
) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Blank each part of an image in turn. A part consists of whole patches.

    Args:
        pixels, blank: (3, S, S).
        patches: number of patches in each direction.

    Returns:
        One image (3, S, S) for each part, and the number of the part of each patch:
        int64 (patches, patches).
    """
    size = pixels.shape[1]
    edges = np.linspace(0, patches, min(MAX_PARTS, patches) + 1).round().astype(int)
    # pixels of the parts
    spans = [slice(start, end) for start, end in pairwise(size * edges // patches)]
    images: list[Pixels] = []
    for rows, columns in product(spans, spans):
        image = pixels.copy()
        image[:, rows, columns] = blank[:, rows, columns]
        images.append(image)
    # of each patch in one direction
    part = np.repeat(np.arange(len(spans)), np.diff(edges))
    return images, part[:, None] * len(spans) + part
