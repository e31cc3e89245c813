"""One opened version of an index: search, items and vectors.

- A version never changes after publication, so readers need no lock. A removed version
  stays usable while it is open, on systems that keep open files, as Linux and macOS do.
- A version has parts: what was built, and later additions. Removed items are a list of
  rows, so an update shares all other files with the previous version.
- Rows are numbered through all parts. A removed row keeps its number and is never
  found, by a search or by its id.
- Opening checks that every file has its full length; `stores.verify` also compares its
  hash.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    StoreUnavailableError,
    list_fields,
)
from dcar_core.util.files import atomic_writer
from index_jobs.engines.protocol import (
    ScoredRows,
    VectorIndex,
    load_engine,
    merge_top_k,
    no_results,
)
from index_jobs.gallery.locations import (
    LOCAL_SCHEMES,
    REMOTE_SCHEMES,
    WHOLE_FILE,
    is_url,
    join_location,
    open_image,
)
from index_jobs.index.items import Items, common_type, take_rows, typed_array
from index_jobs.index.lexical import LexicalIndex, spread_rows
from index_jobs.index.manifest import (
    CHANGED,
    CHECKPOINT,
    ITEMS,
    LEXICAL,
    REMOVED,
    Manifest,
)
from index_jobs.index.stores import location_of
from index_jobs.row_filter import NO_ROWS, RowFilter

_ITEM_COLUMNS = ("id", "caption", "category", "width", "height")
_CACHED_ITEMS = 4096  # some 2 MB of objects


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the gallery. Missing texts are "".

    fields: the metadata as JSON, in the mapped file. width, height: of the upright
    image in pixels, if they are known.
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
    """Limits on reading a gallery, which may change after indexing: nothing outside its
    root unless allowed.

    roots: further directories. hosts: hosts, or buckets, that rows with a URL may name.
    max_bytes: of an image file.
    """

    roots: tuple[Path, ...] = ()
    hosts: frozenset[str] = frozenset()
    max_bytes: int = 64 * 2**20

    def resolve(
        self,
        root: str,
        location: str,
        offset: int,
        size: int,
        roots: Sequence[str] = (),
    ) -> str:
        """Return the location to read an image from, with links resolved. The first
        arguments are as for `open_image`.

        roots: further folders or URLs of the index. Raise OSError if it may not be
        read, or the file is too large.
        """
        if is_url(location):
            url = urlsplit(location)
            folder = location.rpartition("/")[0] + "/"
            if ".." not in location.split("/") and any(
                folder.startswith(root.rstrip("/") + "/") for root in roots
            ):
                return location
            if (
                url.scheme not in REMOTE_SCHEMES
                or "::" in location
                or url.hostname not in self.hosts
            ):
                raise PermissionError(
                    errno.EACCES,
                    "its host is not in DCAR_IMAGE_HOSTS",
                    location,
                )
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
        if not any(
            resolved.is_relative_to(os.path.realpath(base))
            for base in (*bases, *self.roots)
        ):
            raise PermissionError(
                errno.EACCES,
                "outside of the gallery and DCAR_IMAGE_ROOTS",
                location,
            )
        if (resolved.stat().st_size if offset == WHOLE_FILE else size) > self.max_bytes:
            raise OSError(errno.EFBIG, "the image file is too large", location)
        return str(resolved)


class Part(NamedTuple):
    """What was built, or an addition.

    rows: their numbers in the version. root: the base of relative image locations.
    roots: the folders of absolute ones.
    """

    rows: range
    vectors: VectorIndex
    items: Items
    root: str
    roots: Sequence[str]


class IndexVersion:
    """One opened version. Many threads may share it.

    index: the directory. rows: their number, removed ones included. removed: rows whose
    item was removed. changed: rows whose fields differ from those that the engine
    stored with the vectors; both ascend. image_access: limits on the images that are
    read; None for no limit.
    """

    def __init__(
        self,
        index: Path,
        manifest: Manifest,
        parts: Sequence[Part],
        removed: Rows = NO_ROWS,
        changed: Rows = NO_ROWS,
        image_access: ImageAccess | None = None,
    ) -> None:
        self.index = index
        self.manifest = manifest
        self.parts = parts
        self.image_access = image_access
        self.removed = removed
        self.changed = changed
        self._items = dict[int, Item]()
        # fields of lists of texts that no item stores
        self.computed: Mapping[str, Callable[[], pa.ChunkedArray]] = {}
        self.rows = parts[-1].rows.stop if parts else 0

    @classmethod
    def open(
        cls,
        index: Path,
        manifest: Manifest,
        image_access: ImageAccess | None = None,
    ) -> "IndexVersion":
        """Open a version of an index directory. Raise ArtifactError if a file is
        missing, too short or unreadable.
        """
        check_files(index, manifest)
        try:
            engine = load_engine(manifest.spec.engine)
        except DataError as error:
            raise ArtifactError(f"{index} cannot be opened: {error}") from None
        own = str(index.absolute())  # of images that were put
        places = [("", manifest.root or own, manifest.roots)]
        places += [
            (f"{addition.folder}/", own, addition.roots)
            for addition in manifest.additions
        ]
        parts = list[Part]()
        start = 0
        for prefix, root, roots in places:
            vectors = engine.open(manifest.paths(index, prefix), manifest.spec.kind)
            items = Items(manifest.path(index, f"{prefix}{ITEMS}"))
            parts.append(
                Part(range(start, start + len(items)), vectors, items, root, roots)
            )
            start += len(items)
        fits = all(
            (part.vectors.count, part.vectors.dim) == (len(part.rows), manifest.dim)
            for part in parts
        )
        if start != manifest.rows or not fits:
            name = f"version {manifest.version} of {location_of(index)}"
            raise ArtifactError(
                f"the files of {name} do not fit together; roll back, or rebuild the"
                " index"
            )
        removed, changed = (
            read_rows(manifest.path(index, name)) if name in manifest.files else NO_ROWS
            for name in (REMOVED, CHANGED)
        )
        return cls(index, manifest, parts, removed, changed, image_access)

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
        lexical = LexicalIndex(
            self.folder / LEXICAL,
            f"{LEXICAL} of version {self.manifest.version} of {self.index}",
        )
        if len(lexical) != self.rows:
            raise ArtifactError(
                f"{lexical.name} has {len(lexical):,} rows, but the index {self.rows:,}"
            )
        return lexical

    @cached_property
    def sample_vectors(self) -> Floats:
        """Vectors (m, E) of evenly spread items, which show how widely cosines vary;
        empty if the index keeps none.
        """
        try:
            return self.vectors(self._nth_live(spread_rows(self.manifest.count)))
        except StoreUnavailableError:
            raise
        except ArtifactError:
            return np.empty((0, self.manifest.dim), np.float32)

    def _nth_live(self, positions: Rows) -> Rows:
        """Return the rows at these positions among the live ones."""
        return positions + np.searchsorted(
            self.removed - np.arange(len(self.removed)),
            positions,
            "right",
        )

    def _is_removed(self, row: int) -> bool:
        position = int(np.searchsorted(self.removed, row))
        return position < len(self.removed) and bool(self.removed[position] == row)

    @cached_property
    def folder(self) -> Path:
        """Links to the files by their names, for libraries that open a folder. It lives
        as long as this object.
        """
        folder = Path(tempfile.mkdtemp(prefix=f"dcar-{self.manifest.version}-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        link_files(self.manifest.paths(self.index), folder)
        return folder

    @property
    def checkpoint(self) -> Path:
        """The model that encoded the vectors, for `Encoder.load`; in `folder`."""
        return (self.folder if self.manifest.version else self.index) / CHECKPOINT

    def search(
        self,
        vectors: Floats,
        k: int,
        rows: RowFilter | None = None,
        *,
        is_narrow: bool = False,
    ) -> ScoredRows:
        """Return the k best rows for each normalized query (n, E), as
        `VectorIndex.search` does.

        rows: live rows that may be found; None for all. Raise ArtifactError for vectors
        of another length.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.manifest.dim:
            raise ArtifactError(
                f"the index has vectors of {self.manifest.dim}, but the queries are"
                f" {vectors.shape}"
            )
        if rows is None and len(self.removed):
            rows = self.live_rows
        if len(self.parts) == 1:
            return self.parts[0].vectors.search(vectors, k, rows, is_narrow=is_narrow)
        best = no_results(len(vectors))
        for part in self.parts:
            chosen = None if rows is None else rows.part(part.rows)
            part_scores, positions = part.vectors.search(
                vectors,
                k,
                chosen,
                is_narrow=is_narrow,
            )
            part_rows = np.where(positions >= 0, positions + part.rows.start, -1)
            best = merge_top_k([best[0], part_scores], [best[1], part_rows], k)
        return best

    def vectors(self, rows: Rows) -> Floats:
        """Return the vectors of rows, as `VectorIndex.vectors`. Raise IndexError if one
        does not exist.
        """
        for row in rows[(rows < 0) | (rows >= self.rows)][:1]:
            self.locate(int(row))  # raises
        vectors = np.empty((len(rows), self.manifest.dim), np.float32)
        for part in self.parts:
            inside = (rows >= part.rows.start) & (rows < part.rows.stop)
            if inside.any():
                vectors[inside] = part.vectors.vectors(rows[inside] - part.rows.start)
        return vectors

    def locate(self, row: int) -> tuple[Part, int]:
        """Return the part of a row, and its number there. Raise IndexError if the row
        is unknown or removed.
        """
        if self._is_removed(row):
            raise IndexError(f"row {row} was removed")
        for part in self.parts:
            if row in part.rows:
                return part, row - part.rows.start
        raise IndexError(f"row {row} is not in 0..{self.rows - 1}")

    def row_of(self, item_id: str) -> int | None:
        """Return the live row of an id, or None; newer parts first, since an item may
        have been replaced.
        """
        for part in reversed(self.parts):
            position = part.items.row_of(item_id)
            if position is not None and not self._is_removed(
                row := position + part.rows.start
            ):
                return row
        return None

    def live_table(self, *names: str) -> pa.Table:
        """Return columns of the live items' table; see `Items.table`."""
        tables = [part.items.table().select(names) for part in self.parts]
        return pa.concat_tables(tables).filter(pa.array(self.live))

    @cached_property
    def _types(self) -> dict[str, pa.DataType]:
        types = dict[str, pa.DataType]()
        for part in self.parts:
            for name, field_type in part.items.fields.items():
                types[name] = common_type(types.get(name, field_type), field_type)
        return types

    @cached_property
    def stored_fields(self) -> dict[str, str]:
        """Arrow types of id, caption, category and the metadata fields."""
        return {name: str(field_type) for name, field_type in self._types.items()}

    @property
    def fields(self) -> dict[str, str]:
        """Arrow types of the fields that `column` accepts: those that are stored, and
        computed ones.
        """
        return self.stored_fields | dict.fromkeys(
            self.computed, str(pa.list_(pa.string()))
        )

    def column(self, name: str, rows: Rows | None = None) -> pa.ChunkedArray:
        """Return one field of every row, or of some, ascending; null where an item
        lacks it. Raise DataError.
        """
        if name in self.computed:
            column = self.computed[name]()
            return column if rows is None else column.take(pa.array(rows))
        if name not in self._types:
            raise DataError(
                f"no item has the field {name!r}; there are: {list_fields(self.fields)}"
            )
        target = self._types[name]
        chunks = list[pa.Array]()
        for span, _, items, *_ in self.parts:
            table = pa.table(
                {
                    name: (
                        items.column(name)
                        if name in items.fields
                        else pa.nulls(len(items), target)
                    )
                }
            )
            if rows is not None:
                table = take_rows(
                    table, rows[(rows >= span.start) & (rows < span.stop)] - span.start
                )
            column = table[name]
            chunks += (
                column.chunks
                if column.type == target
                else [typed_array(column.to_pylist(), target)]
            )
        return pa.chunked_array(chunks, target)

    def item(self, row: int) -> Item:
        """Return one item; recent ones are cached. Raise IndexError if the row is
        unknown or removed.
        """
        if (cached := self._items.get(row)) is not None:
            return cached
        part, position = self.locate(row)
        columns = part.items.columns
        cells = [columns[name][position].as_py() for name in _ITEM_COLUMNS]
        item = Item(*[*cells, columns["metadata"][position]])
        if len(self._items) >= _CACHED_ITEMS:
            self._items.clear()
        self._items[row] = item
        return item

    def image_location(self, row: int) -> tuple[str, int]:
        """Return the file of a row's image, and the offset in it."""
        part, position = self.locate(row)
        location, offset = (
            part.items.columns[name][position].as_py()
            for name in ("location", "offset")
        )
        return join_location(part.root, location), offset

    def image_bytes(self, row: int) -> bytes:
        """Return the file of the row's image. Raise IndexError for no row,
        ArtifactError if it cannot be read.
        """
        try:
            file, size = open_image(*self._location_parts(row))
            with file:
                return file.read(size)
        except OSError as error:
            raise ArtifactError(
                f"the image of item {self.item(row).id!r} cannot be read from the"
                f" gallery {self.manifest.spec.gallery}: {error.strerror or error}"
            ) from error

    def _location_parts(self, row: int) -> tuple[str, str, int, int]:
        """Return root, location, offset and size of the row's image; OSError if it may
        not be read.
        """
        part, position = self.locate(row)
        columns = part.items.columns
        location, offset, size = (
            columns[name][position].as_py() for name in ("location", "offset", "size")
        )
        if self.image_access is not None:
            location = self.image_access.resolve(
                part.root,
                location,
                offset,
                size,
                part.roots,
            )
        return part.root, location, offset, size

    def image_key(self, row: int) -> str:
        """Return 32 hexadecimal digits that change with the location, size and time of
        the row's image file.

        The image of a row with a URL counts as new with each version of the index.
        Errors are those of `image_bytes`.
        """
        try:
            root, location, offset, size = self._location_parts(row)
            joined = join_location(root, location)
            state = f"version {self.manifest.version}"
            if not is_url(joined):
                status = Path(joined).stat()
                state = f"{status.st_mtime_ns}-{status.st_size}"
        except OSError as error:
            raise ArtifactError(
                f"the image of row {row} cannot be read: {error.strerror or error}"
            ) from error
        key = repr((root, location, offset, size, state))
        return hashlib.blake2b(key.encode(errors="replace"), digest_size=16).hexdigest()

    def require(self, fingerprint: str) -> None:
        """Raise ArtifactError, which names the command to run, for an encoder that did
        not encode this index.
        """
        if fingerprint != self.manifest.spec.fingerprint:
            index = location_of(self.index)
            spec = self.manifest.spec
            raise ArtifactError(
                f"version {self.manifest.version} of {index} was built by encoder"
                f" {spec.fingerprint[:12]}, not by {fingerprint[:12]}; run: python -m"
                f" index_jobs.rebuild --gallery {spec.gallery} --checkpoint"
                f" CHECKPOINT_OF_THIS_ENCODER --out {index}"
            )


def link_files(paths: Mapping[str, Path], folder: Path) -> None:
    """Put links to files into a folder, by their names."""
    for name, path in paths.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.absolute())


def check_files(index: Path, manifest: Manifest) -> None:
    """Raise ArtifactError if a file of a version is missing or has another length."""
    for name, info in manifest.files.items():
        path = index / info.key
        size = path.stat().st_size if path.is_file() else None
        if size != info.size:
            if size is None:
                state = "is missing"
            else:
                state = f"has {size:,} bytes, not {info.size:,}"
            raise ArtifactError(
                f"{path} {state}: {name} of version {manifest.version}; roll back, or"
                " rebuild the index"
            )


def write_rows(path: Path, rows: Rows) -> None:
    with atomic_writer(path) as file:
        np.save(file, rows.astype(np.int64), allow_pickle=False)


def read_rows(path: Path) -> Rows:
    """Read row numbers. Raise ArtifactError if the file is damaged."""
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.int64)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}; roll back, or rebuild the index"
        ) from error
