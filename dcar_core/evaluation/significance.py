"""Intervals of mean R@1 on the test split, and differences to the best baseline, by the paired bootstrap over queries.

The hits of a method's seeds are averaged by query first. The recall table has the spread of seeds.
"""

from collections.abc import Mapping, Sequence

from dcar_core.evaluation.tables import Results, best_method
from dcar_core.util.bootstrap import MEASURES, Estimate, Hits, compare_hits

ABLATIONS = ("dual", "block-adapters")  # parts of dcar and dcar+ under names of their own


def add_significance(results: Results, hits: Mapping[str, Sequence[Hits]]) -> None:
    """Add to each method its `intervals` and its `difference` to the best baseline, in percent.

    Args:
        results: the content of results.json; `baseline` is set, None without baselines.
        hits: the hits of each seed, by method.
    """
    baseline = best_baseline(results)
    results["baseline"] = baseline
    means = {name: Hits.mean(runs) for name, runs in hits.items()}
    for name, method in results["methods"].items():
        comparison = compare_hits(means[name], means[baseline or name])
        method["intervals"] = _to_json(comparison.model)
        method["difference"] = None
        if baseline is not None and name != baseline:
            method["difference"] = {**_to_json(comparison.difference), "p": comparison.p}


def best_baseline(results: Results) -> str | None:
    """Return the best method on validation that is neither DCAR nor a part of it; else the best part, else None."""
    others = [name for name in results["methods"] if not name.startswith("dcar")]
    names = [name for name in others if name not in ABLATIONS] or others
    return best_method(results, names) if names else None


def _to_json(estimates: Mapping[str, Estimate]) -> dict[str, list[float]]:
    return {name: [estimates[name].value, estimates[name].low, estimates[name].high] for name in MEASURES}
