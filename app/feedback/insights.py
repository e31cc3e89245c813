"""What the log says about searches: the figures of the insights page.

- Of a log with many searches every n-th one is read, with its events, and counts are multiplied by n.
- A search counts with its first page. It was clicked if one of the events that `export` counts is a click.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.feedback.export import CLICKS, counted
from app.feedback.store import count_queries, read_log

DAYS = 30
MAX_SEARCHES = 100_000
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
    - every: n, see above.

    Raises:
        DcarError: a file cannot be read.
    """
    since = time.time() - DAYS * 86_400
    every = 1 + count_queries(folder, since) // MAX_SEARCHES
    days, versions, texts = (defaultdict[Any, Counter[str]](Counter) for _ in range(3))
    shown, clicks = (Counter[int](), Counter[int]()), Counter[int]()  # shown in searches without events, and with some
    items, has_hashes, has_impressions = dict[str, list[str]](), False, False
    for query, events in read_log(folder, since, every):
        if query is None or query.collection != collection:
            continue
        own, seen = counted(query, events)
        clicked = {event.item for event in own if event.action in CLICKS}
        has_impressions |= any(event.action == "impression" for event in own)
        has_hashes |= query.kind == "hash"
        for position, item in enumerate(query.hits, query.offset + 1):
            if item in seen:
                shown[bool(own)][position] += every
                clicks[position] += every * (item in clicked)
        if query.offset:
            continue
        day, text = time.strftime("%Y-%m-%d", time.gmtime(query.time / 1000)), query.text.lower()
        tables = [days[day], versions[query.version]]
        if query.kind == "text":
            tables.append(texts[text])
            items[text] = [*query.hits[:_FIRST]]
        nothing = query.nothing_fits or not query.hits
        for table in tables:
            table.update(searches=every, clicked=every * bool(clicked), nothing=every * nothing)
    seen_at = shown[True] if has_impressions else shown[True] + shown[False]
    last = max((position for position in seen_at if position <= _POSITIONS), default=0)
    total = sum(texts.values(), Counter())
    rate = total["clicked"] / max(1, total["searches"])

    def listed(value: Callable[[Counter[str]], float]) -> list[dict[str, Any]]:
        top = sorted((text for text in texts if value(texts[text]) > 0), key=lambda text: -value(texts[text]))
        return [{"query": text, **texts[text], "items": items[text]} for text in top[:_LISTED]]

    def missed(each: Counter[str]) -> float:
        return each["searches"] - each["clicked"] if each["clicked"] <= rate * each["searches"] else 0

    places = range(1, last + 1)
    return {
        "days": [{"day": day, **counts} for day, counts in sorted(days.items())],
        "positions": [{"position": each, "shown": seen_at[each], "clicked": clicks[each]} for each in places],
        "versions": versions,
        "worst": listed(missed),
        "unmet": listed(lambda each: each["nothing"]),
        "has_hashes": has_hashes,
        "every": every,
    }
