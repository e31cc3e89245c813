"""The report of a data set's cleaning: every repair and every omission is counted."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SHOWN = 5


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

    def to_dict(self) -> dict[str, Any]:
        """Return {"counts": {phrase: number}, "names": {phrase: [every name]}} for a JSON file."""
        return {"counts": dict(self.counts.most_common()), "names": self.names}

    def __str__(self) -> str:
        if not self.counts:
            return "nothing to repair"
        lines = (f"{number:7,} {phrase}{self._examples(phrase)}" for phrase, number in self.counts.most_common())
        return "\n".join(lines)

    def _examples(self, phrase: str) -> str:
        names = self.names.get(phrase, [])
        return f": {shorten(names)}" if names else ""


def shorten(names: Sequence[str]) -> str:
    """Return the first names and the number of the others: "a, b, c and 4 more"."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


REPORT_FILE = "cleaning.json"


def describe_reports(sizes: Mapping[str, Sized], reports: Mapping[str, CleaningReport]) -> str:
    return "\n".join(f"{split}: {len(sizes[split]):,} pairs\n{report}" for split, report in reports.items())


def save_reports(reports: Mapping[str, CleaningReport], directory: Path) -> None:
    """Write every split's report, with all names, to cleaning.json."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {split: report.to_dict() for split, report in reports.items()}
    (directory / REPORT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
