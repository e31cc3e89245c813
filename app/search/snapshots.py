"""One version of an index, ready to search, together with its encoder.

- A request takes one `Snapshot` and keeps it to its end, so all of its results are from one version.
- An encoder in memory is shared by every version of the same fingerprint, and a backbone by every encoder on it.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.core.settings import Settings
from dcar_core import Encoder
from dcar_core.model.checkpoint import read_config
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.arrays import Floats, Mask
from dcar_core.util.errors import DcarError
from index_jobs.store.artifact import Artifact
from index_jobs.store.manifest import CHECKPOINT
from index_jobs.store.versions import open_current, read_manifest
from index_jobs.store.writes import empty_artifact

if TYPE_CHECKING:  # importing torch takes seconds; the health check need not wait for it
    from dcar_core.serving.pair_weights import PairWeights

_QUICK_MS = 0.3
_QUICK_ITEMS = 1_000_000  # a larger index may have pages that are not in memory


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of an index and its encoder.

    Attributes:
        preprocess: the encoder's, with the pixel limit of this service.
        backbone: SHA-256 of the backbone.
        pair_weights: returns the weights for re-ranking and explanations. The first call may load the model, which
            takes seconds: do not call it in the event loop.
        masks: cached masks of filters, bool (rows,), by `rows.mask_key`.
        groups: cached `GroupField`s of `app.search.ranking.groups`, by the name of the field.
        facets: cached counts of values; see `app.search.ranking.facets`.
        rankings: cached rankings of recent queries, by `Plan.ranking_key`.
        page_facts: cached facts that only the page needs; see `app.api.page`.
        frozen: features of the frozen image encoder by row, cached by re-ranking.
    """

    encoder: Encoder
    artifact: Artifact
    preprocess: Preprocess
    backbone: str
    pair_weights: "Callable[[], PairWeights]"
    masks: dict[str, Mask] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    facets: dict[tuple[str, str, str], list[dict[str, Any]]] = field(default_factory=dict)
    rankings: dict[Hashable, Any] = field(default_factory=dict)
    page_facts: dict[str, Any] = field(default_factory=dict)
    frozen: dict[int, Floats] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.artifact.manifest.version

    @property
    def is_quick(self) -> bool:
        """True if a plain search takes less time than handing it to a thread, as measured by the index build."""
        manifest = self.artifact.manifest
        latency_ms = manifest.measured.get("latency_ms_p50")
        is_local = manifest.spec.is_local
        is_as_built = not manifest.additions and not manifest.removed
        is_measured_quick = latency_ms is not None and latency_ms <= _QUICK_MS
        return is_local and is_as_built and is_measured_quick and manifest.count <= _QUICK_ITEMS

    @property
    def min_score(self) -> float | None:
        """The calibrated cut-off; None without calibration."""
        return self.artifact.manifest.cutoff.get("min_score")


def drop_oldest(cache: dict[Any, Any], size: int, kept: Hashable = None) -> None:
    """Drop the oldest entries of a snapshot's cache until `size` remain, but never the entry `kept`.

    Several threads may fill and trim a cache at once.
    """
    surplus = len(cache) - size
    for key in [*cache][:surplus] if surplus > 0 else ():
        if key != kept:
            cache.pop(key, None)


def open_snapshot(index: Path, settings: Settings, loaded: Sequence[Snapshot] = ()) -> Snapshot:
    """Open the published version of an index, and load its model.

    Args:
        loaded: snapshots in memory, whose encoders and backbones are reused.

    Raises:
        DcarError: the index or its checkpoint is missing or broken, or they do not belong together.
    """
    artifact = open_current(index, image_roots=settings.image_roots, image_hosts=settings.image_hosts)
    encoder, backbone = _find_or_load_encoder(artifact.checkpoint, artifact.manifest.fingerprint, settings, loaded)
    artifact.require(encoder.fingerprint)
    return _make_snapshot(artifact, encoder, backbone, settings)


def load_snapshot(index: Path, settings: Settings, loaded: Sequence[Snapshot] = ()) -> Snapshot:
    """Open a snapshot and search it once, so the first caller does not wait. See `open_snapshot`."""
    return _warm_up(open_snapshot(index, settings, loaded))


def load_empty_snapshot(index: Path, settings: Settings, loaded: Sequence[Snapshot] = ()) -> Snapshot:
    """Load the model of a created collection that has no items yet; its version is 0. See `load_snapshot`."""
    encoder, backbone = _find_or_load_encoder(index / CHECKPOINT, None, settings, loaded)
    artifact = empty_artifact(index, encoder.fingerprint, encoder.dim)
    return _warm_up(_make_snapshot(artifact, encoder, backbone, settings))


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


def _make_snapshot(artifact: Artifact, encoder: Encoder, backbone: str, settings: Settings) -> Snapshot:
    encoder.add_checkpoint_path(artifact.checkpoint)  # old versions are deleted together with their checkpoints
    preprocess = replace(encoder.preprocess, max_pixels=settings.max_pixels)

    @cache
    def pair_weights() -> "PairWeights":
        from dcar_core.serving.pair_weights import PairWeights

        return PairWeights(encoder)

    return Snapshot(encoder, artifact, preprocess, backbone, pair_weights)


def _warm_up(snapshot: Snapshot) -> Snapshot:
    """Find damage now, let the runtime convert the weights, and read what queries need."""
    encoder, artifact = snapshot.encoder, snapshot.artifact
    _ = artifact.lexical, artifact.sample_vectors
    for _ in range(2):
        encoder.encode_pixels(np.zeros((1, 3, snapshot.preprocess.size, snapshot.preprocess.size), np.uint8))
        artifact.search(encoder.encode_text(["warm up"]), 1)
        encoder.release()
    return snapshot


def _find_or_load_encoder(
    checkpoint: Path, fingerprint: str | None, settings: Settings, loaded: Sequence[Snapshot]
) -> tuple[Encoder, str]:
    """Return the encoder of a checkpoint, and the SHA-256 of its backbone.

    Args:
        fingerprint: of the encoder; None for the one that the checkpoint names.
    """
    config = read_config(checkpoint)
    backbone = config["backbone"]["sha256"]
    for snapshot in loaded:
        if snapshot.encoder.fingerprint == (fingerprint or config.get("fingerprint")):
            return snapshot.encoder, backbone
    encoder = Encoder.load(
        checkpoint,
        device=settings.device,
        runtime=settings.runtime,
        cache=settings.runtime_cache,
        backbone=next((s.encoder.backbone for s in loaded if s.backbone == backbone and s.encoder.backbone), None),
        threads=settings.threads,
    )
    return encoder, backbone
