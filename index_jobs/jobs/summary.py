"""Summary of a rebuild, as an object, as JSON and as text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcar_core.util.errors import GateError
from index_jobs.store.manifest import DUPLICATES, FAILED, VERSIONS


@dataclass(frozen=True)
class RebuildSummary:
    """Result of a rebuild.

    version: the new version, or the one that stays published.
    encoded: images that this run encoded. resumed: images with vectors from an earlier run.
    failed: images without a vector. unread: those of them with bytes that could not be read.
    gate: comparison of the new index with the served one; see `index_jobs.jobs.quality_gate.Verdict`.
    notified: outcome for each notified service.
    hint: what to do next, or "".
    """

    index: str
    version: int
    published: bool
    reused: bool
    count: int
    failed: int
    unread: int
    duplicates: int
    encoded: int
    resumed: int
    seconds: float
    images_per_second: float
    fingerprint: str
    dim: int
    kind: str
    reason: str
    measured: dict[str, Any]
    gate: dict[str, Any] | None
    notified: dict[str, str]
    hint: str

    def to_text(self) -> str:
        """Return the summary as a few lines for people."""
        if not self.published and not self.reused:
            return f"{self.index}: version {self.version} stays published"
        state = "is up to date with" if self.reused else "published:"
        lines = [
            f"{self.index}: version {self.version} {state} {self.count:,} images, {self.kind}, {self.failed} broken"
        ]
        if self.gate and not self.reused:
            lines.append(f"compared with the version before: {self.gate['reason']}")
        if self.failed or self.duplicates:
            version = Path(self.index) / VERSIONS / str(self.version)
            lines.append(
                f"{version}: {FAILED} lists broken images, {DUPLICATES} lists {self.duplicates:,} images that equal "
                f"another one"
            )
        lines += [f"notified {service}: {outcome}" for service, outcome in self.notified.items()]
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class RejectedError(GateError):
    """The rebuilt index ranks worse than the served one; `summary` holds both recalls."""

    def __init__(self, summary: RebuildSummary, reason: str, *, has_vectors: bool) -> None:
        """has_vectors: the rejected vectors are on disk, so that --force encodes nothing."""
        super().__init__(
            f"not published: the rebuilt index ranks worse than version {summary.version}: {reason}; "
            + ("its vectors are kept, so --force publishes it without encoding again" if has_vectors else
               "its vectors are not kept, so --force encodes again and publishes it")
        )  # fmt: skip
        self.summary = summary
