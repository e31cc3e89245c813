"""The report of a data set's cleaning: every repair and every omission is counted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcar_core.util.errors import shorten
from dcar_core.util.files import write_json

REPORT_FILE = "cleaning.json"


@dataclass
class CleaningReport:
    """Counts of cases by a phrase that states the finding and its treatment, with names of the affected items."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, phrase: str, number: int = 1, *, names: Sequence[str] | None = None) -> None:
        """Count `number` cases, or one per name; empty names count nothing."""
        if names is not None:
            number = len(names)
        if number:
            self.counts[phrase] += number
        if names:
            self.names.setdefault(phrase, []).extend(names)

    def merge(self, other: "CleaningReport") -> None:
        self.counts.update(other.counts)
        for phrase, names in other.names.items():
            self.names.setdefault(phrase, []).extend(names)

    def __str__(self) -> str:
        lines = []
        for phrase, number in self.counts.most_common():
            names = self.names.get(phrase)
            lines.append(f"{number:7,} {phrase}" + (f": {shorten(names)}" if names else ""))
        return "\n".join(lines) or "nothing to repair"


def describe_reports(splits: Mapping[str, object], reports: Mapping[str, CleaningReport]) -> str:
    return "\n".join(f"{name}: {splits[name]}\n{report}" for name, report in reports.items())


def save_reports(reports: Mapping[str, CleaningReport], directory: Path) -> None:
    """Write {split: {"counts": {phrase: number}, "names": {phrase: [every name]}}} to cleaning.json."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {name: {"counts": dict(each.counts.most_common()), "names": each.names} for name, each in reports.items()}
    write_json(directory / REPORT_FILE, content)
