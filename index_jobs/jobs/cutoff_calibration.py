"""Calibration of `min_score: "auto"`: a cut-off from validation pairs, stored in the manifest.

The score of a pair is that of its text, encoded as a query, and the vector of its image in the gallery. No image is
decoded again, and the image has no influence on the query.
"""

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.files import canonical_json

if TYPE_CHECKING:
    import pyarrow as pa

    from dcar_core import Encoder
    from index_jobs.encoding.encoding_state import EncodedGallery
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.quality_gate import QueryPairs

SIGNATURE = "pairs_signature"


def pairs_signature(pairs: "QueryPairs") -> str:
    """Return a hash of the pairs, to recognise a changed validation split."""
    return hashlib.sha256(canonical_json([pairs.texts, pairs.ids])).hexdigest()


def calibrate_cutoff(
    gallery: "Gallery", pairs: "QueryPairs", encoder: "Encoder", encoded: "EncodedGallery"
) -> dict[str, Any]:
    """Return the manifest's `cutoff`: the fields of `dcar_core.serving.score_cutoff.Cutoff` and the pairs' signature.

    It has no min_score if no image of the pairs has a vector.
    """
    from dcar_core.serving.score_cutoff import compute_cutoff

    places = _vector_places(gallery.table["id"], pairs.ids, encoded.rows())
    scored = [
        (text, places[item_id]) for text, item_id in zip(pairs.texts, pairs.ids, strict=True) if item_id in places
    ]
    if not scored:
        return {SIGNATURE: pairs_signature(pairs)}
    texts = encoder.encode_text([text for text, _ in scored])  # [N, E]
    images = _take_vectors(encoded, np.array([place for _, place in scored]), encoder.dim)  # [N, E]
    return asdict(compute_cutoff(np.einsum("ne,ne->n", texts, images))) | {SIGNATURE: pairs_signature(pairs)}


def _vector_places(column: "pa.ChunkedArray", ids: list[str], rows: Rows) -> dict[str, int]:
    """Return the position of each id's vector, for ids that have one.

    Args:
        column: ids of all gallery rows, read cell by cell: a `take` joins all text first, and fails at 2 GiB.
        rows: gallery row of each vector, ascending.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    chosen = np.flatnonzero(pc.is_in(column, pa.array(ids, pa.string())).to_numpy())
    chosen = chosen[np.isin(chosen, rows)]
    places = np.searchsorted(rows, chosen)
    return {column[row].as_py(): place for row, place in zip(chosen.tolist(), places.tolist(), strict=True)}


def _take_vectors(encoded: "EncodedGallery", places: Rows, dim: int) -> Floats:
    """Return the vectors at these positions, float32 (N, E), with one block in memory at a time."""
    vectors = np.empty((len(places), dim), np.float32)
    start = 0
    for block in encoded.blocks():
        inside = (places >= start) & (places < start + len(block))
        vectors[inside] = block[places[inside] - start]
        start += len(block)
    return vectors
