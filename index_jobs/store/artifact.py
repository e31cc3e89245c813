"""A published index as its readers see it: open, search, verify. What the service has of this room.

INDEX/CURRENT                    one line, the version that is served; replaced atomically
INDEX/versions/<n>/manifest.json fingerprint, counts, kind, measurements, checksums of the other files and of itself
INDEX/versions/<n>/index.faiss   vectors, memory-mapped
INDEX/versions/<n>/milvus.json   in its place: which collection of which Milvus holds them
INDEX/versions/<n>/items.arrow   ids, captions, metadata and where each picture lies, memory-mapped
INDEX/versions/<n>/added-<m>/    vectors and items that were added after it was built; see `parts`
INDEX/versions/<n>/removed.npy   rows of items that were removed after it was built
INDEX/versions/<n>/failed.jsonl  pictures that could not be read, with the reason
INDEX/versions/<n>/duplicates.jsonl  pictures whose pixels an earlier one has
INDEX/versions/<n>/checkpoint/   the model that made the vectors

- A version never changes once it has its name, so readers need no lock. One that is removed while it is open stays
  usable where the system keeps open files, as Linux and macOS do.
- Opening checks that every file is there at its full length; `verify` also reads them all.
- An artifact may be used by many threads at once.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.errors import ArtifactError, FingerprintError
from dcar_core.util.files import sha256_of
from index_jobs.gallery.storage import read_image
from index_jobs.store.faiss_search import as_mask
from index_jobs.store.manifest import CHECKPOINT, CURRENT, ITEMS, MANIFEST, REMOVED, VECTORS, VERSIONS, Manifest
from index_jobs.store.segments import Part, Parts, read_removed

if TYPE_CHECKING:
    import pyarrow as pa

    from index_jobs.store.faiss_index import VectorIndex

logger = logging.getLogger(__name__)

_ITEMS = 4096  # kept as objects, some 2 MB: what is found once is often found again


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of the gallery; what was not given is "". fields: the metadata as JSON, for who asks for it."""

    id: str
    caption: str
    category: str
    fields: str

    @property
    def metadata(self) -> dict[str, Any]:
        """The fields that have no column of their own."""
        value: dict[str, Any] = json.loads(self.fields)
        return value


def _read_item(parts: Parts, row: int) -> Item:
    part, place = parts.locate(row)
    return Item(*(part.items.value(place, column) for column in ("id", "caption", "category", "metadata")))


class Artifact:
    """One opened version."""

    def __init__(self, path: Path) -> None:
        """Open the version in directory `path`; see `open_current`.

        Raises:
            ArtifactError: a file is missing, too short or unreadable, or the files do not fit each other.
        """
        self.path = path
        self.manifest = Manifest.read(path / MANIFEST)
        self._check_sizes()
        self._parts = self._open()
        self._item = lru_cache(_ITEMS)(partial(_read_item, self._parts))

    def _open(self) -> Parts:
        from index_jobs.store.faiss_index import FaissIndex
        from index_jobs.store.items import Items

        path, manifest = self.path, self.manifest
        vectors: VectorIndex
        if manifest.milvus:
            from index_jobs.store.milvus import MILVUS, MilvusIndex, Place

            vectors = MilvusIndex(Place.read(path / MILVUS))
        else:
            vectors = FaissIndex.open(path / VECTORS, gpu=manifest.gpu)
        parts = [Part(vectors, Items(path / ITEMS), manifest.root)]
        for addition in manifest.additions:
            folder = path / addition.folder
            parts.append(Part(FaissIndex.open(folder / VECTORS), Items(folder / ITEMS), root=""))
        removed = read_removed(path / REMOVED) if manifest.removed else np.empty(0, np.int64)
        total = manifest.count + manifest.removed
        for part, count in [
            (parts[0], total - sum(addition.count for addition in manifest.additions)),
            *[(part, addition.count) for part, addition in zip(parts[1:], manifest.additions, strict=True)],
        ]:
            found = (part.vectors.count, len(part.items), part.vectors.dim)
            if found != (count, count, manifest.dim):
                raise ArtifactError(
                    f"{path} does not fit together: {found[0]} vectors of {found[2]} and {found[1]} items, but the "
                    f"manifest says {count} of {manifest.dim}; roll back, or rebuild the index"
                )
        if len(removed) != manifest.removed or (len(removed) and not 0 <= removed.min() <= removed.max() < total):
            raise ArtifactError(f"{path / REMOVED} does not fit the manifest; roll back, or rebuild the index")
        return Parts(parts, removed)

    @property
    def checkpoint(self) -> Path:
        """The model that made the vectors, for `Encoder.load`."""
        return self.path / CHECKPOINT

    def search(
        self,
        vectors: NDArray[np.float32],
        k: int,
        allowed: NDArray[np.bool_] | NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best rows for each query.

        Args:
            vectors: float32 (n, E), L2-normalised.
            allowed: the rows that may be found: their numbers, or bool (rows,); None for all.

        Returns:
            scores float32 (n, k), best first, and rows int64 (n, k). Where there are fewer than k, row -1.

        Raises:
            ArtifactError: the vectors are of another length than the index's.
            IndexError: an allowed row does not exist.
            ValueError: k is less than 1, or not one truth value a row.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.manifest.dim:
            raise ArtifactError(f"the index holds vectors of {self.manifest.dim}, but the queries are {vectors.shape}")
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        mask = None if allowed is None else as_mask(allowed, self.rows)
        return self._parts.search(vectors, k, mask)

    @property
    def rows(self) -> int:
        """How many rows there are, removed ones included: row numbers are 0..rows - 1."""
        return self._parts.rows

    @property
    def live(self) -> NDArray[np.bool_]:
        """bool (rows,), read-only: false where an item was removed. Searches find live rows alone."""
        return self._parts.live

    @property
    def fields(self) -> dict[str, str]:
        """What items can be chosen by: id, caption, category and the metadata's fields, each with its Arrow type."""
        return self._parts.fields

    def column(self, name: str) -> "pa.ChunkedArray":
        """One field of every row, memory-mapped, null where an item has none. Meant for filters.

        Raises:
            DataError: no item has such a field.
        """
        return self._parts.column(name)

    def item(self, row: int) -> Item:
        """The item of a row.

        Raises:
            IndexError: no such row, or it was removed.
        """
        return self._item(row)

    def row_of(self, item_id: str) -> int | None:
        """The row of an id, None when there is no such item."""
        return self._parts.row_of(item_id)

    def vector(self, row: int) -> NDArray[np.float32]:
        """The row's vector, float32 (E,); see `vectors`."""
        vector: NDArray[np.float32] = self.vectors(np.array([row]))[0]
        return vector

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of some rows, float32 (m, E), normalised; approximate where the kind compresses.

        Raises:
            IndexError: no such row.
            ArtifactError: this kind of index cannot give vectors back.
        """
        return self._parts.vectors(rows)

    def image_bytes(self, row: int) -> bytes:
        """The picture's file, from the gallery, at the place noted when the index was built.

        Raises:
            IndexError: no such row.
            ArtifactError: the picture is no longer there.
        """
        part, place = self._parts.locate(row)
        location, offset, size = (part.items.value(place, column) for column in ("location", "offset", "size"))
        try:
            return read_image(part.root, location, offset, size)
        except OSError as error:
            raise ArtifactError(
                f"the picture of item {part.items.value(place, 'id')!r} cannot be read from the gallery "
                f"{self.manifest.source}: {error.strerror or error}"
            ) from error

    def require(self, fingerprint: str) -> None:
        """Refuse an encoder that did not make this index.

        Raises:
            FingerprintError: with the command that makes an index for that encoder.
        """
        if fingerprint != self.manifest.fingerprint:
            index = self.path.parent.parent
            raise FingerprintError(
                f"version {self.manifest.version} of {index} was built by encoder {self.manifest.fingerprint[:12]}, "
                f"not by {fingerprint[:12]}; run: python -m index_jobs.rebuild --gallery {self.manifest.source} "
                f"--checkpoint CHECKPOINT_OF_THIS_ENCODER --out {index}"
            )

    def verify(self, *, known: Collection[str] = ()) -> None:
        """Read every file, but the known ones, and compare checksums.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        self._check_sizes()
        for name, info in self.manifest.files.items():
            if name in known:
                continue
            try:
                changed = sha256_of(self.path / name) != info.sha256
            except OSError as error:
                raise ArtifactError(f"{self.path / name} cannot be read: {error.strerror or error}") from error
            if changed:
                raise ArtifactError(
                    f"{self.path / name} is corrupted: its checksum differs; roll back, or rebuild the index"
                )

    def _check_sizes(self) -> None:
        for name, info in self.manifest.files.items():
            path = self.path / name
            try:
                size = path.stat().st_size
            except OSError:
                raise ArtifactError(f"{path} is missing; roll back, or rebuild the index") from None
            if size != info.size:
                raise ArtifactError(
                    f"{path} has {size:,} bytes, but should have {info.size:,}; roll back, or rebuild the index"
                )


def current_version(index: Path) -> int | None:
    """The version that CURRENT names, None when nothing is published. Reads one line; fit for polling.

    Raises:
        ArtifactError: CURRENT cannot be read or names no version.
    """
    try:
        text = (index / CURRENT).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{index / CURRENT} cannot be read: {error}") from error
    if not text.isdigit():
        raise ArtifactError(f"{index / CURRENT} names no version: {text[:40]!r}; roll back to one of `dcar index list`")
    return int(text)


def current_if_known(index: Path) -> int | None:
    """As `current_version`, and None where CURRENT is damaged: for what mends it."""
    try:
        return current_version(index)
    except ArtifactError as error:
        logger.warning("%s", error)
        return None


def require_index(index: Path) -> int:
    """The version that CURRENT names.

    Raises:
        ArtifactError: nothing is published there; the message says what to run.
    """
    version = current_version(index)
    if version is None and version_numbers(index):
        raise ArtifactError(
            f"{index} has versions, but CURRENT is lost; `dcar index rollback {index}` names the newest"
        )
    if version is None:
        raise ArtifactError(
            f"{index} holds no published index; make one with "
            f"`dcar index build --gallery PATH --checkpoint DIR --out {index}`"
        )
    return version


def open_current(index: Path) -> Artifact:
    """Open the published version.

    Raises:
        ArtifactError: nothing is published, or the version is incomplete.
    """
    version = require_index(index)
    while True:
        try:
            return open_version(index, version)
        except ArtifactError:  # a writer may have published anew and removed this one in the meantime
            newest = current_version(index)
            if newest is None or newest == version:
                raise
            version = newest


def open_version(index: Path, version: int) -> Artifact:
    """Open one version.

    Raises:
        ArtifactError: there is no such version, or it is incomplete.
    """
    path = index / VERSIONS / str(version)
    if not path.is_dir():
        have = ", ".join(map(str, version_numbers(index))) or "none"
        raise ArtifactError(f"{index} has no version {version}; it has {have}")
    return Artifact(path)


def version_numbers(index: Path) -> list[int]:
    """Every version on disk, ascending; unfinished ones have no number yet."""
    folder = index / VERSIONS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def read_manifest(index: Path, version: int) -> Manifest:
    """What a version says of itself.

    Raises:
        ArtifactError: it is missing, changed, or of another format.
    """
    return Manifest.read(index / VERSIONS / str(version) / MANIFEST)


def list_versions(index: Path) -> list[Manifest]:
    """The manifests of every version, ascending. One that cannot be read is logged and left out."""
    manifests = []
    for version in version_numbers(index):
        try:
            manifests.append(read_manifest(index, version))
        except ArtifactError as error:
            logger.warning("%s", error)
    return manifests


def verify_index(index: Path) -> list[Manifest]:
    """Verify CURRENT and every version. Returns the manifests of what was verified.

    Raises:
        ArtifactError: the first fault found.
    """
    open_current(index)
    artifacts = [open_version(index, number) for number in version_numbers(index)]
    for artifact in artifacts:
        artifact.verify()
    return [artifact.manifest for artifact in artifacts]
