"""What was not as it should be: nothing is repaired, left out or made up in silence."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 5


@dataclass
class CleaningReport:
    """Counts by a phrase that says what was found and what was done about it; names where a user will want them."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, number: int = 1, *, names: Sequence[str] | None = None) -> None:
        """Count `number` cases, or one for each name: none where the names are empty."""
        if names is not None:
            number = len(names)
        if number:
            self.counts[what] += number
        if names:
            self.names.setdefault(what, []).extend(names)

    def merge(self, other: "CleaningReport") -> None:
        """Count what another counted as well."""
        self.counts.update(other.counts)
        for what, names in other.names.items():
            self.names.setdefault(what, []).extend(names)

    def to_dict(self) -> dict[str, Any]:
        """{"counts": {phrase: number}, "names": {phrase: [every name]}}, for a JSON file."""
        return {"counts": dict(self.counts.most_common()), "names": self.names}

    def __str__(self) -> str:
        if not self.counts:
            return "nothing to repair"
        return "\n".join(f"{number:7,} {what}{self._examples(what)}" for what, number in self.counts.most_common())

    def _examples(self, what: str) -> str:
        names = self.names.get(what, [])
        return f": {shorten(names)}" if names else ""


def shorten(names: Sequence[str], shown: int = SHOWN) -> str:
    """ "a, b, c and 4 more" """
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")


REPORT_FILE = "cleaning.json"


def describe_reports(sizes: Mapping[str, Sized], reports: Mapping[str, CleaningReport]) -> str:
    """A line for each split, and below it what was found there."""
    return "\n".join(f"{split}: {len(sizes[split]):,} pairs\n{report}" for split, report in reports.items())


def save_reports(reports: Mapping[str, CleaningReport], directory: Path) -> None:
    """Write every split's report, with all names, to cleaning.json."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {split: report.to_dict() for split, report in reports.items()}
    (directory / REPORT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
