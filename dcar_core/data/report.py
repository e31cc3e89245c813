"""What was not as it should be: nothing is repaired, left out or made up in silence."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5


@dataclass
class CleaningReport:
    """Counts by a phrase that says what was found and what was done about it; names where a user will want them."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, number: int = 1, *, names: Sequence[str] = ()) -> None:
        """Count `number` cases, or one for each name."""
        number = len(names) or number
        if number:
            self.counts[what] += number
        if names:
            self.names.setdefault(what, []).extend(names)

    def merge(self, other: "CleaningReport") -> None:
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
