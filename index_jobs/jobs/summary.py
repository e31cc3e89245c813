"""Summary of a rebuild, as an object, as JSON and as text."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.util.errors import GateError, ImageFault
from index_jobs.store.manifest import DUPLICATES, FAILED, VERSIONS, Manifest

if TYPE_CHECKING:
    from index_jobs.encoding.encode import EncodedGallery
    from index_jobs.jobs.gallery_changes import GalleryChanges
    from index_jobs.jobs.gate import GateVerdict


@dataclass(frozen=True)
class RebuildSummary:
    """Result of a rebuild.

    version: the new version, or the one that stays published.
    encoded: images that this run encoded. resumed: images with vectors from an earlier run.
    failed: images without a vector. unread: those of them with bytes that could not be read.
    number_texts: fields whose texts look like numbers, so that filters cannot compare them by size, with an example.
    changes: items that came, went and changed since the served version; None if there was none.
    gate: comparison of the new index with the served one; see `index_jobs.jobs.gate.GateVerdict`.
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
    number_texts: dict[str, str]
    changes: dict[str, int] | None
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
        if self.changes:
            numbers = ", ".join(f"{count:,} images {name}" for name, count in self.changes.items())
            lines.append(f"since the previous version: {numbers}")
        if self.gate and not self.reused:
            lines.append(f"compared with the previous version: {self.gate['reason']}")
        lines += self.notes()
        lines += [f"notified {service}: {outcome}" for service, outcome in self.notified.items()]
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Return a line for each kind of images or fields that searches leave out or treat as something else."""
        version, lines = Path(self.index) / VERSIONS / str(self.version), list[str]()
        if self.failed:
            lines.append(f"broken images, left out: {self.failed:,}, with reasons in {version / FAILED}")
        if self.duplicates:
            lines.append(f"images that equal an earlier one: {self.duplicates:,}, listed in {version / DUPLICATES}")
        if self.number_texts:
            examples = ", ".join(f"{name} ({text!r})" for name, text in self.number_texts.items())
            lines.append(
                f"fields of text that looks like numbers: {examples}; filters cannot compare them by size, so write "
                f"numbers such as 10.5"
            )
        return lines


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


def summarize(
    index: Path,
    manifest: Manifest,
    encoded: "EncodedGallery | None" = None,
    verdict: "GateVerdict | None" = None,
    changes: "GalleryChanges | None" = None,
    *,
    start: float,
    published: bool = True,
    notified: dict[str, str] | None = None,
) -> RebuildSummary:
    """Return the summary of a rebuild.

    Args:
        manifest: of the new version, or of the one that stays published.
        encoded: the encoded gallery; None if nothing had changed.
        start: of the job, by `time.perf_counter`.
        published: False if the new version was rejected.
    """
    version = index / VERSIONS / str(manifest.version)
    unread = encoded.unread if encoded else _count_unread(version)
    hint = f"images that could not be read: {unread:,} ({FAILED} has the reasons); once they can be, give --force"
    return RebuildSummary(
        index=str(index),
        version=manifest.version,
        published=published and encoded is not None,
        reused=encoded is None,
        count=manifest.count,
        failed=manifest.failed,
        unread=unread,
        duplicates=len(encoded.duplicates()) if encoded else _count_duplicates(version),
        encoded=encoded.encoded if encoded else 0,
        resumed=encoded.resumed if encoded else 0,
        seconds=round(time.perf_counter() - start, 3),
        images_per_second=round(encoded.encoded / encoded.seconds, 1) if encoded and encoded.encoded else 0.0,
        fingerprint=manifest.fingerprint,
        dim=manifest.dim,
        kind=manifest.kind,
        reason=manifest.reason,
        measured=manifest.measured,
        number_texts=manifest.number_texts,
        changes={name: getattr(changes, name) for name in ("added", "removed", "changed")} if changes else None,
        gate=asdict(verdict) if verdict else None,
        notified=notified or {},
        hint=hint if unread and published else "",
    )


def _count_unread(version: Path) -> int:
    """Return how many failed images of a version a later job may be able to read."""
    faults = (json.loads(line)["fault"] for line in (version / FAILED).read_bytes().splitlines())
    return sum(ImageFault(fault).is_temporary for fault in faults)


def _count_duplicates(version: Path) -> int:
    return (version / DUPLICATES).read_bytes().count(b"\n")
