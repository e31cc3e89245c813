"""From the log to training pairs and judged lists (`dcar feedback export`), and to the
figures of the insights page.

- A client has one vote on a pair, however often it clicks, and votes on a bounded
  number of searches. Of the events on a search, only those of its first client count.
- An image that was skipped above a clicked one is a hard negative of the query, if
  enough clients skipped it and hardly any clicked it. An image below the last click may
  not have been seen, and says nothing.
"""

import os
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from app.feedback.log import EventRow, QueryRow, read_log
from dcar_core.images import index_tar
from dcar_core.util.errors import DcarError
from dcar_core.util.files import csv_text, write_bytes, write_json, write_json_lines
from index_jobs.index.index_version import IndexVersion

CLICKS = ("click", "save", "purchase")
# of insights: days, positions, queries, results of a query
_DAYS = 30
_POSITIONS = 24
_LISTED = 50
_FIRST = 10
CLIENT_CAP = 100  # searches that count for a client
ITEM_CAP = 100  # texts of an item in pairs
CLIENT_ITEM_CAP = 3  # texts for which a client's clicks on one item count
_MAX_WEIGHT = 10.0  # of a click, by the inverse of its position's propensity
_PRIOR = 5.0  # looks without a click that each pair starts with
_CERTAIN = 1.64 / 2  # of the square root of a count of clicks: 1.64 standard deviations
_FIT = 2 / 3  # of the relevance of the best image of a query, for a training pair
_SKIPPED = 0.1  # of it, up to which a skipped image is a hard negative
_MAX_NEGATIVES = 16  # texts of an image
# of a position, for a propensity of its own
_MIN_CLICKS = 20
_MIN_SHOWN = 100
_ROUNDS = 2000
_TOLERANCE = 1e-6

# What clients saw: a row for each result of a search, sorted by search. search, text,
# image, client: codes. acts: whether the search has events.
_COLUMNS = (
    "search",
    "text",
    "image",
    "client",
    "position",
    "clicked",
    "version",
    "acts",
)
IMPRESSION = np.dtype([(name, np.int64) for name in _COLUMNS])
Table: TypeAlias = "np.recarray[Any, Any]"
# What is known of each pair of a text and an image. relevance: chance of a click by a
# client who looks at it, at least. estimate: the chance without this caution. clicks,
# skips: numbers of distinct clients. share: of the relevance of the text's best image.
# is_wrong: hardly ever clicked, in comparison.
_EVIDENCE = "text,image,relevance,estimate,clicks,skips,share,is_wrong"


@dataclass
class Report:
    """What was exported, and what was left out. images: the `--images` that `dcar
    train` needs, if any.
    """

    searches: int = 0
    events: int = 0
    pairs: int = 0
    negatives: int = 0
    judged: int = 0
    propensities: list[float] = field(default_factory=list)
    pairs_at_several_positions: int = 0
    images: str | None = None
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"log: {self.searches:,} searches, {self.events:,} events",
            (
                f"pairs: {self.pairs:,}, with {self.negatives:,} hard negatives;"
                f" judged: {self.judged:,}"
            ),
        ]
        if several := self.pairs_at_several_positions:
            chances = " ".join(f"{chance:.2f}" for chance in self.propensities[:20])
            lines.append(
                f"propensities of positions, from {several:,} pairs seen at several:"
                f" {chances}"
            )
        else:
            lines.append(
                "no position bias was corrected: too few items were seen at several"
                " positions"
            )
        return "\n".join(
            lines
            + [
                f"left out: {number:,} {reason}"
                for reason, number in self.left_out.most_common()
            ]
        )


@dataclass(frozen=True)
class _Log:
    """What the log holds of a collection. texts, items: by their codes. ratings: of
    texts and items, by client.
    """

    texts: list[str]
    items: list[str]
    seen: Table
    ratings: dict[tuple[int, int], dict[str, int]]


def export(
    folder: Path,
    index: IndexVersion,
    collection: str,
    out: Path,
    min_clients: int = 2,
    judges: Collection[str] = (),
) -> Report:
    """Write pairs.jsonl, judgements.csv and report.json. Raise DcarError if the log
    holds nothing of the collection.

    min_clients: that a pair needs. judges: clients whose judgements need no second
    opinion.
    """
    if (out / "pairs.jsonl").exists():
        raise DcarError(f"{out} already holds pairs.jsonl; give --out a new directory")
    report = Report()
    log = _read(folder, collection, report)
    if not report.searches:
        raise DcarError(
            f"{folder} has no search of the collection {collection!r}; name another by"
            " --collection"
        )
    examined, report.pairs_at_several_positions = estimate_propensities(log.seen)
    report.propensities = examined.round(4).tolist()
    evidence = weigh(log.seen, examined, min_clients)
    pairs = _pairs(evidence, log, index, min_clients, report)
    judged = _judged(evidence, log, min_clients, judges, report)
    out.mkdir(parents=True, exist_ok=True)
    numbers = {
        text: f"q{number}"
        for number, text in enumerate(dict.fromkeys(row[0] for row in judged), 1)
    }
    header = ("query_id", "query", "item_id", "grade", "source", "clients")
    write_bytes(
        out / "judgements.csv",
        csv_text(header, *((numbers[row[0]], *row) for row in judged)).encode(),
    )
    write_json_lines(out / "pairs.jsonl", pairs)
    # without zeros
    report.judged = len(judged)
    report.left_out = +report.left_out
    write_json(out / "report.json", vars(report))
    return report


def first_client_events(
    query: QueryRow, events: Iterable[EventRow]
) -> tuple[list[EventRow], set[str]]:
    """Return the events for shown items of the first client of a search, and the items
    that it saw.

    Impression events say what was seen; without any, all results were.
    """
    shown = [event for event in events if event.item in query.hits]
    own = [event for event in shown if event.client == shown[0].client]
    seen = {event.item for event in own if event.action in (*CLICKS, "impression")}
    return own, (
        seen if any(event.action == "impression" for event in own) else {*query.hits}
    )


def _read(folder: Path, collection: str, report: Report) -> _Log:
    """Return the searches that count: in a log with impressions, those with events."""
    # codes
    texts, items, clients = (defaultdict[Any, int](count().__next__) for _ in range(3))
    ratings = defaultdict[tuple[int, int], dict[str, int]](dict)
    searches = Counter[str]()
    # texts, by client and item
    clicked_for = defaultdict[tuple[int, int], set[int]](set)
    rows = array("q")
    has_impressions = False
    left_out = report.left_out
    for query, events in read_log(folder):
        is_of = query is not None and query.collection == collection
        own, seen = (
            first_client_events(query, events)
            if query is not None and is_of
            else ([], set())
        )
        left_out["events of other searches or clients, or for items not shown"] += len(
            events
        ) - len(own)
        if query is None or not is_of:
            continue
        number = report.searches
        report.searches = number + 1
        report.events = report.events + len(events)
        if not query.text:
            left_out[
                "searches whose text is not stored (DCAR_FEEDBACK_TEXTS), or with"
                " images or examples"
            ] += 1
            continue
        text = texts[query.text.lower()]
        client = clients[own[0].client if own else number]
        has_impressions |= any(event.action == "impression" for event in own)
        for event in own:
            if event.rating is not None:
                ratings[text, items[event.item]][event.client] = event.rating
        if own:
            searches[own[0].client] += 1
            if searches[own[0].client] > CLIENT_CAP:
                left_out[f"searches of a client beyond its first {CLIENT_CAP:,}"] += 1
                continue
        clicked = {event.item for event in own if event.action in CLICKS}
        for position, item in enumerate(query.hits, query.offset + 1):
            if item not in seen:
                continue
            if item in clicked:
                of_client = clicked_for[client, items[item]]
                if text not in of_client and len(of_client) >= CLIENT_ITEM_CAP:
                    left_out[
                        "clicks of a client on an item beyond its first"
                        f" {CLIENT_ITEM_CAP} texts"
                    ] += 1
                    continue
                of_client.add(text)
            rows.extend(
                (
                    number,
                    text,
                    items[item],
                    client,
                    position,
                    item in clicked,
                    query.version,
                    bool(own),
                )
            )
    impressions: Table = np.array(rows).view(IMPRESSION).view(np.recarray)
    return _Log(
        [*texts],
        [*items],
        impressions[impressions.acts > 0] if has_impressions else impressions,
        ratings,
    )


def estimate_propensities(seen: Table) -> tuple[np.ndarray, int]:
    """Estimate the chance that each position is looked at, as a part of that of
    position 1, by the click model

        P(click on item i for query q at position k) = examined[k] * attractive[q, i]

    of Chuklin, Markov, de Rijke, "Click Models for Web Search" (2015), sections 3.3 and
    4.3. Only items that one query showed at several positions tell the two factors
    apart [ours]; of different versions of the index only if there are no others: a new
    version moves up what was clicked by chance, so that lower positions would look
    better.

    Return the chances (P,), and the number of pairs seen at several positions; with 0,
    all chances are 1.
    """
    pair = _pair(seen)
    within = _estimate(
        pair * (int(seen.version.max(initial=0)) + 1) + seen.version,
        seen.position,
        seen.clicked,
    )
    return within if within[1] else _estimate(pair, seen.position, seen.clicked)


def _pair(seen: Table) -> np.ndarray:
    codes: np.ndarray = seen.text * (int(seen.image.max(initial=0)) + 1) + seen.image
    return codes


def _estimate(
    pair: np.ndarray,
    position: np.ndarray,
    clicked: np.ndarray,
) -> tuple[np.ndarray, int]:
    """Positions with few observations take the value of the nearest one before them
    [ours].
    """
    last = int(position.max(initial=1))
    _, pair = np.unique(pair, return_inverse=True)
    keys, cell = np.unique(pair * last + position - 1, return_inverse=True)
    shown = np.bincount(cell)
    clicked = np.bincount(cell, clicked)
    pair, position = np.divmod(keys, last)
    is_several = np.bincount(pair) > 1
    used = is_several[pair]
    clicks, views = (
        np.bincount(position[used], counts[used], last) for counts in (clicked, shown)
    )
    known = (clicks >= _MIN_CLICKS) & (views >= _MIN_SHOWN)
    used &= known[position]
    if not known[0] or known.sum() < 2:
        return np.ones(last), 0
    examined = _solve(
        last, *(values[used] for values in (pair, position, shown, clicked))
    )
    for index in np.flatnonzero(~known):
        examined[index] = examined[index - 1]
    return examined, int(is_several.sum())


def _solve(
    last: int,
    pair: np.ndarray,
    position: np.ndarray,
    shown: np.ndarray,
    clicked: np.ndarray,
) -> np.ndarray:
    """Equate the clicks at each position with those expected, where a pair's attraction
    is its clicks by what was examined. These equations are linear in the clicks, so
    they hold for pairs with few impressions, too; expectation maximization was up to
    150 % off there (`benchmarks/loop.py`) [ours].
    """
    clicks = np.bincount(position, clicked, last)
    of_pair = np.bincount(pair, clicked)
    examined = np.where(clicks > 0, 1.0, 0.0)
    for _ in range(_ROUNDS):
        before = examined
        attractive = of_pair / np.maximum(
            np.bincount(pair, shown * before[position]), 1e-9
        )
        expected = np.bincount(position, shown * attractive[pair], last)
        examined = np.minimum(
            np.divide(clicks, expected, out=np.zeros(last), where=expected > 0), 1e9
        )
        examined = examined / examined[0]
        if np.abs(examined - before).max() < _TOLERANCE:
            break
    return examined


def weigh(seen: Table, examined: np.ndarray, min_clients: int) -> Table:
    """Return the evidence of each pair.

    Its relevance is its clicks by what was looked at: the propensities of its
    positions, and _PRIOR to begin with. Of the clicks, those count that are certain:
    the lower end of a 95 % interval, with the variance of a square root of a count
    (Anscombe, 1948). So many clients outweigh a few hostile ones, and two clicks far
    down the page do not outweigh many near its top [ours].
    """
    looked = np.maximum(examined[seen.position - 1], 1 / _MAX_WEIGHT)
    is_clicked = seen.clicked > 0
    _, first, pair = np.unique(_pair(seen), return_index=True, return_inverse=True)
    width = int(seen.client.max(initial=0)) + 1
    keys, vote = np.unique(pair * width + seen.client, return_inverse=True)
    # of a client
    clicked, views = (
        np.bincount(vote, values) / np.bincount(vote) for values in (is_clicked, looked)
    )
    voter = keys // width
    total = np.bincount(voter, clicked)
    looks = _PRIOR + np.bincount(voter, views)
    certain = np.maximum(np.sqrt(total) - _CERTAIN, 0) ** 2
    lowest = np.full(int(seen.search.max(initial=-1)) + 1, -1)
    np.maximum.at(lowest, seen.search[is_clicked], seen.position[is_clicked])
    is_skipped = ~is_clicked & (seen.position < lowest[seen.search])
    clicks, skips = (
        np.bincount(voter[np.unique(vote[mask])], minlength=len(first))
        for mask in (is_clicked, is_skipped)
    )
    relevance, estimate = (np.minimum(1, count / looks) for count in (certain, total))
    text = seen.text[first]
    enough = clicks >= min_clients
    best = np.zeros(int(text.max(initial=-1)) + 1)
    np.maximum.at(best, text[enough], relevance[enough])
    best = best[text]
    share = relevance / np.maximum(best, 1e-9)
    is_wrong = (estimate <= _SKIPPED * best) & (best > 0)
    columns = [
        text,
        seen.image[first],
        relevance,
        estimate,
        clicks,
        skips,
        share,
        is_wrong,
    ]
    evidence: Table = np.rec.fromarrays(
        columns,
        formats="i8,i8,f8,f8,i8,i8,f8,?",
        names=_EVIDENCE,
    )
    return evidence


def _pairs(
    evidence: Table,
    log: _Log,
    index: IndexVersion,
    min_clients: int,
    report: Report,
) -> list[dict[str, Any]]:
    """Return the training pairs as rows of an annotation file, most relevant first."""
    clicks = evidence.clicks
    enough = evidence.clicks >= min_clients
    fits = enough & (evidence.share >= _FIT)
    report.left_out[f"clicked pairs with fewer than {min_clients} clients"] += int(
        ((clicks > 0) & ~enough).sum()
    )
    report.left_out["clicked pairs of less than two thirds of their query's best"] += (
        int((enough & ~fits).sum())
    )
    row_of = cache(lambda item: _row(index, log.items[item], report))
    wrong = defaultdict[int, list[str]](list)
    rows = list[dict[str, Any]]()
    counts = Counter[int]()
    for pair in evidence[(evidence.skips >= min_clients) & evidence.is_wrong]:
        if row_of(pair.image) and len(wrong[pair.image]) < _MAX_NEGATIVES:
            wrong[pair.image].append(log.texts[pair.text])
    order = np.argsort(-evidence.relevance, kind="stable")
    for pair in evidence[order[fits[order]]]:
        counts[pair.image] += 1
        if counts[pair.image] > ITEM_CAP:
            report.left_out[f"pairs of an item beyond its best {ITEM_CAP:,}"] += 1
        elif not (row := row_of(pair.image)):
            report.left_out["pairs of items that are no longer in the index"] += 1
        else:
            relevance = round(max(float(pair.relevance), 1e-6), 6)
            negatives = {"negatives": wrong[pair.image]} if pair.image in wrong else {}
            rows.append(
                {
                    **row,
                    "caption": log.texts[pair.text],
                    "relevance": relevance,
                    **negatives,
                }
            )
    report.pairs = len(rows)
    used = {row["id"] for row in rows}
    for item, texts in wrong.items():
        if (row := row_of(item))["id"] not in used and row["caption"]:
            rows.append({**row, "negatives": texts})
    report.negatives = sum(
        {row["id"]: len(row.get("negatives", ())) for row in rows}.values()
    )
    return rows


def _row(index: IndexVersion, item_id: str, report: Report) -> dict[str, Any]:
    """Return an item as a row of an annotation file, with its image if that is a local
    file; {} if it is gone.
    """
    if (number := index.row_of(item_id)) is None:
        return {}
    item, (location, offset) = index.item(number), index.image_location(number)
    row = {"id": item.id, "caption": item.caption, "category": item.category}
    if not os.path.isabs(location):  # noqa: PTH117  a URL
        return row
    if offset >= 0:
        tar = Path(location)
        report.images = str(tar.parent)
        location = f"{tar.name}/{_members(tar)[offset]}"
    return {**row, "image": location}


@cache
def _members(tar: Path) -> dict[int, str]:
    return {span.offset: name for name, span in index_tar(tar).items()}


def _judged(
    evidence: Table,
    log: _Log,
    min_clients: int,
    judges: Collection[str],
    report: Report,
) -> list[tuple[str, str, int, str, int]]:
    """Return (text, item id, grade 0 to 3, source, clients). Judgements by hand come
    before clicks.
    """
    clients = evidence.clicks + evidence.skips
    grades = np.where(
        evidence.clicks >= min_clients,
        np.ceil(3 * np.minimum(evidence.share, 1)),
        0,
    )
    counts = (clients >= min_clients) & ((grades > 0) | evidence.is_wrong)
    columns = (
        values[counts].astype(int).tolist()
        for values in (evidence.text, evidence.image, grades, clients)
    )
    judged = {
        (text, item): (grade, "clicks", number)
        for text, item, grade, number in zip(*columns, strict=True)
    }
    for key, by_client in log.ratings.items():
        trusted = [rating for client, rating in by_client.items() if client in judges]
        if trusted or len(by_client) >= min_clients:
            judged[key] = (
                int(np.median(trusted or [*by_client.values()])),
                "judge",
                len(trusted or by_client),
            )
        else:
            report.left_out[f"pairs judged by fewer than {min_clients} clients"] += 1
    return [
        (log.texts[text], log.items[item], *rest)
        for (text, item), rest in sorted(judged.items())
    ]


def summarize(folder: Path, collection: str) -> dict[str, Any]:
    """Return the figures of a collection in the last days. A search counts with its
    first page.

    - days: oldest first: searches; those with a click; those without a result, or where
      nothing fits.
    - positions: how often results were shown there and clicked. versions: searches by
      the index's version.
    - worst: queries with less clicks than the average one, by their searches without a
      click. unmet: those that nothing fits. Both with their first results, as the last
      search showed them.
    """
    days, versions, texts = (defaultdict[Any, Counter[str]](Counter) for _ in range(3))
    shown = Counter[int]()
    clicks = Counter[int]()
    items = dict[str, list[str]]()
    for query, events in read_log(folder, time.time() - _DAYS * 86_400):
        if query is None or query.collection != collection:
            continue
        own, seen = first_client_events(query, events)
        clicked = {event.item for event in own if event.action in CLICKS}
        for position, item in enumerate(query.hits, query.offset + 1):
            if item in seen:
                shown[position] += 1
                clicks[position] += item in clicked
        if query.offset:
            continue
        day = time.strftime("%Y-%m-%d", time.gmtime(query.time / 1000))
        text = query.text.lower()
        tables = [days[day], versions[query.version]]
        if text:
            tables.append(texts[text])
            items[text] = [*query.hits[:_FIRST]]
        for table in tables:
            table.update(
                searches=1,
                clicked=bool(clicked),
                nothing=query.nothing_fits or not query.hits,
            )
    last = max((position for position in shown if position <= _POSITIONS), default=0)
    total = sum(texts.values(), Counter())
    rate = total["clicked"] / max(1, total["searches"])

    def listed(value: Callable[[Counter[str]], float]) -> list[dict[str, Any]]:
        top = sorted(
            (text for text in texts if value(texts[text]) > 0),
            key=lambda text: -value(texts[text]),
        )
        return [
            {"query": text, **texts[text], "items": items[text]}
            for text in top[:_LISTED]
        ]

    def missed(counts: Counter[str]) -> float:
        if counts["clicked"] <= rate * counts["searches"]:
            return counts["searches"] - counts["clicked"]
        return 0

    ranks = range(1, last + 1)
    return {
        "days": [{"day": day, **counts} for day, counts in sorted(days.items())],
        "positions": [
            {"position": rank, "shown": shown[rank], "clicked": clicks[rank]}
            for rank in ranks
        ],
        "versions": versions,
        "worst": listed(missed),
        "unmet": listed(lambda counts: counts["nothing"]),
    }
