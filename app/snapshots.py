"""What is being served, and how it changes under load without dropping a request.

- A `Snapshot` is an immutable pair of encoder and index. A request takes it once and keeps it to its end, so it is
  answered by one version, whose number it names.
- `Snapshots` opens a new version beside the old one, warms it, and then replaces one reference. The encoder stays when
  the fingerprint is the same; otherwise the checkpoint that lies in the new version is loaded.
- A version that cannot be loaded changes nothing: the old one goes on, `reason` says why, and it is tried again later.
- `CURRENT` is polled; `POST /admin/reload` does the same at once.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from app.problems import NotReady
from app.settings import Settings
from dcar_core.errors import ArtifactError, DcarError
from index_jobs.artifact import Artifact, current_version, open_current

if TYPE_CHECKING:  # torch takes seconds; the health check need not wait for it
    from dcar_core import Encoder
    from dcar_core.preprocess import Preprocess

log = logging.getLogger(__name__)

_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version, ready to search. preprocess is the encoder's, with this service's limit of pixels."""

    encoder: "Encoder"
    artifact: Artifact
    preprocess: "Preprocess"

    @property
    def version(self) -> int:
        return self.artifact.manifest.version


def require_index(settings: Settings) -> int:
    """The version that CURRENT names.

    Raises:
        ArtifactError: nothing is published there; the message says what to run.
    """
    version = current_version(settings.index)
    if version is None:
        raise ArtifactError(
            f"there is no index in {settings.index}; make one with "
            f"`dcar index build --gallery PATH --checkpoint DIR --out {settings.index}`"
        )
    return version


def load_snapshot(settings: Settings, old: Snapshot | None = None) -> Snapshot:
    """Open the current version with its encoder, and search once, so that the first caller does not wait.

    Raises:
        DcarError: the index or its checkpoint is missing, broken, or they do not belong together.
    """
    from dcar_core import Encoder

    require_index(settings)
    _limit_threads(settings.threads)
    artifact = open_current(settings.index)
    if old is not None and old.encoder.fingerprint == artifact.manifest.fingerprint:
        encoder = old.encoder
    else:
        encoder = Encoder.load(artifact.checkpoint, device=settings.device)
    artifact.require(encoder.fingerprint)
    preprocess = replace(encoder.preprocess, max_pixels=settings.max_pixels)
    encoder.encode_pixels(np.zeros((1, 3, preprocess.size, preprocess.size), np.uint8))
    artifact.search(encoder.encode_text(["warm up"]), 1)
    return Snapshot(encoder, artifact, preprocess)


def _limit_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


class Snapshots:
    """Holds the live snapshot and replaces it."""

    def __init__(self, settings: Settings, *, on_start_failure: Callable[[DcarError], None] | None = None) -> None:
        self._settings = settings
        self._on_start_failure = on_start_failure
        self._live: Snapshot | None = None
        self._turn = asyncio.Lock()
        self._failed: int | None = None
        self._retry_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self.reason: str | None = "The model is being loaded."
        self.draining = False  # about to end: still answers, but says that it is not ready

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
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def reload(self) -> bool:
        """Serve the version that CURRENT names; False when it is the live one already.

        Raises:
            DcarError: it cannot be loaded; what was live still is.
        """
        async with self._turn:
            version: int | None = None
            began = time.perf_counter()
            try:
                version = await asyncio.to_thread(require_index, self._settings)
                if self._live is not None and self._live.version == version:
                    self.reason = None
                    return False
                fresh = await asyncio.to_thread(load_snapshot, self._settings, self._live)
            except Exception as error:
                known = error if isinstance(error, DcarError) else ArtifactError(f"it cannot be loaded: {error}")
                handled = self._live is None and self._on_start_failure is not None  # whoever it is will tell
                if str(known) != self.reason and not handled:  # said once, however often it is looked at
                    log.error("index version %s is not served: %s", version or "?", known)
                self.reason = str(known)
                self._failed, self._retry_at = version, time.monotonic() + _RETRY_S
                raise known from (None if known is error else error)
            self._live, self.reason, self._failed = fresh, None, None
            count, seconds = fresh.artifact.manifest.count, time.perf_counter() - began
            log.info("serving index version %d, %d items (loaded in %.1f s)", fresh.version, count, seconds)
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
                version = await asyncio.to_thread(_peek, self._settings)
                if version is None or version != self._failed or time.monotonic() >= self._retry_at:
                    await self.reload()


def _peek(settings: Settings) -> int | None:
    """The published version, None when that cannot be told; `reload` finds out why."""
    try:
        return current_version(settings.index)
    except ArtifactError:
        return None
