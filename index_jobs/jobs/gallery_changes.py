"""Comparison of a gallery with the items of the served version, before anything is encoded.

A gallery on a disk that is not mounted looks like one whose images were deleted, so a rebuild refuses to publish a
gallery that lacks many of the served images.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dcar_core.util.errors import GalleryShrunkError
from index_jobs.gallery.scan import Gallery, absolute_locations
from index_jobs.store.artifact import Artifact
from index_jobs.store.manifest import Manifest

_COMPARED = ["caption", "category", "metadata", "size"]


@dataclass(frozen=True)
class GalleryChanges:
    """Number of items that the gallery has beyond the served version, lacks, and has with other contents.

    An item counts as changed if its file's size, caption, category or metadata differ.
    """

    added: int
    removed: int
    changed: int
    example: str  # an item that is gone

    def require_few_removed(self, served: Manifest, source: str, limit: float) -> None:
        """Raise GalleryShrunkError if more than this share of the served items is gone."""
        if self.removed > limit * served.count:
            raise GalleryShrunkError(
                f"not published: {self.removed:,} of the {served.count:,} images of version {served.version} are gone "
                f"from {source}, such as {self.example}, and at most {limit:.0%} may be; mount or restore what is "
                f"missing, or give --force if they are meant to be gone (--max-vanished sets the limit)"
            )


def count_changes(served: Artifact, table: pa.Table) -> GalleryChanges:
    """Compare a gallery's table, or the rows of it that can be indexed, with a served version by their ids."""
    rows = np.flatnonzero(served.live)
    served_ids, ids = served.column("id").filter(served.live), table["id"]
    positions = pc.fill_null(pc.index_in(ids, served_ids), -1).to_numpy()
    is_kept = positions >= 0
    before = np.concatenate([_hash_rows(segment.items.table()) for segment in served.segments])
    changed = before[rows[positions[is_kept]]] != _hash_rows(table)[is_kept]
    gone = np.flatnonzero(~pc.is_in(served_ids, ids).to_numpy())
    example = str(served.item(int(rows[gone[0]])).metadata.get("file_name", "")) if len(gone) else ""
    return GalleryChanges(int((~is_kept).sum()), len(gone), int(changed.sum()), example)


def count_indexed_files(served: Artifact, gallery: Gallery) -> tuple[int, str]:
    """Return how many images of a gallery are files that live items of other ids have, and one of them or ""."""
    tables = [segment.items.table().select(["id", "location"]) for segment in served.segments]
    live = pa.concat_tables(tables).filter(pa.array(served.live))
    locations = absolute_locations(gallery.table, gallery.root)["location"]
    below_root = pc.replace_substring_regex(locations, f"^{re.escape(served.manifest.root)}/", "")
    is_new = pc.invert(pc.is_in(gallery.table["id"], live["id"]))
    is_indexed = pc.or_(pc.is_in(locations, live["location"]), pc.is_in(below_root, live["location"]))
    same = locations.filter(pc.and_(is_new, is_indexed))
    return len(same), same[0].as_py() if len(same) else ""


def _hash_rows(table: pa.Table) -> NDArray[np.int64]:
    """Return a hash of each row's compared columns, int64 (n,), with one batch in memory at a time."""
    batches = table.select(_COMPARED).to_batches()
    hashes = (map(hash, zip(*(column.to_pylist() for column in batch.columns), strict=True)) for batch in batches)
    return np.array([value for batch in hashes for value in batch], np.int64)
