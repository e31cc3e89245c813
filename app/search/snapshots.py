"""One version of an index, ready to search, together with its encoder.

- A request takes one `Snapshot` and keeps it to its end, so all of its results are from one version.
- An encoder in memory is shared by every version of the same fingerprint, and a backbone by every encoder on it.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from app.core.settings import Settings
from dcar_core import Encoder
from dcar_core.model.checkpoint import languages_of, read_config
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DcarError, requires_pytorch
from index_jobs.index.created import empty_artifact
from index_jobs.index.index_version import ImageAccess, IndexVersion
from index_jobs.index.manifest import CHECKPOINT
from index_jobs.index.versions import open_current, open_version, read_manifest
from index_jobs.row_filter import RowFilter

MAX_PAGES = 1000  # about 8 kB each
MAX_MASKS = 16
MAX_MASK_BYTES = 64 * 2**20  # of all of them, a byte an item each
_MAX_GROUPS = 8
_MAX_GROUP_BYTES = 512 * 2**20  # of all of them, at most 16 bytes an item each
_MAX_FACETS = 64
_MAX_ORDERS = 8
_MAX_ORDER_BYTES = 256 * 2**20  # of all of them, 12 bytes an item each

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(dict[K, V]):
    """A cache of the `size` entries that were used last. Several threads may use it at once."""

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


@dataclass(frozen=True)
class Snapshot:
    """One version of an index and its encoder.

    Attributes:
        preprocess: the encoder's, with the pixel limit of this service.
        backbone: SHA-256 of the backbone.
        pages: cached pages of results, by `Plan.page_key`.
        masks: cached rows of filters, by `rows.mask_key`.
        groups: cached `GroupField`s of `app.search.rows`, by the name of the field.
        orders: cached `SortOrder`s of `app.search.rows`, by the `sort` of queries.
        facets: cached counts of values; see `app.search.facets`.
        image_features: cached features for re-ranking by row; re-ranking, which fills it, sets its size.
        model_note: what users should know about the model, "" for nothing. languages: see `checkpoint.languages_of`.
        page_facts: cached facts that only the search page needs; see `app.api.page`.
    """

    encoder: Encoder
    artifact: IndexVersion
    preprocess: Preprocess
    backbone: str
    pages: Recent[Hashable, Any]
    masks: Recent[str, RowFilter]
    groups: Recent[str, Any]
    orders: Recent[str, Any]
    facets: Recent[tuple[str, str, str], list[Any]] = field(default_factory=lambda: Recent(_MAX_FACETS))
    image_features: Recent[int, Floats] = field(default_factory=lambda: Recent(0))
    model_note: str = ""
    languages: str = ""
    page_facts: Recent[str, list[Any]] = field(default_factory=lambda: Recent(2))

    @property
    def version(self) -> int:
        return self.artifact.manifest.version

    @property
    def min_score(self) -> float | None:
        """The calibrated cut-off; None without calibration."""
        return self.artifact.manifest.cutoff.get("min_score")

    @cached_property
    def second_stage(self) -> Any:
        """The model's `SecondStage`. The first look may load the model for seconds: not in the event loop."""
        with requires_pytorch("re-ranking"):  # importing it takes seconds; the health check need not wait
            from dcar_core.model.dcar import SecondStage

            return SecondStage(self.encoder.model)


def load_snapshot(
    index: Path,
    settings: Settings,
    loaded: Sequence[Snapshot] = (),
    is_empty: bool = False,
    version: int | None = None,
    *,
    warm_up: bool = True,
) -> Snapshot:
    """Open a version of an index, and load its model.

    Args:
        loaded: snapshots in memory, whose encoders and backbones are reused.
        is_empty: open version 0 of a created collection, which has a model and no items yet.
        version: its number. Default: the current one.
        warm_up: search and encode once, so that the first query does not wait.

    Raises:
        DcarError: the index or its checkpoint is missing or broken, or they do not belong together.
    """
    artifact = None
    if not is_empty:
        access = ImageAccess(settings.image_roots, frozenset(settings.image_hosts))
        artifact = open_current(index, access) if version is None else open_version(index, version, access)
    checkpoint = artifact.checkpoint if artifact else index / CHECKPOINT
    config = read_config(checkpoint)
    fingerprint = artifact.manifest.spec.fingerprint if artifact else config.get("fingerprint")
    backbone = config["backbone"]["sha256"]
    encoder = next((each.encoder for each in loaded if each.encoder.fingerprint == fingerprint), None)
    if encoder is None:
        encoder = Encoder.load(
            checkpoint,
            device=settings.device,
            runtime=settings.runtime,
            cache=settings.runtime_cache,
            backbone=next((s.encoder.backbone for s in loaded if s.backbone == backbone and s.encoder.backbone), None),
            threads=settings.threads,
        )
    artifact = artifact or empty_artifact(index, encoder.fingerprint, encoder.dim)
    artifact.require(encoder.fingerprint)
    encoder.add_checkpoint_path(checkpoint)  # old versions are deleted together with their checkpoints
    preprocess = replace(encoder.preprocess, max_pixels=settings.max_pixels)
    rows = max(1, artifact.rows)
    masks = Recent[str, RowFilter](max(1, min(MAX_MASKS, MAX_MASK_BYTES // rows)))
    groups = Recent[str, Any](max(1, min(_MAX_GROUPS, _MAX_GROUP_BYTES // (16 * rows))))
    orders = Recent[str, Any](max(1, min(_MAX_ORDERS, _MAX_ORDER_BYTES // (12 * rows))))
    pages = Recent[Hashable, Any](min(settings.cache_size, MAX_PAGES))
    snapshot = Snapshot(
        encoder, artifact, preprocess, backbone, pages, masks, groups, orders,
        model_note=str(config.get("training", {}).get("note", "")), languages=languages_of(config["backbone"]["model"]),
    )  # fmt: skip
    if warm_up:
        _warm_up(snapshot, is_shared=any(each.encoder is encoder for each in loaded))
    return snapshot


def _warm_up(snapshot: Snapshot, *, is_shared: bool) -> None:
    """Search and encode once, which finds damage, converts the weights and reads what queries need."""
    encoder, artifact = snapshot.encoder, snapshot.artifact
    artifact.search(np.eye(1, encoder.dim, dtype=np.float32), 1)
    if artifact.rows:
        _ = artifact.lexical, artifact.sample_vectors
    if is_shared:
        return
    for _ in range(2):
        encoder.encode_pixels(np.zeros((1, 3, snapshot.preprocess.size, snapshot.preprocess.size), np.uint8))
        encoder.encode_text(["warm up"])
    encoder.release()


def is_published(live: Snapshot, index: Path, version: int) -> bool:
    """Return True if a published version, 0 of a collection without items, is the live one.

    The numbers of a rebuilt index, and of a collection that was dropped and created again, are not new.
    """
    if live.version != version:
        return False
    try:
        if version == 0:
            return bool(read_config(index / CHECKPOINT)["fingerprint"] == live.encoder.fingerprint)
        return read_manifest(index, version) == live.artifact.manifest
    except DcarError:
        return True  # what is published is broken, the live version is not
