"""The version that is served when a rebuild begins, and its comparison with the rebuilt one."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcar_core.util.errors import ArtifactError, CheckpointError, ModelError
from index_jobs.jobs import quality_gate
from index_jobs.store.artifact import Artifact
from index_jobs.store.manifest import CURRENT
from index_jobs.store.versions import open_current

if TYPE_CHECKING:
    from dcar_core import Encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedVersion:
    """The served version. force: publish although it cannot be compared."""

    artifact: Artifact
    force: bool

    @classmethod
    def open(cls, index: Path, *, force: bool) -> "ServedVersion | None":
        """Open the served version; None if there is nothing to compare with."""
        if not (index / CURRENT).exists():
            return None
        try:
            return cls(open_current(index), force)
        except ArtifactError as error:
            logger.info("there is nothing to compare with: %s", error)
            return None

    def require_model(self, fingerprint: str, pairs: "quality_gate.QueryPairs | None") -> None:
        """Check that the model loads, if the comparison needs it, and release it: encoding may need the memory."""
        if pairs is not None and self.artifact.manifest.fingerprint != fingerprint:
            self._load_encoder("cpu")

    def compare(
        self, rebuilt: Artifact, encoder: "Encoder", pairs: "quality_gate.QueryPairs | None", margin: float, device: str
    ) -> "quality_gate.GateVerdict":
        """Compare the rebuilt version, encoded by `encoder`, with this one."""
        served_encoder: Encoder | str = encoder
        if pairs is not None and self.artifact.manifest.fingerprint != encoder.fingerprint:
            served_encoder = self._load_encoder(device)
        if isinstance(served_encoder, str):
            return quality_gate.pass_uncompared(served_encoder, margin)
        return quality_gate.compare(self.artifact, served_encoder, rebuilt, encoder, pairs, margin)

    def _load_encoder(self, device: str) -> "Encoder | str":
        """Return the model; with force, the reason if it cannot be loaded."""
        from dcar_core import Encoder

        try:
            return Encoder.load(self.artifact.checkpoint, device=device)
        except (CheckpointError, ModelError) as error:
            version = self.artifact.manifest.version
            reason = f"the served version {version} cannot be compared, because its model cannot be loaded: {error}"
            if not self.force:
                raise CheckpointError(
                    f"{reason}; restore the files of its model, or publish without a comparison by --force"
                ) from error
            logger.warning("%s", reason)
            return reason
