"""What `min_score: "auto"` means for an index: the cut-off from its validation pairs, kept in the manifest.

A pair's score is that of its text, encoded as a query, with the vector of its picture in the gallery: nothing is
decoded again, and the picture takes no part in the query.
"""

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.files import canonical_json

if TYPE_CHECKING:
    import pyarrow as pa

    from dcar_core import Encoder
    from index_jobs.encoding.encoding_state import EncodedGallery
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.quality_gate import Pairs

SIGNATURE = "pairs_signature"


def signature(pairs: "Pairs") -> str:
    """A hash of the pairs, by which a changed validation split is noticed."""
    return hashlib.sha256(canonical_json([pairs.texts, pairs.ids])).hexdigest()


def calibrate(gallery: "Gallery", pairs: "Pairs", encoder: "Encoder", encoded: "EncodedGallery") -> dict[str, Any]:
    """The manifest's `cutoff`: the fields of `dcar_core.serving.score_cutoff.Cutoff`, and the signature of the pairs.

    Without min_score where no picture of the pairs could be encoded.
    """
    from dcar_core.serving.score_cutoff import compute_cutoff

    place = _places(gallery.table["id"], pairs.ids, encoded.rows())
    known = [(text, place[item_id]) for text, item_id in zip(pairs.texts, pairs.ids, strict=True) if item_id in place]
    if not known:
        return {SIGNATURE: signature(pairs)}
    texts = encoder.encode_text([text for text, _ in known])  # [N, E]
    pictures = _vectors(encoded, np.array([n for _, n in known]), encoder.dim)  # [N, E]
    found = compute_cutoff(np.einsum("ne,ne->n", texts, pictures))
    return asdict(found) | {SIGNATURE: signature(pairs)}


def _places(column: "pa.ChunkedArray", ids: list[str], rows: NDArray[np.int64]) -> dict[str, int]:
    """Where the vectors of some ids lie, of those that have one; rows: the gallery row of each vector, ascending.

    Only these ids are taken out of the column: a take from a whole column of text joins its chunks first, and a joined
    one holds 2 GiB at most.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    held = np.flatnonzero(pc.is_in(column, pa.array(ids, pa.string())).to_numpy())
    held = held[np.isin(held, rows)]
    places = np.searchsorted(rows, held)
    return {column[row].as_py(): place for row, place in zip(held.tolist(), places.tolist(), strict=True)}


def _vectors(encoded: "EncodedGallery", places: NDArray[np.int64], dim: int) -> NDArray[np.float32]:
    """The vectors (N, E) at these places, one block in memory at a time."""
    out = np.empty((len(places), dim), np.float32)
    begin = 0
    for block in encoded.blocks():
        here = (places >= begin) & (places < begin + len(block))
        out[here] = block[places[here] - begin]
        begin += len(block)
    return out
