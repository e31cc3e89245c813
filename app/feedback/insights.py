"""What the log says about searches: the figures of the insights page.

- The log is read day by day, the last one first, for at most 30 days and 20 seconds, so neither its size nor a busy day
  decides how long it takes.
- Of busier days every n-th search is read, with its events, and counts are multiplied by n.
- A search counts with its first page. It was clicked if one of the events that `export` counts is a click.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.feedback.export import CodedLog, Report, once
from app.feedback.store import EVENT_SCHEMA, list_days, read_log

_DAYS, _SECONDS = 30, 20.0
_MAX_SEARCHES = 50_000  # of a day; the arrays of a search with 24 results take about 3 kB
_MAX_TEXTS = 20_000  # of a day, those that were searched most
_POSITIONS = 24
_LISTED = 50  # queries
_FIRST = 10  # results of a query
_COUNTS = "searches", "clicked", "nothing"


def summarize(folder: Path, collection: str) -> dict[str, Any]:
    """Return the figures of a collection: days, positions, versions and queries.

    - days: oldest first: searches; those with a click; those without a result, or where nothing fits.
    - positions: how often results were shown there and clicked.
    - versions: searches and clicked ones by the number of the index's version.
    - worst: queries with less clicks than the average one, by their searches without a click. unmet: those that
      nothing fits. Both with their first results, as the last search showed them.
    - every: n, see above. is_partial: the time did not suffice for all days.

    Raises:
        DcarError: a file cannot be read.
    """
    end, found, numbers = time.monotonic() + _SECONDS, _Totals(), dict([*list_days(folder).items()][:_DAYS])
    every = 1 + max(numbers.values(), default=0) // _MAX_SEARCHES
    later, is_partial = EVENT_SCHEMA.empty_table(), False
    for day in numbers:
        if is_partial := time.monotonic() > end:
            break
        queries, events = read_log(folder, day, every)
        queries = once(queries.filter(pc.equal(queries["application"], collection))).sort_by("timestamp")
        found.add(day, queries, pa.concat_tables([events, later]))
        later = events  # a search of late evening may be clicked after midnight
    return found.summary(every) | {"every": every, "is_partial": is_partial}


class _Totals:
    """Sums over days. Each is an array of searches, clicked ones, and those that nothing fits."""

    def __init__(self) -> None:
        self.days = dict[str, np.ndarray]()
        self.versions = dict[int, np.ndarray]()
        self.shown, self.clicked = np.zeros(_POSITIONS + 1, np.int64), np.zeros(_POSITIONS + 1, np.int64)
        self.has_hashes = False
        self.texts = list[pa.Table]()

    def add(self, day: str, queries: pa.Table, events: pa.Table) -> None:
        """Add the searches of a day."""
        self.days[day] = np.zeros(len(_COUNTS), np.int64)
        if not len(queries):
            return
        log = CodedLog(queries, events, Report())
        seen = log.impressions(len(queries))
        within = seen.position <= _POSITIONS
        self.shown += np.bincount(seen.position[within], minlength=_POSITIONS + 1)
        self.clicked += np.bincount(seen.position[within & seen.clicked], minlength=_POSITIONS + 1)
        attributes, hits = queries["query_attributes"].combine_chunks(), queries["query_response_hit_ids"]
        self.has_hashes |= bool(pc.any(attributes.field("is_hashed")).as_py())
        clicked = np.isin(np.arange(len(queries)), seen.search[seen.clicked])
        nothing = np.asarray(
            pc.or_(pc.equal(pc.list_value_length(hits), 0), attributes.field("nothing_fits").fill_null(False))
        )
        is_first = np.asarray(attributes.field("offset")) == 0
        counts = np.stack([is_first, is_first & clicked, is_first & nothing], 1).astype(np.int64)
        self.days[day] += counts.sum(0)
        version = np.asarray(attributes.field("index_version"))
        for number in np.unique(version).tolist():
            self.versions[number] = self.versions.get(number, 0) + counts[version == number].sum(0)
        self._add_texts(log, counts, hits)

    def _add_texts(self, log: CodedLog, counts: np.ndarray, hits: pa.ChunkedArray) -> None:
        rows = np.flatnonzero(log.is_usable & (counts[:, 0] > 0))
        text, last = log.text[rows], np.zeros(len(log.texts), np.int64)
        last[text] = rows
        sums = [np.bincount(text, counts[rows, place], len(last)).astype(np.int64) for place in range(len(_COUNTS))]
        top = np.argsort(-sums[0], kind="stable")[:_MAX_TEXTS]
        top = top[sums[0][top] > 0]
        columns = {name: values[top] for name, values in zip(_COUNTS, sums, strict=True)}
        items = pc.list_slice(hits.take(last[top]), 0, _FIRST)
        self.texts.append(pa.table({"query": log.texts.take(pa.array(top)), **columns, "items": items}))

    def summary(self, every: int) -> dict[str, Any]:
        """Return the figures, multiplied by `every`."""

        def named(counts: np.ndarray) -> dict[str, int]:
            return dict(zip(_COUNTS, (counts * every).tolist(), strict=True))

        last = int(np.flatnonzero(self.shown).max(initial=0))
        shown, clicked = (self.shown * every).tolist(), (self.clicked * every).tolist()
        worst, unmet = self._queries(every)
        return {
            "days": [{"day": day, **named(counts)} for day, counts in sorted(self.days.items())],
            "positions": [{"position": p, "shown": shown[p], "clicked": clicked[p]} for p in range(1, last + 1)],
            "versions": {number: named(counts) for number, counts in self.versions.items()},
            "worst": worst,
            "unmet": unmet,
            "has_hashes": self.has_hashes,
        }

    def _queries(self, every: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if not self.texts:
            return [], []
        table = pa.concat_tables(self.texts)  # the last day first
        table = table.append_column("row", pa.array(np.arange(len(table))))
        sums = table.group_by("query").aggregate([*((name, "sum") for name in _COUNTS), ("row", "min")])
        searches, clicked, nothing = (sums[f"{name}_sum"].to_numpy() for name in _COUNTS)
        missed, mean = searches - clicked, clicked.sum() / max(1, searches.sum())

        def best(values: np.ndarray) -> list[dict[str, Any]]:
            top = np.argsort(-values, kind="stable")[:_LISTED]
            top = pa.array(top[values[top] > 0])
            chosen, items = sums.take(top), table["items"].take(sums["row_min"].take(top))
            columns = {name: pc.multiply(chosen[f"{name}_sum"], every) for name in _COUNTS}
            listed: list[dict[str, Any]] = pa.table({"query": chosen["query"], **columns, "items": items}).to_pylist()
            return listed

        return best(np.where(clicked <= mean * searches, missed, 0)), best(nothing)
