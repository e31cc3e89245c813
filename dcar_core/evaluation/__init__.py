"""Comparison of methods on one data set: trained alike, tested once, shown as tables
and a plot.

In: a data set, a model and the names of methods. Out: results as JSON, Markdown and
SVG. The CLI imports it; it may import every other folder of `dcar_core`.
"""

from dcar_core.evaluation.comparison import compare
from dcar_core.evaluation.tables import all_tables, summarise

__all__ = ["all_tables", "compare", "summarise"]
