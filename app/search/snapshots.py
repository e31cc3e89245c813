"""What is being served, and how it changes under load without dropping a request.

- A `Snapshot` is an immutable pair of encoder and index. A request takes it once and keeps it to its end, so it is
  answered by one version, whose number it names.
- `Snapshots` opens a new version beside the old one, warms it, and then replaces one reference. The encoder stays when
  the fingerprint is the same; otherwise the checkpoint that lies in the new version is loaded.
- A version that cannot be loaded changes nothing: the old one goes on, `reason` says why, and it is tried again later.
- `CURRENT` is polled; `reload` does the same at once, for `POST /admin/reload` and for announcements.
- Whoever serves several indexes gives each a `Snapshots` and lets them share: an encoder made on a backbone that is in
  memory already is loaded onto that one.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.core.problems import NotReady
from app.core.settings import Settings
from app.core.threads import in_own_thread
from dcar_core.util.arrays import Mask
from dcar_core.util.errors import ArtifactError, DcarError
from index_jobs.store import filters
from index_jobs.store.artifact import Artifact, current_version, open_current, read_manifest, require_index

if TYPE_CHECKING:  # torch takes seconds; the health check need not wait for it
    from dcar_core import Encoder
    from dcar_core.model.preprocess import Preprocess
    from dcar_core.serving.pair_weights import PairWeights

log = logging.getLogger(__name__)

_RETRY_S = 30.0
_QUICK_MS, _QUICK_ITEMS = 0.3, 1_000_000  # beyond so many items a page of the index may have to be read first
_FILTERS = 16  # kept for each version; a byte an item each


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version, ready to search.

    preprocess: the encoder's, with this service's limit of pixels.
    pairs: what re-ranking and explaining weigh words by. The first call may load the model, which takes seconds: not to
    be made in the event loop.
    matching: a filter in JSON -> bool (rows,); see `index_jobs.store.filters`. The last ones are kept.
    frozen: by row, a picture's features from the frozen encoder; filled as re-ranking needs them.
    """

    encoder: "Encoder"
    artifact: Artifact
    preprocess: "Preprocess"
    backbone: str
    pairs: "Callable[[], PairWeights]"
    matching: Callable[[str], Mask]
    frozen: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.artifact.manifest.version

    @property
    def quick(self) -> bool:
        """Whether a plain search takes less time than a thread's turn, as measured when the index was built."""
        manifest = self.artifact.manifest
        took_ms = manifest.measured.get("latency_ms_p50")
        here = not manifest.milvus  # another machine's answer may take any time
        as_built = not manifest.additions and not manifest.removed
        return here and as_built and took_ms is not None and took_ms <= _QUICK_MS and manifest.count <= _QUICK_ITEMS

    @property
    def min_score(self) -> float | None:
        """The calibrated cut-off; None where the index has none."""
        return self.artifact.manifest.cutoff.get("min_score")


def load_snapshot(index: Path, settings: Settings, loaded: Iterable[Snapshot] = ()) -> Snapshot:
    """Open the current version with its encoder, and search once, so that the first caller does not wait.

    Args:
        loaded: what is served now; its encoders and backbones are used again where they fit.

    Raises:
        DcarError: the index or its checkpoint is missing, broken, or they do not belong together.
    """
    from dcar_core import Encoder
    from dcar_core.model.checkpoint import read_config

    require_index(index)
    artifact = open_current(index)
    backbone = read_config(artifact.checkpoint)["backbone"]["sha256"]
    loaded = list(loaded)
    encoder = next((s.encoder for s in loaded if s.encoder.fingerprint == artifact.manifest.fingerprint), None)
    if encoder is None:
        shared = next((s.encoder.backbone for s in loaded if s.backbone == backbone and s.encoder.backbone), None)
        encoder = Encoder.load(
            artifact.checkpoint, device=settings.device, runtime=settings.runtime, cache=settings.runtime_cache,
            backbone=shared, threads=settings.threads,
        )  # fmt: skip
    artifact.require(encoder.fingerprint)
    encoder.add_checkpoint_path(
        artifact.checkpoint
    )  # old versions are deleted, and their copies of the checkpoint with them
    preprocess = replace(encoder.preprocess, max_pixels=settings.max_pixels)

    @cache
    def pairs() -> "PairWeights":
        from dcar_core.serving.pair_weights import PairWeights

        return PairWeights(encoder)

    def warm_up() -> None:
        encoder.encode_pixels(np.zeros((1, 3, preprocess.size, preprocess.size), np.uint8))
        artifact.search(encoder.encode_text(["warm up"]), 1)

    warm_up()  # runtimes make their own form of the weights now
    encoder.release()
    warm_up()  # and what they still read from the file is in memory before the first query
    matching = lru_cache(_FILTERS)(lambda filter: filters.matching(artifact, json.loads(filter)))
    return Snapshot(encoder, artifact, preprocess, backbone, pairs, matching)


class Snapshots:
    """Holds the live snapshot of one index and replaces it.

    Args:
        index: the published index directory.
        loaded: what is in memory already, from this index and others.
        turn: held while a version is loaded, so that one is at a time.
        on_start_failure: told when the first version cannot be loaded.
    """

    def __init__(
        self,
        index: Path,
        settings: Settings,
        *,
        loaded: Callable[[], Iterable[Snapshot]],
        turn: asyncio.Lock,
        on_start_failure: Callable[[DcarError], None] | None = None,
    ) -> None:
        self.index = index
        self._settings = settings
        self._loaded = loaded
        self._turn = turn
        self._on_start_failure = on_start_failure
        self._live: Snapshot | None = None
        self._failed: int | None = None
        self._retry_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._loads: set[asyncio.Task[bool]] = set()
        self._closing = False
        self.reason: str | None = "The model is being loaded."

    @property
    def live(self) -> Snapshot | None:
        """The version that answers now."""
        return self._live

    def require(self) -> Snapshot:
        """The version that answers now.

        Raises:
            NotReady: none is loaded.
        """
        if self._live is None:
            raise NotReady(self.reason or "The model is being loaded.")
        return self._live

    def start(self) -> None:
        """Load the first version and begin to poll, in the background."""
        self._task = asyncio.create_task(self._watch(), name="dcar-snapshots")

    async def close(self) -> None:
        """Stop polling. A load under way is waited for, since its thread cannot be stopped."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*self._loads, return_exceptions=True)

    async def reload(self) -> bool:
        """Serve the version that CURRENT names; False when it is the live one already.

        A load that has begun goes on to its end, and keeps its turn, whether its caller waits for it or not.

        Raises:
            DcarError: it cannot be loaded; what was live still is.
        """
        load = asyncio.create_task(self._load(), name="dcar-load")
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        load.add_done_callback(lambda done: done.cancelled() or done.exception())  # heard, if nobody waits any more
        return await asyncio.shield(load)

    async def _load(self) -> bool:
        async with self._turn:
            if self._closing:
                return False
            version: int | None = None
            began = time.perf_counter()
            try:
                version = await asyncio.to_thread(require_index, self.index)
                if self._live is not None and await asyncio.to_thread(_is, self._live, self.index, version):
                    self.reason, self._failed = None, None  # one that failed before is tried at once if it comes back
                    return False
                fresh = await in_own_thread(load_snapshot, self.index, self._settings, self._loaded())
            except Exception as error:
                known = error if isinstance(error, DcarError) else ArtifactError(f"it cannot be loaded: {error}")
                handled = self._live is None and self._on_start_failure is not None  # whoever it is will tell
                if str(known) != self.reason and not handled:  # said once, however often it is looked at
                    log.error("version %s of %s is not served: %s", version or "?", self.index, known)
                self.reason = str(known)
                self._failed, self._retry_at = version, time.monotonic() + _RETRY_S
                raise known from (None if known is error else error)
            self._live, self.reason, self._failed = fresh, None, None
            count, seconds = fresh.artifact.manifest.count, time.perf_counter() - began
            log.info("serving version %d of %s, %d items (in %.1f s)", fresh.version, self.index, count, seconds)
            return True

    async def _watch(self) -> None:
        try:
            await self.reload()
        except DcarError as error:
            if self._on_start_failure is not None:
                self._on_start_failure(error)
        while self._settings.poll_s > 0:
            await asyncio.sleep(self._settings.poll_s)
            with contextlib.suppress(DcarError):  # reload has logged it, and readiness tells it
                version = await asyncio.to_thread(_peek, self.index)
                if version is None or version != self._failed or time.monotonic() >= self._retry_at:
                    await self.reload()


def _is(live: Snapshot, index: Path, version: int) -> bool:
    """Whether a published version is the one that is served; of an index that was built anew the numbers begin anew."""
    if live.version != version:
        return False
    try:
        return read_manifest(index, version) == live.artifact.manifest
    except ArtifactError:
        return True  # nothing better is there, and what is served is whole


def _peek(index: Path) -> int | None:
    """The published version, None when that cannot be told; `reload` finds out why."""
    try:
        return current_version(index)
    except ArtifactError:
        return None
