"""Comparison of methods on one data set: trained alike, tested once, shown as tables, plots and an HTML report.

In: a data set, a model and the names of methods. Out: results as JSON, CSV, Markdown and HTML.
The CLI imports it; it may import every other folder of `dcar_core`.
"""

from dcar_core.evaluation.comparison import compare, summary
from dcar_core.evaluation.tables import settings_table, table

__all__ = ["compare", "settings_table", "summary", "table"]
