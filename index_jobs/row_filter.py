"""The rows that a search may find."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dcar_core.util.arrays import Mask, Rows

NO_ROWS: Rows = np.empty(0, np.int64)
# fields whose empty texts are missing values
EMPTY_IS_MISSING = frozenset({"caption", "category"})


@dataclass(frozen=True, eq=False)
class RowFilter:
    """Rows that a search may find, as a mask, and as conditions for an engine that has
    stored the fields of rows.

    make_mask: returns the mask, bool (rows,). filter: conditions in the grammar of
    `index.filters`; {} for every row. excluded: rows that the conditions do not cover,
    int64 (m,): removed ones, and those whose fields have changed. included: rows that
    are found whatever was stored, int64 (m,).
    """

    make_mask: Callable[[], Mask]
    filter: Mapping[str, Any]
    excluded: Rows = field(default_factory=lambda: NO_ROWS)
    included: Rows = field(default_factory=lambda: NO_ROWS)

    @classmethod
    def of_mask(cls, mask: Mask) -> "RowFilter":
        return cls(lambda: mask, {}, np.flatnonzero(~mask))

    @cached_property
    def mask(self) -> Mask:
        return self.make_mask()

    def without(self, rows: Rows) -> "RowFilter":
        """Leave out some rows."""

        def make_mask() -> Mask:
            mask = self.mask.copy()
            mask[rows] = False
            return mask

        included = self.included[~np.isin(self.included, rows)]
        return RowFilter(
            make_mask,
            self.filter,
            np.union1d(self.excluded, rows),
            included,
        )

    def part(self, span: range) -> "RowFilter":
        """Return the rows of a span, numbered from its start."""
        excluded, included = (
            rows[(rows >= span.start) & (rows < span.stop)] - span.start
            for rows in (self.excluded, self.included)
        )
        return RowFilter(
            lambda: self.mask[span.start : span.stop], self.filter, excluded, included
        )
