"""Rows of a snapshot: the masks of filters, vectors, and the values of fields."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.search.errors import InvalidQueryError, UnsupportedQueryError
from app.search.snapshots import Snapshot, drop_oldest
from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError, DataError, StoreUnavailableError
from index_jobs.store import filters
from index_jobs.store.artifact import Artifact

_MAX_MASKS = 16  # cached for one version
_MAX_MASK_BYTES = 64 * 2**20  # of all of them, a byte an item each


def mask_key(filter: dict[str, Any]) -> str:
    """Return the key of a filter in `Snapshot.masks`."""
    return hashlib.sha256(json.dumps(filter, sort_keys=True).encode()).hexdigest()


def filter_mask(snapshot: Snapshot, filter: dict[str, Any]) -> Mask:
    """Return bool (rows,): the rows that fulfil a filter; see `index_jobs.store.filters`. Masks are cached.

    Raises:
        InvalidQueryError: the filter does not fit the index.
    """
    key, masks = mask_key(filter), snapshot.masks
    mask = masks.get(key)
    if mask is None:
        try:
            mask = masks[key] = filters.match_rows(snapshot.artifact, filter)
        except filters.FilterError as error:
            raise InvalidQueryError(f"filter.{error.field}", error.message) from None
        drop_oldest(masks, max(1, min(_MAX_MASKS, _MAX_MASK_BYTES // len(mask))))
    return mask


def row_vectors(artifact: Artifact, rows: Rows | list[int]) -> Floats:
    """Return the stored vectors, float32 (m, E). Raise UnsupportedQueryError if this kind of index keeps none."""
    try:
        return artifact.vectors(np.asarray(rows, np.int64))
    except StoreUnavailableError:
        raise
    except ArtifactError as error:
        message = f"This query needs the vectors of items, and the index does not keep them: {error}"
        raise UnsupportedQueryError(message) from None


def field_values(artifact: Artifact, name: str, option: str) -> pa.ChunkedArray:
    """Return a field of every row, null where an item has none; an empty caption or category counts as missing.

    Raises:
        InvalidQueryError: there is no such field; `option` is the part of the query that names it.
    """
    try:
        column = artifact.column(name)
    except DataError as error:
        raise InvalidQueryError(option, str(error)) from None
    return pc.if_else(pc.equal(column, ""), None, column) if name in filters.EMPTY_IS_MISSING else column
