"""The quality gate: compares a rebuilt index with the served one by texts with a known image.

- Pairs are validation pairs with images in the gallery; without them, captions that only one image of the gallery has.
  The new model may have been trained on those captions, so validation pairs are the better evidence.
- An image of a pair is recognised by its file, through symbolic links. In a gallery that is not on this machine it is
  recognised by its name below the gallery, or by the end of its URL, if only one image has that name.
- Versions whose weight of the words was chosen by validation texts are compared by hybrid searches as well.
- Each index searches with its own model, as it is served, so the recall lost by a coarser kind of index counts.
- Only items of both indexes may be found: a larger gallery makes every search harder, but no model worse.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core import Encoder
from dcar_core.data import MISSING_IMAGES, load_split
from dcar_core.images import ImageRoot
from dcar_core.util.arrays import Floats, Mask
from dcar_core.util.bootstrap import Hits, compare_hits
from dcar_core.util.errors import DataError
from dcar_core.util.files import canonical_json
from index_jobs.gallery.scan import Gallery
from index_jobs.gallery.storage import WHOLE_FILE, is_url, join_location
from index_jobs.spec import BuildOptions
from index_jobs.store.artifact import Artifact
from index_jobs.store.lexical.fusion import hybrid_gains

logger = logging.getLogger(__name__)

MAX_PAIRS = 1000
_RANKS = (1, 10)
_DEPTH = 100  # an image below this rank counts as not found
_NAMES = {f"recall_at_{k}": f"R@{k}" for k in _RANKS} | {f"ndcg_at_{_DEPTH}": f"nDCG@{_DEPTH}"}  # in messages
_FILE_SCHEME = "file://"
_AMBIGUOUS = -1  # instead of a row

_ImageKey = str | tuple[str, int]  # a name, or a file and the offset of an image in it


@dataclass(frozen=True)
class QueryPairs:
    """Texts, the ids and gallery rows of their images, and their source: "validation" or "captions"."""

    texts: list[str]
    ids: list[str]
    rows: list[int]
    source: str

    @property
    def signature(self) -> str:
        """Hash of texts and ids, to recognise a changed validation split."""
        return hashlib.sha256(canonical_json([self.texts, self.ids])).hexdigest()


@dataclass(frozen=True)
class GateVerdict:
    """Outcome of a comparison.

    compared: False if no comparison was possible. pairs: texts that were searched. pool: images that they could find.
    serving, rebuilt: recall_at_1, recall_at_10 and ndcg_at_100 of both indexes. difference: rebuilt minus serving in
    ndcg_at_100, with the ends of its 95 % interval. visible: the smallest difference that is not chance.
    """

    passed: bool
    compared: bool
    reason: str
    margin: float
    pairs: int = 0
    pool: int = 0
    source: str = ""
    serving: dict[str, float] | None = None
    rebuilt: dict[str, float] | None = None
    difference: dict[str, float] | None = None
    visible: float | None = None


def find_pairs(gallery: Gallery, validation: Path | None) -> QueryPairs | None:
    """Return the pairs to compare with; None if there are neither validation pairs nor captions.

    Args:
        validation: a data set with a val split, as for `dcar train --data`.

    Raises:
        DataError: the validation pairs cannot be read, or none of their images is in the gallery.
    """
    return _validation_pairs(gallery, validation) if validation else _caption_pairs(gallery)


def _validation_pairs(gallery: Gallery, data: Path) -> QueryPairs:
    split, report = load_split(data, "val", image_policy="present")
    if missing := report.names.get(MISSING_IMAGES):
        logger.warning("%d validation images of %s are missing, such as %s", len(missing), data, missing[0])
    resolve = _path_resolver()
    keyed = [(sample.caption, _image_keys(split.root, sample.image, resolve)) for sample in split.samples]
    rows = _rows_by_key(gallery, {key for _, keys in keyed for key in keys}, resolve)
    located = ((text, next((rows[key] for key in keys if key in rows), None)) for text, keys in keyed)
    pairs = [(text, row) for text, row in located if row is not None]
    if not pairs:
        raise DataError(
            f"none of the {len(keyed):,} validation pairs of {data} has its image in the gallery {gallery.location}, "
            f"so the indexes cannot be compared: an image there is recognised by {_recognition(gallery)}; omit "
            f"--validation to compare by the gallery's captions"
        )
    if len(pairs) < len(keyed):
        logger.info("%d of %d validation pairs have their image in the gallery", len(pairs), len(keyed))
    pairs = pairs[:: -(-len(pairs) // MAX_PAIRS)]
    chosen = [row for _, row in pairs]
    return QueryPairs([text for text, _ in pairs], _cells(gallery.table["id"], chosen), chosen, "validation")


def _recognition(gallery: Gallery) -> str:
    if is_url(gallery.root):
        return "its name below the gallery, as in its items' file_name"
    return "its file, or the end of its URL"


def _image_keys(root: ImageRoot, name: str, resolve: Callable[[str], str]) -> list[_ImageKey]:
    """Return the keys that may identify a pair's image in a gallery: its location, then its names."""
    path, offset = root.locate(name)
    location = (resolve(str(path)), WHOLE_FILE if offset is None else offset)
    return [location, name] if offset is None else [location, f"{path.name}/{name}", name]


def _rows_by_key(gallery: Gallery, keys: set[_ImageKey], resolve: Callable[[str], str]) -> dict[_ImageKey, int]:
    """Return the rows of images: local ones by file and offset, others by name.

    A name that several images have identifies none of them. A full name goes before the end of a URL.
    """
    depths = sorted({key.count("/") for key in keys if isinstance(key, str)}, reverse=True)
    locations, names, endings = dict[_ImageKey, int](), dict[_ImageKey, int](), dict[_ImageKey, int]()
    row = 0
    for batch in gallery.table.select(["location", "offset", "name"]).to_batches():
        for location, offset, name in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            path = join_location(gallery.root, location).removeprefix(_FILE_SCHEME)
            if not is_url(path):
                if (key := (resolve(path), offset)) in keys:
                    locations[key] = row
            elif not is_url(name):
                _add_name(names, name, row, keys)
            else:
                parts = name.partition("?")[0].split("/")
                for ending in ("/".join(parts[-depth - 1 :]) for depth in depths):
                    _add_name(endings, ending, row, keys)
            row += 1
    by_name = {key: row for key, row in (endings | names).items() if row != _AMBIGUOUS}
    return by_name | locations


def _add_name(rows: dict[_ImageKey, int], name: str, row: int, keys: set[_ImageKey]) -> None:
    if name in keys:
        rows[name] = _AMBIGUOUS if name in rows else row


def _path_resolver() -> Callable[[str], str]:
    """Return a function that resolves symbolic links; folders are cached, since many images share few of them."""
    resolve_folder = cache(os.path.realpath)

    def resolve(path: str) -> str:
        folder, name = os.path.split(path)
        resolved = os.path.join(resolve_folder(folder), name)  # noqa: PTH118  a million times over
        return os.path.realpath(resolved) if os.path.islink(resolved) else resolved  # noqa: PTH114

    return resolve


def _cells(column: pa.ChunkedArray, rows: list[int]) -> list[str]:
    """Return a few cells, one by one: `take` joins all text first, which is slow and fails at 2 GiB."""
    return [column[row].as_py() for row in rows]


def _caption_pairs(gallery: Gallery) -> QueryPairs | None:
    captions = gallery.table["caption"].cast(pa.large_string())  # distinct captions in one array may exceed 2 GiB
    counts = pc.value_counts(captions)
    unique = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    rows = np.flatnonzero(pc.and_(pc.is_in(captions, unique), pc.not_equal(captions, "")).to_numpy())
    if not len(rows):
        return None
    chosen = rows[:: -(-len(rows) // MAX_PAIRS)].tolist()
    return QueryPairs(_cells(captions, chosen), _cells(gallery.table["id"], chosen), chosen, "captions")


def pass_uncompared(reason: str, margin: float) -> GateVerdict:
    """Return the verdict for indexes that cannot be compared, which permits publication."""
    return GateVerdict(True, False, reason, margin)


def compare(
    served: Artifact,
    served_encoder: Encoder,
    rebuilt: Artifact,
    rebuilt_encoder: Encoder,
    pairs: QueryPairs | None,
    margin: float = BuildOptions.margin,
) -> GateVerdict:
    """Search both indexes; the rebuilt one passes if no measure is lower by more than the margin.

    Recall counts hits only, and few pairs decide it. The third measure, nDCG of one relevant image, depends on the rank
    of every image.

    Args:
        margin: 0.02 is two points of a hundred.
    """
    if pairs is None:
        return pass_uncompared("there are no captions and no validation pairs to compare by", margin)
    shared = [
        (text, item_id)
        for text, item_id in zip(pairs.texts, pairs.ids, strict=True)
        if served.row_of(item_id) is not None and rebuilt.row_of(item_id) is not None
    ]
    if not shared:
        return pass_uncompared("no image of the pairs is in both indexes", margin)
    texts, ids = [text for text, _ in shared], [item_id for _, item_id in shared]
    masks = _shared_rows(served, rebuilt), _shared_rows(rebuilt, served)
    vectors = served_encoder.encode_text(texts), rebuilt_encoder.encode_text(texts)
    before_gains, after_gains = _gains(served, vectors[0], ids, masks[0]), _gains(rebuilt, vectors[1], ids, masks[1])
    before, after = _measures(before_gains), _measures(after_gains)
    weights = served.manifest.hybrid_weight, rebuilt.manifest.hybrid_weight
    if weights[0] is not None and weights[1] is not None:
        before |= _measures(_hybrid_gains(served, weights[0], texts, vectors[0], ids, masks[0]), "hybrid_")
        after |= _measures(_hybrid_gains(rebuilt, weights[1], texts, vectors[1], ids, masks[1]), "hybrid_")
    pool = served.manifest.count if masks[0] is None else int(np.count_nonzero(masks[0]))
    difference, visible = _difference(before_gains, after_gains, ids)
    names = _NAMES | {key: f"hybrid {_NAMES[key.removeprefix('hybrid_')]}" for key in before if key not in _NAMES}
    changes = ", ".join(f"{name} {100 * before[key]:.1f} -> {100 * after[key]:.1f}" for key, name in names.items())
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    reason = (
        f"{changes} percent among {pool:,} images over {len(shared):,} pairs, margin {100 * margin:g} points; "
        f"nDCG@{_DEPTH} changed by {value:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
    )
    if visible > margin:
        logger.warning(
            "%d pairs tell differences of %.1f points from chance, but the margin is %g; give more validation pairs",
            len(shared), 100 * visible, 100 * margin,
        )  # fmt: skip
    passed = not losses(before, after, margin)
    return GateVerdict(
        passed, True, reason, margin, len(shared), pool, pairs.source, before, after, difference, round(visible, 4)
    )


def _shared_rows(artifact: Artifact, other: Artifact) -> Mask | None:
    """Return the rows of an artifact that are items of the other one too; None for all."""
    other_ids = other.column("id").filter(other.live)
    mask: Mask = pc.is_in(artifact.column("id"), other_ids).to_numpy() & artifact.live
    return None if mask.all() else mask


def _gains(artifact: Artifact, vectors: Floats, ids: list[str], allowed: Mask | None) -> Floats:
    """Return 1 / log2(1 + rank) of each text's image, 0 where it is not found: float64 (n,)."""
    rows = artifact.search(vectors, _DEPTH, allowed)[1]
    is_target = rows == np.array([artifact.row_of(item_id) for item_id in ids])[:, None]
    gains: Floats = np.where(is_target.any(1), 1 / np.log2(2 + is_target.argmax(1)), 0.0)
    return gains


def _hybrid_gains(
    artifact: Artifact, weight: float, texts: list[str], vectors: Floats, ids: list[str], allowed: Mask | None
) -> Floats:
    """Return the gains of searches by words and vectors, as `_gains` does."""
    assert artifact.lexical is not None  # a weight was chosen with it
    queries = list(zip(texts, vectors, [artifact.row_of(item_id) or 0 for item_id in ids], strict=True))
    gains = hybrid_gains(artifact, artifact.lexical, artifact.sample_vectors, queries, [weight], allowed)
    return gains[:, 0].astype(np.float32)


def _measures(gains: Floats, prefix: str = "") -> dict[str, float]:
    recalls = {f"{prefix}recall_at_{k}": round(float((gains >= 1 / np.log2(1.5 + k)).mean()), 4) for k in _RANKS}
    return recalls | {f"{prefix}ndcg_at_{_DEPTH}": round(float(gains.mean()), 4)}


def _difference(before: Floats, after: Floats, ids: list[str]) -> tuple[dict[str, float], float]:
    """Return the mean difference of gains with its interval, and the smallest difference that is not chance.

    That is half of the interval, but at least one image that is found by only one index.
    """
    _, image = np.unique(ids, return_inverse=True)
    texts, sums = np.bincount(image).astype(np.float64), [np.bincount(image, gains) for gains in (after, before)]
    hits = [Hits(texts, each.astype(np.float64), np.zeros(len(texts))) for each in sums]
    estimate = compare_hits(*hits).difference["t2i_r1"]  # in points of a hundred
    values = {name: round(getattr(estimate, name) / 100, 4) for name in ("value", "low", "high")}
    return values, max((estimate.high - estimate.low) / 200, 1 / len(texts))


def losses(before: Mapping[str, float], after: Mapping[str, float], margin: float) -> list[str]:
    """Return the measures that are lower by more than the margin, rounded: 0.14 - 0.12 is above 0.02 in floats."""
    return [name for name in before if round(before[name] - after[name] - margin, 9) > 0]
