"""The version that is served when a rebuild begins, and its model, which the comparison with the rebuilt one needs."""

import logging
from pathlib import Path

from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, CheckpointError, ModelError
from index_jobs.store.artifact import Artifact
from index_jobs.store.manifest import CURRENT
from index_jobs.store.versions import open_current

logger = logging.getLogger(__name__)


def open_served(index: Path) -> Artifact | None:
    """Open the served version; None if there is nothing to compare with."""
    if not (index / CURRENT).exists():
        return None
    try:
        return open_current(index)
    except ArtifactError as error:
        logger.info("there is nothing to compare with: %s", error)
        return None


def load_served_encoder(served: Artifact, device: str, *, force: bool) -> Encoder | str:
    """Return the model of the served version; with force, the reason if it cannot be loaded."""

    try:
        return Encoder.load(served.checkpoint, device=device)
    except (CheckpointError, ModelError) as error:
        version = served.manifest.version
        reason = f"the served version {version} cannot be compared, because its model cannot be loaded: {error}"
        if not force:
            raise CheckpointError(
                f"{reason}; restore the files of its model, or publish without a comparison by --force"
            ) from error
        logger.warning("%s", reason)
        return reason
