"""Is a rebuilt index as good as the one that is served? Texts whose picture is known are asked of both.

- Pairs are held-out validation pairs whose pictures lie in the gallery; without them, captions that only one picture of
  the gallery has. Those the new model may have been trained on, so validation pairs are the better judge.
- Each index answers with its own model, as it will be served, so what a coarser kind of index misses counts too.
- Only items that both indexes hold may be found: a gallery that grew makes every search harder, and no model worse.
"""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.errors import DataError
from index_jobs.artifact import Artifact
from index_jobs.sources import WHOLE_FILE, place_of

if TYPE_CHECKING:
    from dcar_core import Encoder
    from index_jobs.gallery import Gallery

logger = logging.getLogger(__name__)

MARGIN = 0.02
MOST_PAIRS = 1000
_RANKS = (1, 10)


@dataclass(frozen=True)
class Pairs:
    """Texts, the ids of their pictures, and where they come from: "validation" or "captions"."""

    texts: list[str]
    ids: list[str]
    source: str


@dataclass(frozen=True)
class Verdict:
    """What a comparison found. recall_at_1 and recall_at_10 of both; `compared` is false where nothing could be."""

    passed: bool
    compared: bool
    reason: str
    margin: float
    pairs: int = 0
    source: str = ""
    serving: dict[str, float] | None = None
    rebuilt: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pairs_of(gallery: "Gallery", validation: Path | None) -> Pairs | None:
    """The pairs to compare with; None when there are no validation pairs and no captions.

    Args:
        validation: a data set with a val split, as `dcar train --data` takes it.

    Raises:
        DataError: the validation pairs cannot be read, or none of their pictures is in the gallery.
    """
    return _validation(gallery, validation) if validation else _captions(gallery)


def _validation(gallery: "Gallery", data: Path) -> Pairs:
    from dcar_core.data import load_split

    split, _ = load_split(data, "val")
    found = [(sample.caption, _key(*split.root.locate(sample.image))) for sample in split.samples]
    rows = _rows_of(gallery, {key for _, key in found})
    kept = [(text, rows[key]) for text, key in found if key in rows]
    if not kept:
        raise DataError(
            f"none of the {len(found):,} validation pairs of {data} has its picture in the gallery {gallery.source}, "
            f"so the indexes cannot be compared; leave --validation out to compare by the gallery's captions"
        )
    if len(kept) < len(found):
        logger.info("%d of %d validation pairs have their picture in the gallery", len(kept), len(found))
    kept = kept[:: -(-len(kept) // MOST_PAIRS)]
    ids = gallery.table["id"].take([row for _, row in kept]).to_pylist()
    return Pairs([text for text, _ in kept], ids, "validation")


def _key(path: Path, offset: int | None) -> tuple[str, int]:
    return os.path.abspath(path), WHOLE_FILE if offset is None else offset  # noqa: PTH100  as a gallery's source is


def _rows_of(gallery: "Gallery", wanted: set[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """The rows of pictures, which are known by the file that holds them and where they begin in it."""
    rows, row = {}, 0
    for batch in gallery.table.select(["location", "offset"]).to_batches():
        for location, offset in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if (key := (place_of(gallery.root, location), offset)) in wanted:
                rows[key] = row
            row += 1
    return rows


def _captions(gallery: "Gallery") -> Pairs | None:
    import pyarrow.compute as pc

    captions = gallery.table["caption"]
    counts = pc.value_counts(captions)
    once = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    rows = np.flatnonzero(pc.and_(pc.is_in(captions, once), pc.not_equal(captions, "")).to_numpy())
    if not len(rows):
        return None
    rows = rows[:: -(-len(rows) // MOST_PAIRS)]
    return Pairs(captions.take(rows).to_pylist(), gallery.table["id"].take(rows).to_pylist(), "captions")


def compare(
    serving: Artifact, old: "Encoder", rebuilt: Artifact, new: "Encoder", pairs: Pairs | None, margin: float = MARGIN
) -> Verdict:
    """Ask both indexes; the rebuilt one passes when neither recall is lower by more than the margin.

    Args:
        old, new: the encoders of the two.
        margin: in recall, 0.02 are two points of a hundred.
    """
    if pairs is None:
        return Verdict(True, False, "there are no captions and no validation pairs to compare by", margin)
    both = [
        (text, item_id)
        for text, item_id in zip(pairs.texts, pairs.ids, strict=True)
        if serving.row_of(item_id) is not None and rebuilt.row_of(item_id) is not None
    ]
    if not both:
        return Verdict(True, False, "no picture of the pairs is in both indexes", margin)
    texts, ids = [text for text, _ in both], [item_id for _, item_id in both]
    served = _recalls(serving, old.encode_text(texts), ids, _shared(serving, rebuilt))
    found = _recalls(rebuilt, new.encode_text(texts), ids, _shared(rebuilt, serving))
    worse = [name for name in served if found[name] < served[name] - margin]
    told = ", ".join(f"{name} {served[name]:.3f} -> {found[name]:.3f}" for name in served)
    reason = f"{told} over {len(both):,} pairs, margin {margin:g}"
    return Verdict(not worse, True, reason, margin, len(both), pairs.source, served, found)


def _shared(artifact: Artifact, other: Artifact) -> NDArray[np.bool_] | None:
    """Which rows of an artifact are items of the other one too; None for all."""
    import pyarrow.compute as pc

    theirs = other.column("id").filter(other.live)
    mask: NDArray[np.bool_] = pc.is_in(artifact.column("id"), theirs).to_numpy() & artifact.live
    return None if mask.all() else mask


def _recalls(
    artifact: Artifact, vectors: NDArray[np.float32], ids: list[str], allowed: NDArray[np.bool_] | None
) -> dict[str, float]:
    rows = artifact.search(vectors, max(_RANKS), allowed)[1]
    wanted = np.array([artifact.row_of(item_id) for item_id in ids])
    hits = rows == wanted[:, None]
    return {f"recall_at_{k}": round(float(hits[:, :k].any(1).mean()), 4) for k in _RANKS}
