"""Versions of an index, measured by a judged list and compared: `dcar judge`.

- A version is searched as the service searches it, and the first ten results of each
  query count.
- A result without a judgement counts as 0, the standard of the field. Such results are
  counted, and can be listed.
- The order of results decides, not their scores, so ties are as the service shows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.search import Index
from app.search.query import normalize_text
from dcar_core.data.judgements import JudgedList
from dcar_core.util.errors import DataError, shorten
from dcar_core.util.files import csv_text
from dcar_core.util.metrics import Comparison, Scores, graded_measures

DEPTH = 10


@dataclass(frozen=True)
class Run:
    """The first results of each query. results: ids of items, by the query's."""

    name: str
    judged: JudgedList
    results: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        index: Index,
        name: str,
        judged: JudgedList,
        *,
        hybrid: bool = False,
    ) -> "Run":
        """Search for every query. Raise DataError if a query has no words, or no listed
        item is in the index.
        """
        for query_id, text in judged.texts.items():
            if not normalize_text(text):
                raise DataError(
                    f"the query {query_id!r} has no words that can be searched; correct"
                    " or remove it"
                )
        listed = {item for grades in judged.grades.values() for item in grades}
        if all(index.served.index.row_of(item) is None for item in listed):
            raise DataError(
                f"no item of the list is in {name}: {shorten(sorted(listed))}; item_id"
                " is that of a result"
            )
        bodies = index.search_each([*judged.texts.values()], k=DEPTH, hybrid=hybrid)
        results = [[result["id"] for result in body["results"]] for body in bodies]
        return cls(name, judged, dict(zip(judged.texts, results, strict=True)))

    @property
    def rows(self) -> list[tuple[str, int, str, int | None]]:
        """Each result: query id, rank, item id, and its grade, None without a
        judgement.
        """
        return [
            (query_id, rank, item, self.judged.grades[query_id].get(item))
            for query_id, items in self.results.items()
            for rank, item in enumerate(items, 1)
        ]

    def measures(self) -> dict[str, np.ndarray]:
        """Return each measure of each query, in percent."""
        grades = np.zeros((len(self.results), DEPTH), np.int64)
        numbers = {key: n for n, key in enumerate(self.results)}
        for query_id, rank, _, grade in self.rows:
            grades[numbers[query_id], rank - 1] = grade or 0
        return graded_measures(
            grades,
            [np.array([*graded.values()]) for graded in self.judged.grades.values()],
        )


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare the first run with the last one."""
    measures = [run.measures() for run in runs]
    counts = np.ones((len(measures[0]), len(runs[0].judged.texts)))
    sides = [
        Scores(counts, np.stack([*part.values()]) / 100, [*part]) for part in measures
    ]
    return Comparison.of(sides[0], sides[-1])


def describe(runs: Sequence[Run], comparison: Comparison) -> str:
    """Return the measures of one run, or of two and their difference, what is not
    judged, and a closing sentence.
    """
    names = [run.name for run in runs]
    figures = [(names[0], comparison.model, "")]
    if len(runs) > 1:
        figures += (
            (names[1], comparison.baseline, ""),
            ("difference", comparison.difference, "+"),
        )
    rows = [["index", *comparison.model], ["---"] * 4]
    rows += [
        [name, *(f"{value:{sign}}" for value in estimates.values())]
        for name, estimates, sign in figures
    ]
    lines = [
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows
    ]
    for run in runs:
        unjudged = sum(grade is None for *_, grade in run.rows)
        lines.append(
            f"{run.name}: {unjudged:,} of {len(run.rows):,} results not judged, counted"
            " as 0"
        )
    if len(runs) > 1:
        both = [
            len({*own} & {*other})
            for own, other in zip(*(run.results.values() for run in runs), strict=True)
        ]
        lines.append(
            f"the first {DEPTH} results of a query have {np.mean(both):.1f} in common"
        )
    return "\n".join([*lines, _conclude(names, comparison)])


def _conclude(names: Sequence[str], compared: Comparison) -> str:
    measure = f"nDCG@{DEPTH}"
    over = f"of {measure} over {compared.queries:,} queries"
    gain = compared.difference[measure]
    if len(names) == 1:
        return f"{names[0]} has {compared.model[measure].value:.1f} points {over}."
    better, other = names if gain.value >= 0 else names[::-1]
    by = (gain if gain.value >= 0 else -gain).points(over)
    if gain.is_certain:
        return f"Take {better}: it is better than {other}, by {by}."
    return f"Neither is certainly better: {better} is above {other} by {by}."


def runs_csv(runs: Sequence[Run]) -> str:
    """Return the results of all runs with their grades."""
    cells = [
        (query_id, run.judged.texts[query_id], run.name, *rest)
        for run in runs
        for query_id, *rest in run.rows
    ]
    return csv_text(["query_id", "query", "index", "rank", "item_id", "grade"], *cells)
