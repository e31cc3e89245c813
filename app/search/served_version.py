"""One version of an index, ready to search, together with its encoder, and what all
rows of it have in common.

- A request takes one `ServedVersion` and keeps it to its end, so all of its results are
  from one version.
- An encoder in memory is shared by every version of the same fingerprint, and a
  backbone by every encoder on it.
- The masks of filters, the groups that share a value, and the orders of fields are
  cached. A group is for example the images of one product; a row without a value is a
  group of its own.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.core.settings import Settings
from app.search.concepts import Concepts
from app.search.errors import InvalidQueryError, UnsupportedQueryError
from dcar_core import Encoder
from dcar_core.model.catalogue import languages_of
from dcar_core.model.checkpoint import read_config
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    DcarError,
    StoreUnavailableError,
    requires_pytorch,
)
from index_jobs.index import filters
from index_jobs.index.created_collections import empty_version
from index_jobs.index.index_version import ImageAccess, IndexVersion
from index_jobs.index.manifest import CHECKPOINT
from index_jobs.index.versions import open_current, open_version, read_manifest
from index_jobs.row_filter import EMPTY_IS_MISSING, NO_ROWS, RowFilter

MAX_PAGES = 1000  # about 8 kB each
MAX_MASKS = 16
MAX_MASK_BYTES = 64 * 2**20  # of all of them, a byte an item each
_MAX_COLUMNS = 16
_MAX_COLUMN_BYTES = 768 * 2**20  # of all of them, at most 16 bytes an item each
_MAX_VALUE_BYTES = 256  # of a group

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(dict[K, V]):
    """A cache of the `size` entries that were used last. Several threads may use it at
    once.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def use(self, key: K) -> V | None:
        """Return an entry, which is now the one used last; None without it."""
        value = self.get(key)
        if value is not None:
            self.keep(key, value)
        return value

    def find(self, key: K, make: Callable[[], V]) -> V:
        """Return an entry, which is made if it is missing."""
        value = self.use(key)
        if value is None:
            value = make()
            self.keep(key, value)
        return value

    def keep(self, key: K, value: V) -> None:
        """Add or renew an entry, and drop the oldest ones."""
        self.pop(key, None)
        self[key] = value
        if len(self) > self.size:
            for old in [*self][: len(self) - self.size]:
                self.pop(old, None)


class ServedVersion:
    """One version of an index and its encoder."""

    def __init__(
        self,
        encoder: Encoder,
        index: IndexVersion,
        config: Mapping[str, Any],
        settings: Settings,
    ) -> None:
        self.encoder = encoder
        self.index = index
        self.preprocess = replace(encoder.preprocess, max_pixels=settings.max_pixels)
        self.backbone: str = config["backbone"]["sha256"]
        # what users should know about it
        self.model_note = str(config.get("training", {}).get("note", ""))
        self.languages = languages_of(config["backbone"]["model"])
        rows = max(1, index.rows)
        # Pages of results by `Plan.page_key`, rows by `mask_key`, groups and orders by
        # field, and facts for the page.
        self.pages = Recent[Hashable, Any](min(settings.cache_size, MAX_PAGES))
        self.masks = Recent[str, RowFilter](
            max(1, min(MAX_MASKS, MAX_MASK_BYTES // rows))
        )
        self.columns = Recent[Hashable, Any](
            max(1, min(_MAX_COLUMNS, _MAX_COLUMN_BYTES // (16 * rows)))
        )
        self.page_facts = Recent[str, list[Any]](2)
        self.concepts = Concepts(index, partial(row_vectors, index))

    @property
    def version(self) -> int:
        return self.index.manifest.version

    @property
    def min_score(self) -> float | None:
        """The calibrated cut-off; None without calibration."""
        return self.index.manifest.cutoff.get("min_score")

    @cached_property
    def second_stage(self) -> Any:
        """The model's `SecondStage`. The first look may load the model for seconds: not
        in the event loop.
        """
        # importing it takes seconds; the health check need not wait
        with requires_pytorch("re-ranking"):
            from dcar_core.model.dcar import SecondStage

            return SecondStage(self.encoder.model)


def load_served_version(
    index: Path,
    settings: Settings,
    loaded: Sequence[ServedVersion] = (),
    is_empty: bool = False,
    version: int | None = None,
    *,
    warm_up: bool = True,
) -> ServedVersion:
    """Open a version of an index, and load its model.

    Args:
        loaded: versions in memory, whose encoders and backbones are reused.
        is_empty: open version 0 of a created collection, which has a model and no items
            yet.
        version: its number. Default: the current one.
        warm_up: search and encode once, so that the first query does not wait.

    Raises:
        DcarError: the index or its checkpoint is missing or broken, or they do not
            belong together.
    """
    opened = None
    if not is_empty:
        access = ImageAccess(settings.image_roots, frozenset(settings.image_hosts))
        if version is None:
            opened = open_current(index, access)
        else:
            opened = open_version(index, version, access)
    checkpoint = opened.checkpoint if opened else index / CHECKPOINT
    config = read_config(checkpoint)
    fingerprint = config.get("fingerprint")
    if opened:
        fingerprint = opened.manifest.spec.fingerprint
    encoder = next(
        (other.encoder for other in loaded if other.encoder.fingerprint == fingerprint),
        None,
    )
    if encoder is None:
        same = (
            other.encoder.backbone
            for other in loaded
            if other.backbone == config["backbone"]["sha256"]
        )
        encoder = Encoder.load(
            checkpoint,
            device=settings.device,
            runtime=settings.runtime,
            cache=settings.runtime_cache,
            backbone=next(filter(None, same), None),
            threads=settings.threads,
        )
    opened = opened or empty_version(index, encoder.fingerprint, encoder.dim)
    opened.require(encoder.fingerprint)
    # old versions are deleted together with their checkpoints
    encoder.add_checkpoint_path(checkpoint)
    served = ServedVersion(encoder, opened, config, settings)
    served.concepts.refresh()
    if warm_up:
        _warm_up(served, is_shared=any(other.encoder is encoder for other in loaded))
    return served


def _warm_up(served: ServedVersion, *, is_shared: bool) -> None:
    """Search and encode once, which finds damage, converts the weights and reads what
    queries need.
    """
    encoder = served.encoder
    opened = served.index
    opened.search(np.eye(1, encoder.dim, dtype=np.float32), 1)
    if opened.rows:
        _ = opened.lexical, opened.sample_vectors
    if is_shared:
        return
    for _ in range(2):
        encoder.encode_pixels(
            np.zeros((1, 3, served.preprocess.size, served.preprocess.size), np.uint8)
        )
        encoder.encode_text(["warm up"])
    encoder.release()


def is_published(served: ServedVersion, index: Path, version: int) -> bool:
    """Return True if a published version, 0 of a collection without items, is the
    served one.

    The numbers of a rebuilt index, and of a collection that was dropped and created
    again, are not new.
    """
    if served.version != version:
        return False
    try:
        if version == 0:
            return bool(
                read_config(index / CHECKPOINT)["fingerprint"]
                == served.encoder.fingerprint
            )
        return read_manifest(index, version) == served.index.manifest
    except DcarError:
        return True  # what is published is broken, the served one is not


def mask_key(served: ServedVersion, filter: dict[str, Any]) -> str:
    """Return the key of a filter in `ServedVersion.masks`."""
    return hashlib.sha256(
        json.dumps([served.concepts.revision, filter], sort_keys=True).encode()
    ).hexdigest()


def filter_rows(served: ServedVersion, filter: dict[str, Any]) -> RowFilter:
    """Return the rows that fulfil a filter. Raise InvalidQueryError if it does not fit
    the index.
    """
    index = served.index

    def find() -> RowFilter:
        rows = filters.filter_rows(index, filter)
        if index.manifest.spec.is_local:  # every search reads the mask: make it here
            _ = rows.mask
        return rows

    try:
        return served.masks.find(mask_key(served, filter), find)
    except filters.FilterError as error:
        raise InvalidQueryError(f"filter.{error.field}", error.message) from None


def row_vectors(index: IndexVersion, rows: Rows | list[int]) -> Floats:
    """Return the stored vectors, float32 (m, E). Raise UnsupportedQueryError if this
    kind of index keeps none.
    """
    try:
        return index.vectors(np.asarray(rows, np.int64))
    except StoreUnavailableError:
        raise
    except ArtifactError as error:
        message = (
            "This query needs the vectors of items, and the index does not keep them:"
            f" {error}"
        )
        raise UnsupportedQueryError(message) from None


def is_exact_index(index: IndexVersion) -> bool:
    """Return True if searches find every row that reaches a score."""
    return {
        index.manifest.kind,
        *(addition.kind for addition in index.manifest.additions),
    } == {"Flat"}


def field_values(
    index: IndexVersion,
    name: str,
    option: str,
    rows: Rows | None = None,
) -> pa.ChunkedArray:
    """Return a field of every row, or of some, ascending; null where an item has none.

    An empty caption or category counts as missing. Raise InvalidQueryError if there is
    no such field; `option` is the part of the query that names it.
    """
    try:
        column = index.column(name, rows)
    except DataError as error:
        raise InvalidQueryError(option, str(error)) from None
    if name in EMPTY_IS_MISSING:
        return pc.if_else(pc.equal(column, ""), None, column)
    return column


class ResultGroup(TypedDict):
    """The value of `group_by` that a result stands for. count: number of its items that
    fulfil the filter.
    """

    value: Annotated[Any, Field(examples=["WX-300"])]
    count: Annotated[int, Field(examples=[5])]


@dataclass(frozen=True, slots=True)
class GroupField:
    """The groups of all rows. Their values are read when they are shown.

    Attributes:
        codes: number of each row's group, int64 (rows,).
        counts: number of live rows of each group that has a value; rows without one
            have higher numbers.
    """

    index: IndexVersion
    name: str
    codes: Rows
    counts: Rows

    def shown(self, rows: list[int], allowed: RowFilter | None) -> list[ResultGroup]:
        """Return the value of each row's group, None without one, and its number of
        allowed rows, None for all.
        """
        counts = self.counts
        if allowed is not None:
            counts = np.bincount(self.codes[allowed.mask], minlength=len(counts))
        different = np.unique(np.array(rows, np.int64))
        shown = field_values(self.index, self.name, "group_by", different).to_pylist()
        values = dict(zip(different.tolist(), shown, strict=True))
        return [
            {
                "value": values[row],
                "count": int(counts[code]) if code < len(self.counts) else 1,
            }
            for row, code in zip(rows, self.codes[rows].tolist(), strict=True)
        ]

    def outside(self, codes: Rows, allowed: RowFilter | None) -> RowFilter:
        """Return the allowed rows, None for all rows, that are in none of the numbered
        groups.
        """
        return (allowed or self.index.live_rows).without(
            np.flatnonzero(np.isin(self.codes, codes))
        )


def first_positions(codes: Rows) -> Rows:
    """Return the position of the first row of each group, ascending, from the group of
    each row.
    """
    _, positions = np.unique(codes, return_index=True)
    return np.sort(positions)


def group_field(served: ServedVersion, name: str) -> GroupField:
    """Return a field's groups. Raise InvalidQueryError if no item has it, or if it
    holds lists or long texts.
    """

    def read() -> GroupField:
        index = served.index
        kind = field_values(index, name, "group_by", NO_ROWS).type
        if pa.types.is_list(kind):
            raise InvalidQueryError(
                "group_by",
                f"{name!r} has several values per item; name a field with one",
            )
        column = index.column(name)
        if (
            pa.types.is_string(kind)
            and (pc.max(pc.binary_length(column)).as_py() or 0) > _MAX_VALUE_BYTES
        ):
            message = (
                f"{name!r} has values of over {_MAX_VALUE_BYTES:,} bytes; name another"
                " field"
            )
            raise InvalidQueryError("group_by", message)
        if name in EMPTY_IS_MISSING:
            is_missing = pc.equal(column, "").fill_null(True)
        else:
            is_missing = column.is_null()
        encoded = column.dictionary_encode().combine_chunks()
        codes = (
            encoded.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        )
        count = int(codes.max(initial=-1)) + 1
        alone = np.flatnonzero(is_missing.to_numpy())
        codes[alone] = count + alone
        return GroupField(
            index,
            name,
            codes,
            np.bincount(codes[index.live], minlength=count)[:count],
        )

    groups: GroupField = served.columns.find(("groups", name), read)
    return groups


def sort_positions(served: ServedVersion, sort: str) -> NDArray[np.int32]:
    """Return the position of each row in the order of a field, int32 (rows,); rows of
    equal value share one.

    Texts are in order regardless of case; "" is missing. Rows without a value come last
    in both directions.
    """

    def read() -> NDArray[np.int32]:
        column = field_values(served.index, sort.removeprefix("-"), "sort")
        if pa.types.is_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, pc.utf8_lower(column))
        elif pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        ranks = pc.rank(
            column,
            "descending" if sort.startswith("-") else "ascending",
            tiebreaker="dense",
        )
        return ranks.to_numpy().astype(np.int32)  # type: ignore[no-any-return]

    positions: NDArray[np.int32] = served.columns.find(("positions", sort), read)
    return positions


def list_rows(
    served: ServedVersion,
    filter: dict[str, Any] | None,
    sort: str,
    group_by: str,
) -> Rows:
    """Return the rows of a listing: those that fulfil a filter, in the order of a field
    or of the index.

    Args:
        group_by: list the first row of each group; "" for every row.
    """
    allowed = filter_rows(served, filter) if filter else served.index.live_rows
    if sort:
        rows: Rows = served.columns.find(
            ("rows", sort), lambda: sort_positions(served, sort).argsort(kind="stable")
        )
        rows = rows[allowed.mask[rows]]
    else:
        rows = np.flatnonzero(allowed.mask)
    if group_by and len(rows):
        rows = rows[first_positions(group_field(served, group_by).codes[rows])]
    return rows
