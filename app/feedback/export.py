"""From the log to training pairs and judged lists: `dcar feedback export`.

- Evidence is counted by clients: however often one of them clicks, it has one vote on a pair, a bounded number of
  searches counts for it, and of the events on a search only those of its first client.
- The relevance of a pair is its clicks by what was looked at: the propensities of its positions (see `click_model`),
  and PRIOR to begin with. Of the clicks, those count that are certain: the lower end of a 95 % interval, with the
  variance of a square root of a count (Anscombe, 1948). So many clients outweigh a few hostile ones [ours].
- An image that was skipped above a clicked one is a hard negative of the query, if enough clients skipped it and hardly
  any clicked it. An image below the last click may not have been seen, and says nothing.
- Everything that is left out is counted with its reason.
"""

import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from app.feedback.click_model import estimate
from app.feedback.store import EventRow, QueryRow, read_log
from dcar_core.images import index_tar
from dcar_core.util.errors import DcarError
from dcar_core.util.files import csv_text, write_bytes, write_json, write_json_lines
from index_jobs.index.index_version import IndexVersion

MAX_WEIGHT = 10.0  # of a click, by the inverse of its position's propensity
PRIOR = 5.0  # looks without a click that each pair starts with
CLICKS = ("click", "save", "purchase")
CLIENT_ITEM_CAP = 3  # texts for which a client's clicks on one item count
_CERTAIN = 1.64 / 2  # of the square root of a count of clicks: 1.64 standard deviations
_FIT = 2 / 3  # of the relevance of the best image of a query, for a training pair
_SKIPPED = 0.1  # of it, up to which a skipped image is a hard negative
_MAX_NEGATIVES = 16  # texts of an image
_KINDS = {
    "other": "searches without words, or with more than words",
    "hash": "searches whose text is stored as a hash (DCAR_FEEDBACK_TEXTS)",
}

# What clients saw: a row for each result of a search, sorted by search. search, text, image, client: codes. position:
# the rank in the response, from 1. version: of the index. learns: whether the text may be learned. acts: whether the
# search has events.
_COLUMNS = ("search", "text", "image", "client", "position", "clicked", "version", "learns", "acts")
IMPRESSION = np.dtype([(name, np.int64) for name in _COLUMNS])
# What is known of each pair of a text and an image. relevance: chance of a click by a client who looks at it, at least.
# estimate: the chance without this caution. clicks, skips: numbers of distinct clients. share: of the relevance of the
# text's best image. is_wrong: hardly ever clicked, in comparison.
EVIDENCE = np.dtype(
    [("text", "i8"), ("image", "i8"), ("relevance", "f8"), ("estimate", "f8"), ("clicks", "i8"), ("skips", "i8"),
     ("share", "f8"), ("is_wrong", "?")]
)  # fmt: skip
Impressions: TypeAlias = "np.recarray[Any, Any]"
Evidence: TypeAlias = Impressions


@dataclass(frozen=True)
class Options:
    """What counts. judges: clients whose judgements need no second opinion."""

    min_clients: int = 2
    client_cap: int = 100
    item_cap: int = 100
    judges: frozenset[str] = frozenset()


@dataclass
class Report:
    """What was exported, and what was left out.

    images: the `--images` that `dcar train` needs, if any. without_image: rows whose image is no local file.
    """

    searches: int = 0
    events: int = 0
    clients: int = 0
    pairs: int = 0
    negatives: int = 0
    judged: int = 0
    propensities: list[float] = field(default_factory=list)
    pairs_at_several_positions: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    images: str | None = None
    without_image: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"log: {self.searches:,} searches, {self.events:,} events, {self.clients:,} clients",
            f"pairs: {self.pairs:,}, with {self.negatives:,} hard negatives; judged: {self.judged:,}",
        ]
        if several := self.pairs_at_several_positions:
            chances = " ".join(f"{each:.2f}" for each in self.propensities[:20])
            lines.append(f"propensities of positions, from {several:,} pairs seen at several: {chances}")
        else:
            lines.append("no position bias was corrected: too few items were seen at several positions")
        if self.without_image:
            rest = "have no local image; they are for `dcar retrain`, not `dcar train`"
            lines.append(f"{self.without_image:,} rows {rest}")
        return "\n".join(lines + [f"left out: {number:,} {reason}" for reason, number in self.left_out.most_common()])


@dataclass(frozen=True)
class _Log:
    """What the log holds of a collection. texts, items: by their codes. ratings: of texts and items, by client."""

    texts: list[str]
    items: list[str]
    seen: Impressions
    ratings: dict[tuple[int, int], dict[str, int]]


def export(folder: Path, artifact: IndexVersion, collection: str, out: Path, options: Options) -> Report:
    """Write pairs.jsonl, judgements.csv and report.json.

    Raises:
        DcarError: the log cannot be read, has no search of the collection, or `out` holds pairs already.
    """
    for name in ("pairs.jsonl", "judgements.csv"):
        if (out / name).exists():
            raise DcarError(f"{out} already holds {name}; give --out a new directory")
    report = Report(options=asdict(options) | {"judges": sorted(options.judges), "collection": collection})
    log = _read(folder, collection, options, report)
    if not report.searches:
        raise DcarError(f"{folder} has no search of the collection {collection!r}; name another by --collection")
    examined, report.pairs_at_several_positions = estimate_propensities(log.seen)
    report.propensities = examined.round(4).tolist()
    evidence = weigh(log.seen[log.seen.learns > 0], examined, options.min_clients)
    pairs, judged = _pairs(evidence, log, artifact, options, report), _judged(evidence, log, options, report)
    out.mkdir(parents=True, exist_ok=True)
    _write_judged(out, judged)
    write_json_lines(out / "pairs.jsonl", pairs)
    report.judged, report.left_out = len(judged), +report.left_out  # without zeros
    write_json(out / "report.json", vars(report))
    return report


def counted(query: QueryRow, events: Iterable[EventRow]) -> tuple[list[EventRow], set[str]]:
    """Return the events for shown items of the first client of a search, and the items that it saw.

    Impression events say what was seen; without any, all results were.
    """
    shown = [event for event in events if event.item in query.hits]
    own = [event for event in shown if event.client == shown[0].client]
    seen = {event.item for event in own if event.action in (*CLICKS, "impression")}
    return own, seen if any(event.action == "impression" for event in own) else {*query.hits}


def _read(folder: Path, collection: str, options: Options, report: Report) -> _Log:
    """Return what counts of a log. In one with impressions, searches without events do not."""
    texts, items, clients = (defaultdict[Any, int](count().__next__) for _ in range(3))  # codes
    ratings, searches = defaultdict[tuple[int, int], dict[str, int]](dict), Counter[str]()
    clicked_for = defaultdict[tuple[int, int], set[int]](set)  # texts, by client and item
    rows, has_impressions, left_out = array("q"), False, report.left_out
    for query, events in read_log(folder):
        if query is None or query.collection != collection:
            left_out["events for searches that are not in the log, or are of another collection"] += len(events)
            continue
        number, text, learns = report.searches, texts[query.text.lower()], query.kind == "text"
        own, seen = counted(query, events)
        shown = sum(event.item in query.hits for event in events)
        left_out["events for items that were not shown"] += len(events) - shown
        left_out["events of a second client on one search"] += shown - len(own)
        if not learns:
            left_out[_KINDS[query.kind]] += 1
        report.searches, report.events = number + 1, report.events + len(events)
        has_impressions |= any(event.action == "impression" for event in own)
        for event in own if learns else ():
            if event.rating is not None:  # the last one counts
                ratings[text, items[event.item]][event.client] = event.rating
        client = clients[own[0].client if own else number]
        if own:
            searches[own[0].client] += 1
            if searches[own[0].client] > options.client_cap:
                left_out[f"searches of a client beyond its first {options.client_cap:,}"] += 1
                continue
        clicked = {event.item for event in own if event.action in CLICKS}
        for position, item in enumerate(query.hits, query.offset + 1):
            if item not in seen:
                continue
            is_clicked = item in clicked
            if is_clicked:
                known = clicked_for[client, items[item]]
                if text not in known and len(known) >= CLIENT_ITEM_CAP:
                    left_out[f"clicks of a client on an item beyond its first {CLIENT_ITEM_CAP} texts"] += 1
                    continue
                known.add(text)
            rows.extend((number, text, items[item], client, position, is_clicked, query.version, learns, bool(own)))
    report.clients = len(searches)
    found: Impressions = np.array(rows).view(IMPRESSION).view(np.recarray)
    return _Log([*texts], [*items], found[found.acts > 0] if has_impressions else found, ratings)


def estimate_propensities(seen: Impressions) -> tuple[np.ndarray, int]:
    """Estimate from the pairs of each version of the index; across versions only if none stood at several positions.

    A new version moves up what was clicked by chance, so that across versions, lower positions look better.
    """
    pair = _pair(seen)
    within = estimate(pair * (int(seen.version.max(initial=0)) + 1) + seen.version, seen.position, seen.clicked)
    return within if within[1] else estimate(pair, seen.position, seen.clicked)


def _pair(seen: Impressions) -> np.ndarray:
    codes: np.ndarray = seen.text * (int(seen.image.max(initial=0)) + 1) + seen.image
    return codes


def weigh(seen: Impressions, examined: np.ndarray, min_clients: int) -> Evidence:
    """Return the evidence of each pair. Two clicks far down the page do not outweigh many near its top."""
    looked, is_clicked = np.maximum(examined[seen.position - 1], 1 / MAX_WEIGHT), seen.clicked > 0
    _, first, pair = np.unique(_pair(seen), return_index=True, return_inverse=True)
    width = int(seen.client.max(initial=0)) + 1
    keys, vote = np.unique(pair * width + seen.client, return_inverse=True)
    clicked, views = (np.bincount(vote, each) / np.bincount(vote) for each in (is_clicked, looked))  # of a client
    voter = keys // width
    found, looks = np.bincount(voter, clicked), PRIOR + np.bincount(voter, views)
    certain = np.maximum(np.sqrt(found) - _CERTAIN, 0) ** 2
    lowest = np.full(int(seen.search.max(initial=-1)) + 1, -1)
    np.maximum.at(lowest, seen.search[is_clicked], seen.position[is_clicked])
    is_skipped = ~is_clicked & (seen.position < lowest[seen.search])
    clicks, skips = (
        np.bincount(voter[np.unique(vote[each])], minlength=len(first)) for each in (is_clicked, is_skipped)
    )
    relevance, estimated = (np.minimum(1, each / looks) for each in (certain, found))
    text, enough = seen.text[first], clicks >= min_clients
    best = np.zeros(int(text.max(initial=-1)) + 1)
    np.maximum.at(best, text[enough], relevance[enough])
    best = best[text]
    share, is_wrong = relevance / np.maximum(best, 1e-9), (estimated <= _SKIPPED * best) & (best > 0)
    columns = [text, seen.image[first], relevance, estimated, clicks, skips, share, is_wrong]
    evidence: Evidence = np.rec.fromarrays(columns, dtype=EVIDENCE)
    return evidence


def _pairs(
    evidence: Evidence, log: _Log, artifact: IndexVersion, options: Options, report: Report
) -> list[dict[str, Any]]:
    """Return the training pairs as rows of an annotation file, most relevant first."""
    clicks, skips, few = evidence.clicks, evidence.skips, f"fewer than {options.min_clients} clients"
    enough, fits = clicks >= options.min_clients, (clicks >= options.min_clients) & (evidence.share >= _FIT)
    for reason, mask in (
        (f"clicked pairs with {few}", (clicks > 0) & ~enough),
        ("clicked pairs of less than two thirds of the relevance of their query's best", enough & ~fits),
        (f"images skipped by {few}", (skips > 0) & (skips < options.min_clients) & (clicks == 0)),
    ):
        report.left_out[reason] += int(mask.sum())
    row_of = cache(lambda item: _row(artifact, log.items[item], report))
    wrong, rows, counts = defaultdict[int, list[str]](list), list[dict[str, Any]](), Counter[int]()
    for each in evidence[(skips >= options.min_clients) & evidence.is_wrong]:
        if row_of(each.image) and len(wrong[each.image]) < _MAX_NEGATIVES:
            wrong[each.image].append(log.texts[each.text])
    order = np.argsort(-evidence.relevance, kind="stable")
    for each in evidence[order[fits[order]]]:
        counts[each.image] += 1
        if counts[each.image] > options.item_cap:
            report.left_out[f"pairs of an item beyond its best {options.item_cap:,}"] += 1
        elif not (row := row_of(each.image)):
            report.left_out["pairs of items that are no longer in the index"] += 1
        else:
            relevance = round(max(float(each.relevance), 1e-6), 6)
            more = {"negatives": wrong[each.image]} if each.image in wrong else {}
            rows.append({**row, "caption": log.texts[each.text], "relevance": relevance, **more})
    report.pairs, used = len(rows), {row["id"] for row in rows}
    report.negatives = sum(map(len, wrong.values()))
    for item, texts in wrong.items():
        if (row := row_of(item))["id"] in used:
            continue
        if row["caption"]:
            rows.append({**row, "negatives": texts})
        else:
            report.left_out["hard negatives of images without a caption"] += len(texts)
            report.negatives -= len(texts)
    report.without_image = sum("image" not in row for row in rows)
    return rows


def _row(artifact: IndexVersion, item: str, report: Report) -> dict[str, Any]:
    """Return an item as a row of an annotation file, with its image if that is a local file; {} if it is gone."""
    if (place := artifact.row_of(item)) is None:
        return {}
    found, (location, offset) = artifact.item(place), artifact.image_location(place)
    row = {"id": found.id, "caption": found.caption, "category": found.category}
    if not os.path.isabs(location):  # noqa: PTH117  a URL
        return row
    if offset >= 0:
        tar = Path(location)
        report.images, location = str(tar.parent), f"{tar.name}/{_members(tar)[offset]}"
    return {**row, "image": location}


@cache
def _members(tar: Path) -> dict[int, str]:
    return {span.offset: name for name, span in index_tar(tar).items()}


def _judged(evidence: Evidence, log: _Log, options: Options, report: Report) -> list[tuple[str, str, int, str, int]]:
    """Return (text, item id, grade 0 to 3, source, clients). Judgements by hand come before clicks."""
    clients = evidence.clicks + evidence.skips
    grades = np.where(evidence.clicks >= options.min_clients, np.ceil(3 * np.minimum(evidence.share, 1)), 0)
    counts = (clients >= options.min_clients) & ((grades > 0) | evidence.is_wrong)
    columns = (each[counts].astype(int).tolist() for each in (evidence.text, evidence.image, grades, clients))
    found = {(text, item): (grade, "clicks", number) for text, item, grade, number in zip(*columns, strict=True)}
    for key, by_client in log.ratings.items():
        trusted = [rating for client, rating in by_client.items() if client in options.judges]
        if trusted or len(by_client) >= options.min_clients:
            found[key] = int(np.median(trusted or [*by_client.values()])), "judge", len(trusted or by_client)
        else:
            report.left_out[f"pairs judged by fewer than {options.min_clients} clients"] += 1
    return [(log.texts[text], log.items[item], *rest) for (text, item), rest in sorted(found.items())]


def _write_judged(out: Path, judged: list[tuple[str, str, int, str, int]]) -> None:
    numbers = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(each[0] for each in judged), 1)}
    header = ("query_id", "query", "item_id", "grade", "source", "clients")
    content = csv_text(header, *((numbers[row[0]], *row) for row in judged))
    write_bytes(out / "judgements.csv", content.encode())
