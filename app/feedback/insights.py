"""What the log says about searches: the figures of the insights page.

A search counts with its first page. It was clicked if one of the events that `export` counts is a click.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.feedback.export import CLICKS, counted
from app.feedback.log import read_log

DAYS = 30
_POSITIONS = 24
_LISTED = 50  # queries
_FIRST = 10  # results of a query


def summarize(folder: Path, collection: str) -> dict[str, Any]:
    """Return the figures of a collection: days, positions, versions and queries.

    - days: oldest first: searches; those with a click; those without a result, or where nothing fits.
    - positions: how often results were shown there and clicked.
    - versions: searches and clicked ones by the number of the index's version.
    - worst: queries with less clicks than the average one, by their searches without a click. unmet: those that
      nothing fits. Both with their first results, as the last search showed them.

    Raises:
        DcarError: a file cannot be read.
    """
    days, versions, texts = (defaultdict[Any, Counter[str]](Counter) for _ in range(3))
    shown, clicks, items = Counter[int](), Counter[int](), dict[str, list[str]]()
    for query, events in read_log(folder, time.time() - DAYS * 86_400):
        if query is None or query.collection != collection:
            continue
        own, seen = counted(query, events)
        clicked = {event.item for event in own if event.action in CLICKS}
        for position, item in enumerate(query.hits, query.offset + 1):
            if item in seen:
                shown[position] += 1
                clicks[position] += item in clicked
        if query.offset:
            continue
        day, text = time.strftime("%Y-%m-%d", time.gmtime(query.time / 1000)), query.text.lower()
        tables = [days[day], versions[query.version]]
        if text:
            tables.append(texts[text])
            items[text] = [*query.hits[:_FIRST]]
        for table in tables:
            table.update(searches=1, clicked=bool(clicked), nothing=query.nothing_fits or not query.hits)
    last = max((position for position in shown if position <= _POSITIONS), default=0)
    total = sum(texts.values(), Counter())
    rate = total["clicked"] / max(1, total["searches"])

    def listed(value: Callable[[Counter[str]], float]) -> list[dict[str, Any]]:
        top = sorted((text for text in texts if value(texts[text]) > 0), key=lambda text: -value(texts[text]))
        return [{"query": text, **texts[text], "items": items[text]} for text in top[:_LISTED]]

    def missed(counts: Counter[str]) -> float:
        return counts["searches"] - counts["clicked"] if counts["clicked"] <= rate * counts["searches"] else 0

    ranks = range(1, last + 1)
    return {
        "days": [{"day": day, **counts} for day, counts in sorted(days.items())],
        "positions": [{"position": rank, "shown": shown[rank], "clicked": clicks[rank]} for rank in ranks],
        "versions": versions,
        "worst": listed(missed),
        "unmet": listed(lambda counts: counts["nothing"]),
    }
