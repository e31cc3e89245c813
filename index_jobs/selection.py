"""Rows that a search may find, told by conditions, for engines that keep the fields of items.

Other engines read `Selection.mask`, which is made when it is first needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dcar_core.util.arrays import Mask, Rows

EMPTY_IS_MISSING = frozenset({"caption", "category"})  # fields whose empty texts are missing values
UNINDEXED = "caption"  # long and different, so engines compare it slowly, and a filter rarely names it
NO_ROWS: Rows = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows whose fields, as they were when the vectors were stored, fulfil conditions, with exceptions.

    Attributes:
        make_mask: returns the same rows as a mask, bool (rows,).
        filters: of `store.filters`; all must hold.
        hidden: rows that are left out, int64 (m,): removed ones, and those whose fields have changed since.
        added: rows that are found whatever was stored.
        among: rows outside of which none is found; None for all.
    """

    make_mask: Callable[[], Mask]
    filters: tuple[Mapping[str, Any], ...] = ()
    hidden: Rows = field(default_factory=lambda: NO_ROWS)
    added: Rows = field(default_factory=lambda: NO_ROWS)
    among: Rows | None = None

    @cached_property
    def mask(self) -> Mask:
        return self.make_mask()

    def within(self, rows: Rows) -> "Selection":
        """Return those of some rows."""
        hidden, added = (each[np.isin(each, rows)] for each in (self.hidden, self.added))
        return Selection(lambda: self.mask, self.filters, hidden, added, rows)

    def part(self, span: range) -> "Selection":
        """Return the rows of a span, numbered from its start."""

        def inside(rows: Rows) -> Rows:
            return rows[(rows >= span.start) & (rows < span.stop)] - span.start

        among = None if self.among is None else inside(self.among)
        hidden, added = inside(self.hidden), inside(self.added)
        return Selection(lambda: self.mask[span.start : span.stop], self.filters, hidden, added, among)


Allowed = Mask | Selection


def to_mask(allowed: Allowed) -> Mask:
    return allowed.mask if isinstance(allowed, Selection) else allowed
