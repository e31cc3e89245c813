"""The quality gate: compares a rebuilt index with the served one by texts with a known
image, and sets cut-offs.

- Pairs are validation pairs with images in the gallery; without them, captions that
  only one image of the gallery has. The new model may have been trained on those
  captions, so validation pairs are the better evidence.
- Each index searches with its own model, as it is served, so the recall lost by a
  coarser kind of index counts.
- Only items of both indexes may be found: a larger gallery makes every search harder,
  but no model worse.
- The cut-off, `min_score: "auto"`, is reached by all but 5 % of validation texts with
  their own images. Without pairs, the scores of common words tell how high words and
  images score that do not belong together.
- The cut-off for queries by an image follows from the cosines of the gallery's own
  images with each other.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core import Encoder
from dcar_core.data import MISSING_IMAGES, Annotations
from dcar_core.images import ImageRoot
from dcar_core.model.tokenizer import common_words
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import DataError
from dcar_core.util.files import hash_json
from dcar_core.util.metrics import Comparison, Scores
from index_jobs.encoding.encode import EncodedGallery
from index_jobs.engines.protocol import VectorIndex
from index_jobs.gallery.locations import WHOLE_FILE, is_url, join_location
from index_jobs.gallery.scan import Gallery
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.lexical import spread_rows
from index_jobs.row_filter import RowFilter
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)

MAX_PAIRS = 1000
# validation texts that choose the weight of the words; a cut-off by fewer is rough
MIN_TEXTS = 100
# words whose scores make a cut-off without validation texts, from so many items on
_WORDS = 300
_MIN_ITEMS = 30
MISSED = 0.05  # share of the true pairs below the cut-off [ours]
STRONG = 0.95  # share of the true pairs below a strong score [ours]
# share of words and images without a relation, and of pairs of images, that reach the
# cut-off [ours]
CHANCE = 0.01
STRONG_CHANCE = 0.002  # share of the pairs of images that reach the strong score [ours]
# cosine that is strong in any gallery: nearly all images reach it with their own JPEG
# of quality 30
_SAME = 0.95
_RANKS = (1, 10)
_DEPTH = 100  # an image below this rank counts as not found

# a name, or device, number of a file, and the offset of an image in it
_ImageKey = str | tuple[int, int, int]
EncodeTexts = Callable[[Sequence[str]], Floats]  # as `Encoder.encode_text`
Side = tuple[IndexVersion, EncodeTexts]  # an index and its model


@dataclass(frozen=True)
class QueryPairs:
    """Texts, the ids and gallery rows of their images, and their source: "validation"
    or "captions".
    """

    texts: list[str]
    ids: list[str]
    rows: list[int]
    source: str

    @property
    def signature(self) -> str:
        """Hash of texts and ids, to recognise a changed validation split."""
        return hash_json([self.texts, self.ids])


@dataclass(frozen=True)
class GateVerdict:
    """Outcome of a comparison."""

    reason: str
    margin: float
    passed: bool = True
    compared: bool = False  # if a comparison was possible
    pairs: int = 0  # texts that were searched
    pool: int = 0  # images that they could find
    source: str = ""
    serving: dict[str, float] | None = None  # recall_at_1, recall_at_10, ndcg_at_100
    rebuilt: dict[str, float] | None = None
    # in ndcg_at_100, with the ends of its 95 % interval
    difference: dict[str, float] | None = None
    visible: float | None = None  # the smallest difference that is not chance


def verdict_of(
    comparison: Comparison,
    reason: str,
    margin: float,
    **more: Any,
) -> GateVerdict:
    """Return a verdict with the figures of a comparison."""
    difference = {
        name: round(value / 100, 4) for name, value in vars(comparison.gain).items()
    }
    visible = round(comparison.visible / 100, 4)
    return GateVerdict(
        reason,
        margin,
        compared=True,
        difference=difference,
        visible=visible,
        **more,
    )


def find_pairs(gallery: Gallery, validation: Path | None) -> QueryPairs | None:
    """Return the pairs to compare with; None if there are neither validation pairs nor
    captions.

    validation: a data set with a val split. Raise DataError if none of its pairs has
    its image in the gallery.
    """
    if validation:
        pairs = _validation_pairs(gallery, validation)
    else:
        pairs = _caption_pairs(gallery)
    if not pairs:
        return None
    pairs = pairs[:: -(-len(pairs) // MAX_PAIRS)]
    rows = [row for _, row in pairs]
    # `take` joins all text first, and fails at 2 GiB
    ids = [gallery.table["id"][row].as_py() for row in rows]
    return QueryPairs(
        [text for text, _ in pairs],
        ids,
        rows,
        "validation" if validation else "captions",
    )


def _validation_pairs(gallery: Gallery, data: Path) -> list[tuple[str, int]]:
    """Return validation texts with the rows of their images."""
    split, report = Annotations(data).load("val", "present")
    if missing := report.names.get(MISSING_IMAGES):
        logger.warning(
            "%d validation images of %s are missing, such as %s",
            len(missing),
            data,
            missing[0],
        )
    keyed = [
        (sample.caption, _image_keys(split.root, sample.image))
        for sample in split.samples
    ]
    rows = _rows_by_key(gallery, {key for _, keys in keyed for key in keys})
    located = [
        (text, next((rows[key] for key in keys if key in rows), None))
        for text, keys in keyed
    ]
    pairs = [(text, row) for text, row in located if row is not None]
    if not pairs:
        raise DataError(
            f"none of the {len(keyed):,} validation pairs of {data} has its image in"
            f" the gallery {gallery.location}, so the indexes cannot be compared; an"
            " image is recognised by its file, or at a URL by its name below the"
            " gallery; omit --validation to compare by the gallery's captions"
        )
    if len(pairs) < len(keyed):
        logger.info(
            "%d of %d validation pairs have their image in the gallery",
            len(pairs),
            len(keyed),
        )
    return pairs


def _image_keys(root: ImageRoot, name: str) -> list[_ImageKey]:
    """Return the keys that may identify a pair's image in a gallery: its file, then its
    names.
    """
    path, offset = root.locate(name)
    names = [name] if offset is None else [f"{path.name}/{name}", name]
    return [_file_key(str(path), WHOLE_FILE if offset is None else offset), *names]


def _file_key(path: str, offset: int) -> _ImageKey:
    """Return what identifies a file behind links, and the offset of an image in it."""
    with suppress(OSError):
        status = os.stat(path)  # noqa: PTH116  a million times over
        return status.st_dev, status.st_ino, offset
    return path


def _rows_by_key(gallery: Gallery, keys: set[_ImageKey]) -> dict[_ImageKey, int]:
    """Return the rows of images: local ones by file and offset, others by the end of
    their URL that one image has.
    """
    depths = {key.count("/") for key in keys if isinstance(key, str)}
    by_ending = dict[_ImageKey, list[int]]()
    by_file = dict[_ImageKey, int]()
    batches = gallery.table.select(["location", "offset", "name"]).to_batches()
    images = (
        image
        for batch in batches
        for image in zip(*(c.to_pylist() for c in batch.columns), strict=True)
    )
    for row, (location, offset, name) in enumerate(images):
        path = join_location(gallery.root, location).removeprefix("file://")
        if is_url(path):
            parts = name.partition("?")[0].split("/")
            for key in keys.intersection(
                {"/".join(parts[-depth - 1 :]) for depth in depths}
            ):
                by_ending.setdefault(key, []).append(row)
        elif (key := _file_key(path, offset)) in keys:
            by_file[key] = row
    return {key: rows[0] for key, rows in by_ending.items() if len(rows) == 1} | by_file


def _caption_pairs(gallery: Gallery) -> list[tuple[str, int]]:
    # distinct captions in one array may exceed 2 GiB
    captions = gallery.table["caption"].cast(pa.large_string())
    counts = pc.value_counts(captions)
    unique = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    rows = np.flatnonzero(
        pc.and_(pc.is_in(captions, unique), pc.not_equal(captions, "")).to_numpy()
    )
    return [
        (captions[row].as_py(), row)
        for row in rows[:: -(-len(rows) // MAX_PAIRS) or 1].tolist()
    ]


def calibrate(
    index: VectorIndex,
    pairs: QueryPairs,
    encoded: EncodedGallery,
    encoder: Encoder,
) -> dict[str, Any]:
    """Return the manifest's `cutoff` by the validation pairs whose image has a
    vector.
    """
    rows = encoded.rows()
    has_vector = np.isin(pairs.rows, rows)
    texts = [
        text
        for text, is_scored in zip(pairs.texts, has_vector, strict=True)
        if is_scored
    ]
    if not texts:
        return {}
    if len(texts) < MIN_TEXTS:
        logger.warning(
            "the cut-off follows from %d validation pairs only; give %d or more",
            len(texts),
            MIN_TEXTS,
        )
    positions = np.searchsorted(rows, np.array(pairs.rows)[has_vector])
    vectors = encoder.encode_text(texts)
    return {"cutoff": cutoff_of_pairs(index, vectors, positions)}


def cutoff_of_pairs(
    index: VectorIndex | IndexVersion,
    vectors: Floats,
    rows: Rows,
) -> dict[str, Any]:
    """Return the manifest's `cutoff` by the vectors of texts, and the rows of their
    images.
    """
    is_found = index.search(vectors, max(_RANKS))[1] == rows[:, None]
    recall = {
        f"recall_at_{k}": round(float(is_found[:, :k].any(1).mean()), 4) for k in _RANKS
    }
    return compute_cutoff(np.einsum("ne,ne->n", vectors, index.vectors(rows))) | recall


def compute_cutoff(scores: Floats) -> dict[str, Any]:
    """Return the cut-off for the scores (N,) of N pairs: `min_score`, `strong_score`
    and their number, `pairs`.
    """
    min_score, strong_score = (
        np.quantile(scores.astype(np.float64), (MISSED, STRONG)).round(6).tolist()
    )
    return {"min_score": min_score, "strong_score": strong_score, "pairs": len(scores)}


def cutoff_of_words(scores: Floats, best: Floats) -> dict[str, Any]:
    """Return a cut-off by the scores (W, M) of W words with a sample of the items, and
    by their best (W,) of all items.

    min_score: one of a hundred scores reaches it. strong_score: half of the words reach
    it with their best item.
    """
    min_score = float(np.quantile(scores.astype(np.float64), 1 - CHANCE))
    strong_score = max(min_score, float(np.median(best)))
    return {
        "min_score": round(min_score, 6),
        "strong_score": round(strong_score, 6),
        "words": len(scores),
    }


def calibrate_by_words(index: VectorIndex, encode: EncodeTexts) -> dict[str, Any]:
    """Return the manifest's `cutoff` without pairs; nothing for a few items, whose
    scores say little.
    """
    if index.count < _MIN_ITEMS:
        return {}
    vectors = encode(common_words(_WORDS))  # [W, E]
    sample = index.vectors(spread_rows(index.count))
    return {
        "cutoff": cutoff_of_words(vectors @ sample.T, index.search(vectors, 1)[0][:, 0])
    }


def cutoff_of_images(index: VectorIndex) -> dict[str, Any]:
    """Return the manifest's `image_cutoff` by the cosines of a sample of the items;
    nothing for a few items.
    """
    rows = spread_rows(index.count)
    if len(rows) < _MIN_ITEMS:
        return {}
    sample = index.vectors(rows)
    cosines = (sample @ sample.T)[np.triu_indices(len(rows), 1)].astype(np.float64)
    min_score, strong_score = (
        np.minimum(np.quantile(cosines, (1 - CHANCE, 1 - STRONG_CHANCE)), _SAME)
        .round(6)
        .tolist()
    )
    return {"min_score": min_score, "strong_score": strong_score, "pairs": len(cosines)}


def compare(
    before: Side,
    after: Side,
    pairs: QueryPairs | None,
    margin: float = BuildOptions.margin,
) -> GateVerdict:
    """Search both indexes; the rebuilt one, `after`, passes if no measure is lower by
    more than the margin.

    margin: 0.02 is two points of a hundred. Few hits decide the recalls; nDCG depends
    on the rank of every image.
    """
    if pairs is None:
        return GateVerdict(
            "there are no captions and no validation pairs to compare by", margin
        )
    indexes = before[0], after[0]
    shared = [
        (text, item_id)
        for text, item_id in zip(pairs.texts, pairs.ids, strict=True)
        if None not in [index.row_of(item_id) for index in indexes]
    ]
    if not shared:
        return GateVerdict("no image of the pairs is in both indexes", margin)
    (old_gains, serving, pool), (new_gains, rebuilt, _) = (
        _measure(*side, shared, other)
        for side, other in zip((before, after), indexes[::-1], strict=True)
    )
    comparison = compare_gains(old_gains, new_gains, [item_id for _, item_id in shared])
    changes = ", ".join(
        f"{key} {100 * serving[key]:.1f} -> {100 * rebuilt[key]:.1f}" for key in serving
    )
    reason = (
        f"{changes} percent among {pool:,} images over {len(shared):,} pairs, margin"
        f" {100 * margin:g} points; ndcg_at_{_DEPTH} changed by"
        f" {comparison.gain.points()}"
    )
    if comparison.visible > 100 * margin:
        logger.warning(
            "%d pairs tell differences of %.1f points from chance, but the margin is"
            " %g; give more validation pairs",
            len(shared),
            comparison.visible,
            100 * margin,
        )
    return verdict_of(
        comparison,
        reason,
        margin,
        passed=not losses(serving, rebuilt, margin),
        pairs=len(shared),
        pool=pool,
        source=pairs.source,
        serving=serving,
        rebuilt=rebuilt,
    )


def _shared_rows(index: IndexVersion, other: IndexVersion) -> RowFilter | None:
    """Return the items of an index that another has as well; None for all."""
    mask = (
        pc.is_in(index.column("id"), other.column("id").filter(other.live)).to_numpy()
        & index.live
    )
    return None if mask.all() else RowFilter.of_mask(mask)


def _measure(
    index: IndexVersion,
    encode: EncodeTexts,
    pairs: Sequence[tuple[str, str]],
    other: IndexVersion,
) -> tuple[Floats, dict[str, float], int]:
    """Search among the items of both indexes for the images of texts.

    Returns:
        1 / log2(1 + rank) of each text's image, 0 where it is not found, float (n,);
        the measures; and the number of items that were searched.
    """
    targets = [index.row_of(item_id) or 0 for _, item_id in pairs]
    shared = _shared_rows(index, other)
    rows = index.search(encode([text for text, _ in pairs]), _DEPTH, shared)[1]
    is_target = rows == np.array(targets)[:, None]
    gains: Floats = np.where(
        is_target.any(1),
        1 / np.log2(2 + is_target.argmax(1)),
        0.0,
    )
    measures = {
        f"recall_at_{k}": round(float(is_target[:, :k].any(1).mean()), 4)
        for k in _RANKS
    }
    measures[f"ndcg_at_{_DEPTH}"] = round(float(gains.mean()), 4)
    return (
        gains,
        measures,
        int(np.count_nonzero(index.live if shared is None else shared.mask)),
    )


def compare_gains(
    before: Floats,
    after: Floats,
    units: Sequence[str],
    weights: Floats | None = None,
) -> Comparison:
    """Compare gains by a bootstrap over units, such as the ids of images."""
    counts, (_, unit_of) = (
        np.ones(len(after)) if weights is None else weights,
        np.unique(units, return_inverse=True),
    )
    scores = (
        Scores(counts[None], (counts * gains)[None], ["ndcg"]).grouped(unit_of)
        for gains in (after, before)
    )
    return Comparison.of(*scores)


def losses(
    before: Mapping[str, float],
    after: Mapping[str, float],
    margin: float,
) -> list[str]:
    """Return the measures that are lower by more than the margin, rounded: 0.14 - 0.12
    is above 0.02 in floats.
    """
    return [
        name for name in before if round(before[name] - after[name] - margin, 9) > 0
    ]
