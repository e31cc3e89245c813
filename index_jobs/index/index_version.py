"""One opened version of an index: search, items and vectors.

- A version never changes after publication, so readers need no lock. A removed version stays usable while it is open,
  on systems that keep open files, as Linux and macOS do.
- A built version is one segment. Later additions are segments of their own, and removed items are a list of rows, so an
  update shares all other files with the previous version.
- Rows are numbered through all segments. A removed row keeps its number and is never found, by a search or by its id.
- Opening checks that every file has its full length; `storage.read_files` also compares its hash.
- Many threads may share a version.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError, DataError, FingerprintError, StoreUnavailableError, list_fields
from dcar_core.util.files import atomic_writer
from index_jobs.engines.protocol import ScoredRows, VectorIndex, load_engine, merge_top_k
from index_jobs.gallery.storage import LOCAL_SCHEMES, REMOTE_SCHEMES, WHOLE_FILE, is_url, join_location, open_image
from index_jobs.index.items import Items, common_type, take_rows, typed_array
from index_jobs.index.lexical.fusion import spread_rows
from index_jobs.index.lexical.lexical_index import LexicalIndex
from index_jobs.index.location import location_of
from index_jobs.index.manifest import CHANGED, CHECKPOINT, ITEMS, LEXICAL, REMOVED, Manifest
from index_jobs.row_filter import NO_ROWS, RowFilter

_ITEM_COLUMNS = ("id", "caption", "category", "width", "height")
_CACHED_ITEMS = 4096  # some 2 MB of objects
_CACHED_BYTES = 2048  # of the texts of one; longer ones are read again
_SAMPLE = 16  # images whose presence stands for the gallery's


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the gallery. Missing texts are "".

    fields: the metadata as JSON, which stay in the mapped file until they are parsed. width, height: of the upright
    image in pixels; None if the index does not know them.
    """

    id: str
    caption: str
    category: str
    width: int | None
    height: int | None
    fields: pa.StringScalar

    @property
    def metadata(self) -> dict[str, Any]:
        """Fields without a column of their own."""
        value: dict[str, Any] = json.loads(self.fields.as_py())
        return value

    @property
    def metadata_bytes(self) -> int:
        """Length of the metadata as JSON."""
        return int(self.fields.as_buffer().size)

    @property
    def text_bytes(self) -> int:
        """Memory of the texts outside of the mapped file."""
        return sum(map(sys.getsizeof, (self.id, self.caption, self.category)))


@dataclass(frozen=True, slots=True)
class ImageAccess:
    """Limits of a service on the images that it reads from a gallery.

    A gallery can change after indexing: a file becomes a link to another one, and a list may name any path or URL. The
    index records the gallery's root, and a service reads nothing beyond it unless its operator allows more.

    roots: directories that may be read in addition to the gallery's root. hosts: hosts, or buckets, that rows with a
    URL may name. max_bytes: largest image file.
    """

    roots: tuple[Path, ...] = ()
    hosts: frozenset[str] = frozenset()
    max_bytes: int = 64 * 2**20

    def resolve(self, root: str, location: str, offset: int, size: int, roots: Sequence[str] = ()) -> str:
        """Return the location to read an image from, with links resolved.

        Args:
            root, location, offset, size: as for `open_image`.
            roots: further folders or URLs of the index, for absolute locations.

        Raises:
            OSError: the location may not be read, or the file is too large.
        """
        if is_url(location):
            url, folder = urlsplit(location), location.rpartition("/")[0] + "/"
            if ".." not in location.split("/") and any(folder.startswith(each.rstrip("/") + "/") for each in roots):
                return location
            if url.scheme not in REMOTE_SCHEMES or "::" in location or url.hostname not in self.hosts:
                raise PermissionError(errno.EACCES, "its host is not in DCAR_IMAGE_HOSTS", location)
            return location
        if urlsplit(root).scheme in LOCAL_SCHEMES:
            root = urlsplit(root).path
        joined = join_location(root, location)
        if is_url(joined):
            if ".." in location.split("/"):
                raise PermissionError(errno.EACCES, "outside of the gallery", location)
            return location
        resolved = Path(os.path.realpath(joined))
        bases = [Path(base) for base in (root, *roots) if base and not is_url(base)]
        if not any(resolved.is_relative_to(os.path.realpath(base)) for base in (*bases, *self.roots)):
            raise PermissionError(errno.EACCES, "outside of the gallery and DCAR_IMAGE_ROOTS", location)
        if (resolved.stat().st_size if offset == WHOLE_FILE else size) > self.max_bytes:
            raise OSError(errno.EFBIG, "the image file is too large", location)
        return str(resolved)


@dataclass(frozen=True)
class Segment:
    """Vectors, their items, the base of the items' relative image locations, and the folders of absolute ones."""

    vectors: VectorIndex
    items: Items
    root: str
    roots: Sequence[str]


class IndexVersion:
    """One opened version.

    index: the directory. rows: their number, removed ones included; row numbers are 0..rows - 1. removed: rows whose
    item was removed. changed: rows whose fields differ from those that the engine stored with the vectors, ascending.
    image_access: limits on the images that are read; None for no limit. known: rows of items of recent searches, by id.
    """

    def __init__(
        self, index: Path, manifest: Manifest, segments: Sequence[Segment], removed: Rows, changed: Rows = NO_ROWS,
        image_access: ImageAccess | None = None,
    ) -> None:  # fmt: skip
        """Take the opened parts of a version; `open` opens them."""
        self.index, self.manifest, self.segments, self.image_access = index, manifest, segments, image_access
        self.removed, self.changed, self._items, self.known = removed, changed, dict[int, Item](), dict[str, int]()
        stops = np.cumsum([0, *(segment.vectors.count for segment in segments)]).tolist()
        self._spans, self.rows = [range(*span) for span in pairwise(stops)], stops[-1]

    @classmethod
    def open(cls, index: Path, manifest: Manifest, image_access: ImageAccess | None = None) -> "IndexVersion":
        """Open a version of an index directory; see `index_jobs.index.versions`.

        Raises:
            ArtifactError: a file is missing, too short or unreadable, or the files do not fit together.
        """
        _check_sizes(index, manifest)
        try:
            engine = load_engine(manifest.spec.engine)
        except DataError as error:
            raise ArtifactError(f"{index} cannot be opened: {error}") from None
        built = engine.open(manifest.paths(index), gpu=manifest.gpu)
        own = str(index.absolute())  # of images that were put
        segments = [Segment(built, Items(manifest.path(index, ITEMS)), manifest.root or own, manifest.roots)]
        for addition in manifest.additions:
            vectors = engine.open(manifest.paths(index, f"{addition.folder}/"))
            items = Items(manifest.path(index, f"{addition.folder}/{ITEMS}"))
            segments.append(Segment(vectors, items, own, addition.roots))
        added = [addition.count for addition in manifest.additions]
        total, name = manifest.rows, f"version {manifest.version} of {location_of(index)}"
        for segment, count in zip(segments, [total - sum(added), *added], strict=True):
            actual = (segment.vectors.count, len(segment.items), segment.vectors.dim)
            if actual != (count, count, manifest.dim):
                raise ArtifactError(
                    f"{name} does not fit together: {actual[0]} vectors of {actual[2]} and {actual[1]} items, but the "
                    f"manifest says {count} of {manifest.dim}; roll back, or rebuild the index"
                )
        removed = read_rows(manifest.path(index, REMOVED), total) if manifest.removed else NO_ROWS
        if len(removed) != manifest.removed:
            raise ArtifactError(f"{REMOVED} of {name} does not fit the manifest; roll back, or rebuild the index")
        changed = read_rows(manifest.path(index, CHANGED), total) if CHANGED in manifest.files else NO_ROWS
        return cls(index, manifest, segments, removed, changed, image_access)

    @cached_property
    def live(self) -> Mask:
        """bool (rows,), read-only: false where the item was removed."""
        mask = np.ones(self.rows, np.bool_)
        mask[self.removed] = False
        mask.flags.writeable = False
        return mask

    @cached_property
    def live_rows(self) -> RowFilter:
        """The rows whose item was not removed."""
        return RowFilter(lambda: self.live, {}, self.removed)

    @cached_property
    def lexical(self) -> LexicalIndex:
        """The words of the items. Raise ArtifactError if the index cannot be read."""
        lexical = LexicalIndex(self.folder / LEXICAL, f"{LEXICAL} of version {self.manifest.version} of {self.index}")
        if len(lexical) != self.rows:
            raise ArtifactError(f"{lexical.name} has {len(lexical):,} rows, but the index {self.rows:,}")
        return lexical

    @cached_property
    def sample_vectors(self) -> Floats:
        """Vectors (m, E) of evenly spread items, which show how widely cosines vary; empty if the index keeps none."""
        try:
            return self.vectors(self._nth_live(spread_rows(self.manifest.count)))
        except StoreUnavailableError:
            raise
        except ArtifactError:
            return np.empty((0, self.manifest.dim), np.float32)

    def _nth_live(self, places: Rows) -> Rows:
        """Return the rows at these places among those that were not removed."""
        return places + np.searchsorted(self.removed - np.arange(len(self.removed)), places, "right")

    def _is_removed(self, row: int) -> bool:
        place = int(np.searchsorted(self.removed, row))
        return place < len(self.removed) and bool(self.removed[place] == row)

    @cached_property
    def folder(self) -> Path:
        """Links to the files by their names, for libraries that open a folder. It lives as long as this object."""
        folder = Path(tempfile.mkdtemp(prefix=f"dcar-{self.manifest.version}-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        link_files(self.manifest.paths(self.index), folder)
        return folder

    @property
    def checkpoint(self) -> Path:
        """The model that encoded the vectors, for `Encoder.load`; in `folder`."""
        return (self.folder if self.manifest.version else self.index) / CHECKPOINT

    def search(self, vectors: Floats, k: int, rows: RowFilter | None = None, *, is_narrow: bool = False) -> ScoredRows:
        """Return the k best rows for each query.

        Args:
            vectors: float32 (n, E), L2-normalized.
            rows: live rows that may be found; None for all of them.
            is_narrow: as in `VectorIndex.search`.

        Returns:
            scores float32 (n, k), best first, and rows int64 (n, k), -1 where there are fewer than k.

        Raises:
            ArtifactError: the vectors have another length than those of the index.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.manifest.dim:
            raise ArtifactError(f"the index has vectors of {self.manifest.dim}, but the queries are {vectors.shape}")
        if rows is None and len(self.removed):
            rows = self.live_rows
        if len(self.segments) == 1:
            return self.segments[0].vectors.search(vectors, k, rows, is_narrow=is_narrow)
        scores, found = [np.empty((len(vectors), 0), np.float32)], [np.empty((len(vectors), 0), np.int64)]
        for segment, span in zip(self.segments, self._spans, strict=True):
            part = None if rows is None else rows.part(span)
            segment_scores, positions = segment.vectors.search(vectors, k, part, is_narrow=is_narrow)
            scores.append(segment_scores)
            found.append(np.where(positions >= 0, positions + span.start, -1))
        return merge_top_k(scores, found, k)

    def find_store_fault(self) -> str | None:
        """Ask the engine whether it can be searched. Return why not, or None."""
        return next(filter(None, (segment.vectors.find_fault() for segment in self.segments)), None)

    def vectors(self, rows: Rows) -> Floats:
        """Return the vectors of rows int64 (m,): float32 (m, E), normalized; approximate for a compressing kind.

        Raises:
            IndexError: the row does not exist.
            ArtifactError: this kind of index cannot reconstruct vectors.
        """
        for row in rows[(rows < 0) | (rows >= self.rows)][:1]:
            self.locate(int(row))  # raises
        vectors = np.empty((len(rows), self.manifest.dim), np.float32)
        for segment, span in zip(self.segments, self._spans, strict=True):
            inside = (rows >= span.start) & (rows < span.stop)
            if inside.any():
                vectors[inside] = segment.vectors.vectors(rows[inside] - span.start)
        return vectors

    def locate(self, row: int) -> tuple[Segment, int]:
        """Return the segment of a row, and its number there. Raise IndexError if the row is unknown or removed."""
        if self._is_removed(row):
            raise IndexError(f"row {row} was removed")
        for segment, span in zip(self.segments, self._spans, strict=True):
            if span.start <= row < span.stop:
                return segment, row - span.start
        raise IndexError(f"row {row} is not in 0..{self.rows - 1}")

    def row_of(self, item_id: str) -> int | None:
        """Return the live row of an id, or None; newer segments first, since an item may have been replaced."""
        if (known := self.known.get(item_id)) is not None:
            return known
        for segment, span in zip(reversed(self.segments), reversed(self._spans), strict=True):
            row = segment.items.row_of(item_id)
            if row is not None and not self._is_removed(row + span.start):
                return int(row + span.start)
        return None

    @cached_property
    def _types(self) -> dict[str, pa.DataType]:
        types = dict[str, pa.DataType]()
        for segment in self.segments:
            for name, field_type in segment.items.fields.items():
                types[name] = common_type(types.get(name, field_type), field_type)
        return types

    @cached_property
    def fields(self) -> dict[str, str]:
        """Arrow types of the fields that `column` accepts: id, caption, category and the metadata fields."""
        return {name: str(field_type) for name, field_type in self._types.items()}

    def column(self, name: str, rows: Rows | None = None) -> pa.ChunkedArray:
        """Return one field of every row, or of some, ascending; null where an item lacks it.

        Raise DataError if no segment has the field.
        """
        if name not in self._types:
            raise DataError(f"no item has the field {name!r}; there are: {list_fields(self.fields)}")
        target = self._types[name]
        chunks = list[pa.Array]()
        for items, span in zip((segment.items for segment in self.segments), self._spans, strict=True):
            table = pa.table({name: items.column(name) if name in items.fields else pa.nulls(len(items), target)})
            if rows is not None:
                table = take_rows(table, rows[(rows >= span.start) & (rows < span.stop)] - span.start)
            column = table[name]
            chunks += column.chunks if column.type == target else [typed_array(column.to_pylist(), target)]
        return pa.chunked_array(chunks, target)

    def item(self, row: int) -> Item:
        """Return one item; recent short ones are cached. Raise IndexError if the row is unknown or removed."""
        if (cached := self._items.get(row)) is not None:
            return cached
        segment, position = self.locate(row)
        cells = [segment.items.cell(position, column) for column in _ITEM_COLUMNS]
        item = Item(*[*cells, segment.items.scalar(position, "metadata")])
        if item.text_bytes > _CACHED_BYTES:
            return item
        if len(self._items) >= _CACHED_ITEMS:
            self._items.clear()
            self.known.clear()
        self._items[row], self.known[item.id] = item, row
        return item

    def image_location(self, row: int) -> tuple[str, int]:
        """Return the file of a row's image, and the offset in it."""
        segment, position = self.locate(row)
        location = join_location(segment.root, segment.items.cell(position, "location"))
        return location, segment.items.cell(position, "offset")

    def image_bytes(self, row: int) -> bytes:
        """Return the file of the row's image.

        Raises:
            IndexError: the row does not exist.
            ArtifactError: the image cannot be read.
        """
        try:
            file, size = open_image(*self._location_parts(row))
            with file:
                return file.read(size)
        except OSError as error:
            raise ArtifactError(
                f"the image of item {self.item(row).id!r} cannot be read from the gallery "
                f"{self.manifest.spec.gallery}: {error.strerror or error}"
            ) from error

    def _location_parts(self, row: int) -> tuple[str, str, int, int]:
        """Return root, location, offset and size of the row's image; OSError if it may not be read."""
        segment, position = self.locate(row)
        location, offset, size = (segment.items.cell(position, column) for column in ("location", "offset", "size"))
        if self.image_access is not None:
            location = self.image_access.resolve(segment.root, location, offset, size, segment.roots)
        return segment.root, location, offset, size

    def find_gallery_fault(self) -> str | None:
        """Return a reason if local images are gone, such as after a move; else None.

        They count as gone if more than half of a sample is missing, or if one is missing and so is the whole folder of
        its gallery.
        """
        count = self.manifest.count
        sample = self._nth_live(np.linspace(0, count - 1, min(count, _SAMPLE), dtype=np.int64))
        sampled = [self.image_location(row)[0] for row in sample.tolist()]
        paths = [path for path in sampled if not is_url(path)]
        missing = [path for path in paths if not os.path.exists(path)]  # noqa: PTH110
        if 2 * len(missing) > len(paths):
            return f"{len(missing)} of {len(paths)} sampled images are not in the gallery, such as {missing[0]}"
        gone = [root for root in self.manifest.folders if not is_url(root) and not os.path.exists(root)]  # noqa: PTH110
        lost = next((path for path in missing if path.startswith(tuple(f"{root}/" for root in gone))), None)
        return f"a folder of the gallery is gone, with images such as {lost}" if lost else None

    def image_key(self, row: int) -> str:
        """Return 32 hexadecimal digits that change with the location, size and time of the row's image file.

        The image of a row with a URL counts as new with each version of the index.

        Raises:
            IndexError: the row does not exist.
            ArtifactError: the image may not be read, or its file is missing.
        """
        try:
            root, location, offset, size = self._location_parts(row)
            joined, version = join_location(root, location), f"version {self.manifest.version}"
            if not is_url(joined):
                status = Path(joined).stat()
                version = f"{status.st_mtime_ns}-{status.st_size}"
        except OSError as error:
            raise ArtifactError(f"the image of row {row} cannot be read: {error.strerror or error}") from error
        key = f"{root}\0{location}\0{offset}\0{size}\0{version}"
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def require(self, fingerprint: str) -> None:
        """Raise FingerprintError, which names the command to run, for an encoder that did not encode this index."""
        if fingerprint != self.manifest.spec.fingerprint:
            index, spec = location_of(self.index), self.manifest.spec
            raise FingerprintError(
                f"version {self.manifest.version} of {index} was built by encoder {spec.fingerprint[:12]}, not by "
                f"{fingerprint[:12]}; run: python -m index_jobs.rebuild --gallery {spec.gallery} --checkpoint "
                f"CHECKPOINT_OF_THIS_ENCODER --out {index}"
            )


def link_files(paths: Mapping[str, Path], folder: Path) -> None:
    """Put links to files into a folder, by their names."""
    for name, path in paths.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.absolute())


def _check_sizes(index: Path, manifest: Manifest) -> None:
    remedy = f"in version {manifest.version}; roll back, or rebuild the index"
    for name, info in manifest.files.items():
        path = index / info.key
        try:
            size = path.stat().st_size
        except OSError:
            raise ArtifactError(f"{path} is missing, which is {name} {remedy}") from None
        if size != info.size:
            raise ArtifactError(f"{path} has {size:,} bytes, not {info.size:,}; it is {name} {remedy}")


def write_rows(path: Path, rows: Rows) -> None:
    with atomic_writer(path) as file:
        np.save(file, rows.astype(np.int64), allow_pickle=False)


def read_rows(path: Path, total: int) -> Rows:
    """Read row numbers below a total. Raise ArtifactError if the file is damaged."""
    try:
        rows: Rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    rows = rows.reshape(-1).astype(np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < total:
        raise ArtifactError(f"{path} does not fit the manifest; roll back, or rebuild the index")
    return rows
