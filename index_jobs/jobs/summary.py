"""Summary of a rebuild, as an object, as JSON and as text."""

from dataclasses import dataclass
from typing import Any

from dcar_core.util.errors import GateError
from index_jobs.index.manifest import DUPLICATES, FAILED
from index_jobs.index.storage import index_path


@dataclass(frozen=True, kw_only=True)
class RebuildSummary:
    """Result of a rebuild; the JSON summary has the same fields."""

    index: str
    version: int  # the new one, or the one that stays published
    published: bool
    reused: bool
    count: int
    failed: int  # images without a vector
    unread: int  # those of them with bytes that could not be read
    duplicates: int
    encoded: int  # images that this run encoded
    resumed: int  # images with vectors from an earlier run
    seconds: float
    images_per_second: float
    fingerprint: str
    dim: int
    kind: str
    reason: str
    measured: dict[str, Any]
    number_texts: dict[str, str]  # fields with texts such as "10,50", with an example
    cutoff: dict[str, Any]  # as in the manifest
    changes: dict[str, int] | None = None  # items that came, went and changed since the served version
    gate: dict[str, Any] | None = None  # comparison with the served version; see `gate.GateVerdict`
    hint: str = ""  # what to do next

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
        if "recall_at_1" in self.cutoff:
            first, ten = (100 * self.cutoff[f"recall_at_{k}"] for k in (1, 10))
            lines.append(
                f"validation: {self.cutoff['pairs']:,} texts find their image first in {first:.1f} %, among the first "
                f"ten in {ten:.1f} %, of all {self.count:,} images"
            )
            lines.append(f"results are likely from a score of {self.cutoff['min_score']:.3f} on")
        lines += self.notes()
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Return a line for each kind of images or fields that searches leave out or treat as something else."""
        from index_jobs.index.versions import read_manifest  # heavy

        index, lines = index_path(self.index), list[str]()
        manifest = read_manifest(index, self.version)
        if self.failed:
            lines.append(f"broken images, left out: {self.failed:,}, with reasons in {manifest.path(index, FAILED)}")
        if self.duplicates:
            place = manifest.path(index, DUPLICATES)
            lines.append(f"images that equal an earlier one: {self.duplicates:,}, listed in {place}")
        if self.number_texts:
            examples = ", ".join(f"{name} ({text!r})" for name, text in self.number_texts.items())
            lines.append(
                f"fields of text that looks like numbers: {examples}; filters cannot compare them by size, so write "
                f"numbers such as 10.5"
            )
        return lines


class RejectedError(GateError):
    """The rebuilt index ranks worse than the served one; `summary` holds both recalls."""

    def __init__(self, message: str, summary: RebuildSummary) -> None:
        super().__init__(message)
        self.summary = summary
