"""Contents of a version besides the model and the vectors: the items, their words, the cut-off, the hybrid weight."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.serving.score_cutoff import compute_cutoff
from dcar_core.util.errors import DataError
from index_jobs.encoding.encode import EncodedGallery, write_duplicates, write_failed
from index_jobs.engines.measure import MAX_QUERIES
from index_jobs.engines.protocol import HeldOutQueries, VectorIndex
from index_jobs.gallery.scan import Gallery
from index_jobs.jobs.gate import QueryPairs
from index_jobs.spec import IndexSpec
from index_jobs.store.items import BUILT_IN_FIELDS, FieldTypes, field_names, take_rows, write_items
from index_jobs.store.lexical.fusion import choose_weight, spread_rows
from index_jobs.store.lexical.lexical_index import LexicalIndex, item_texts, write_lexical
from index_jobs.store.manifest import DUPLICATES, FAILED, ITEMS, LEXICAL

logger = logging.getLogger(__name__)

_MIN_TEXTS = 100  # validation texts that choose the weight of the words


def require_fields(gallery: Gallery, spec: IndexSpec) -> None:
    """Check that items have the fields that searches group by and look words up in.

    One of several text fields may be missing, since items that are added later may have it. That is a warning.

    Raises:
        DataError: no item has the group field, or any of the text fields, or the group field holds lists.
    """
    metadata = gallery.table["metadata"]
    if name := spec.group_field:
        types = dict.fromkeys(BUILT_IN_FIELDS, pa.string()) | FieldTypes.infer(metadata).types
        if name not in types:
            raise DataError(_no_field("--group-field", [name], types))
        if pa.types.is_list(types[name]):
            raise DataError(f"--group-field: {name!r} has several values per item; name a field with one")
    if spec.text_fields:
        known = field_names(metadata) | {*BUILT_IN_FIELDS}
        missing = [name for name in spec.text_fields if name not in known]
        if len(missing) == len(spec.text_fields):
            raise DataError(_no_field("--text-fields", missing, known))
        if missing:
            logger.warning("%s", _no_field("--text-fields", missing, known))


def _no_field(option: str, names: Sequence[str], known: Iterable[str]) -> str:
    return f"{option}: no item has the field {' or '.join(map(repr, names))}; there are: {', '.join(sorted(known))}"


def stage_items(
    staging: Path, gallery: Gallery, encoded: EncodedGallery, text_fields: Sequence[str] | None
) -> FieldTypes:
    """Write items, their words, failures and duplicates, and return the types of the items' fields."""
    rows = encoded.rows()
    fields = write_items(staging / ITEMS, encoded.with_sizes(gallery.table), rows)
    write_lexical(staging / LEXICAL, item_texts(take_rows(gallery.table, rows), text_fields))
    write_failed(staging / FAILED, gallery, encoded.failed)
    write_duplicates(staging / DUPLICATES, gallery, encoded.duplicates())
    return fields


def calibrate_cutoff(pairs: QueryPairs, encoder: Encoder, encoded: EncodedGallery) -> dict[str, Any]:
    """Return the manifest's `cutoff`: the meaning of `min_score: "auto"` by validation pairs.

    The score of a pair is that of its text, encoded as a query, and the vector of its image in the gallery. It is
    empty if no image of the pairs has a vector.
    """
    rows = encoded.rows()
    has_vector = np.isin(pairs.rows, rows)
    texts = [text for text, is_scored in zip(pairs.texts, has_vector, strict=True) if is_scored]
    if not texts:
        return {}
    positions = np.searchsorted(rows, np.array(pairs.rows)[has_vector])
    images, start = np.empty((len(positions), encoder.dim), np.float32), 0
    for block in encoded.blocks():  # one block in memory at a time
        inside = (positions >= start) & (positions < start + len(block))
        images[inside] = block[positions[inside] - start]
        start += len(block)
    return compute_cutoff(np.einsum("ne,ne->n", encoder.encode_text(texts), images))


def choose_hybrid_weight(
    staging: Path, index: VectorIndex, pairs: QueryPairs, gallery: Gallery, encoded: EncodedGallery, encoder: Encoder
) -> float | None:
    """Return the manifest's `hybrid_weight`; see `index_jobs.store.lexical.fusion`."""
    rows = encoded.rows()
    has_vector = np.isin(pairs.rows, rows).tolist()
    telling = [
        (text, int(np.searchsorted(rows, row)))
        for text, row, is_scored in zip(pairs.texts, pairs.rows, has_vector, strict=True)
        if is_scored and text.casefold() != gallery.table["caption"][row].as_py().casefold()
    ]
    if len(telling) < _MIN_TEXTS:
        return None
    vectors = encoder.encode_text([text for text, _ in telling])
    queries = [(text, vector, row) for (text, row), vector in zip(telling, vectors, strict=True)]
    sample = index.vectors(spread_rows(np.arange(index.count)))
    return choose_weight(index, LexicalIndex(staging / LEXICAL), sample, queries)


def caption_queries(table: pa.Table, encoder: Encoder) -> HeldOutQueries | None:
    """Return evenly spread captions as held-out queries; None if less than half of the images have one."""
    step = max(1, -(-table.num_rows // MAX_QUERIES))
    column = table["caption"]  # read cell by cell, because `take` joins all text first and fails at 2 GiB
    sampled = [column[row].as_py() for row in range(0, table.num_rows, step)]
    captions = [caption for caption in sampled if caption]
    if 2 * len(captions) < len(sampled):
        return None
    return HeldOutQueries(encoder.encode_text(captions), "captions", np.full(len(captions), -1))
