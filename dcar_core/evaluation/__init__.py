"""Several methods on one data set: trained alike, tested once, and shown as tables, plots and a page."""

from dcar_core.evaluation.comparison import compare, summary
from dcar_core.evaluation.tables import settings_table, table

__all__ = ["compare", "settings_table", "summary", "table"]
