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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.feedback.click_model import Cells, Propensities, estimate
from app.feedback.store import EventRow, QueryRow, read_log
from dcar_core.data.judgements import trec_id
from dcar_core.images import index_tar
from dcar_core.util.errors import DcarError
from dcar_core.util.files import csv_text, write_bytes, write_json, write_json_lines
from index_jobs.index.index_version import IndexVersion

MAX_WEIGHT = 10.0  # of a click, by the inverse of its position's propensity
PRIOR = 5.0  # looks without a click that each pair starts with
_CERTAIN = 1.64 / 2  # of the square root of a count of clicks: 1.64 standard deviations
CLICKS = ("click", "save", "purchase")
_FIT = 2 / 3  # of the relevance of the best image of a query, for a training pair
_SKIPPED = 0.1  # of it, up to which a skipped image is a hard negative
_MAX_NEGATIVES = 16  # texts of an image


@dataclass(frozen=True)
class Options:
    """What counts.

    judges: clients whose judgements need no second opinion. client_item_cap: texts for which a client's clicks on one
    item count.
    """

    min_clients: int = 2
    client_cap: int = 100
    item_cap: int = 100
    judges: frozenset[str] = frozenset()
    client_item_cap: int = 3


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
    method: str = "position-based click model, from pairs seen at several positions"
    propensities: list[float] = field(default_factory=list)
    pairs_at_several_positions: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    images: str | None = None
    without_image: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def leave_out(self, reason: str, mask: np.ndarray) -> None:
        self.left_out[reason] += int(mask.sum())

    def __str__(self) -> str:
        lines = [
            f"log: {self.searches:,} searches, {self.events:,} events, {self.clients:,} clients",
            f"pairs: {self.pairs:,}, with {self.negatives:,} hard negatives; judged: {self.judged:,}",
            f"propensities of positions 1 to {len(self.propensities)}: "
            + (" ".join(f"{each:.2f}" for each in self.propensities[:20]) or "none"),
            f"  {self.method}: {self.pairs_at_several_positions:,}",
        ]
        if not self.pairs_at_several_positions:
            lines.append("  no position bias was corrected: too few items were seen at several positions")
        if self.without_image:
            lines.append(
                f"{self.without_image:,} rows have no local image; they are for `dcar retrain`, not `dcar train`"
            )
        lines += [f"left out: {count:,} {reason}" for reason, count in self.left_out.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Impressions:
    """What clients saw, one entry for a result of a search. All arrays are (N,) and sorted by search.

    search, text, item, client: codes. position: the rank in the response, from 1. clicked: bool. version: of the index.
    """

    search: np.ndarray
    text: np.ndarray
    item: np.ndarray
    client: np.ndarray
    position: np.ndarray
    clicked: np.ndarray
    version: np.ndarray

    @property
    def pair(self) -> np.ndarray:
        codes: np.ndarray = self.text * (int(self.item.max(initial=0)) + 1) + self.item
        return codes

    def __getitem__(self, chosen: np.ndarray) -> "Impressions":
        return Impressions(*(values[chosen] for values in vars(self).values()))


@dataclass(frozen=True)
class Evidence:
    """What is known of each pair of a text and an item. All arrays are (P,).

    relevance: chance of a click by a client who looks at it, at least. estimate: the chance without this caution.
    clicks, skips: numbers of distinct clients.
    """

    text: np.ndarray
    item: np.ndarray
    relevance: np.ndarray
    estimate: np.ndarray
    clicks: np.ndarray
    skips: np.ndarray


def export(folder: Path, artifact: IndexVersion, collection: str, out: Path, options: Options) -> Report:
    """Write pairs.jsonl, judgements.csv, qrels.txt, queries.tsv and report.json.

    Raises:
        DcarError: the log cannot be read, has no search of the collection, or `out` holds pairs already.
    """
    for name in ("pairs.jsonl", "judgements.csv"):
        if (out / name).exists():
            raise DcarError(f"{out} already holds {name}; give --out a new directory")
    report = Report(options=asdict(options) | {"judges": sorted(options.judges), "collection": collection})
    log = _Log(folder, collection, options, report)
    if not report.searches:
        raise DcarError(f"{folder} has no search of the collection {collection!r}; name another by --collection")
    propensities = estimate_propensities(log.seen)
    report.propensities = [round(float(each), 4) for each in propensities.examined]
    report.pairs_at_several_positions = propensities.pairs
    evidence = weigh(log.seen[np.isin(log.seen.search, log.usable)], propensities)
    images = _Images(artifact, log.items)
    pairs, negatives = _pairs(evidence, images, options, report)
    judged = _judged(evidence, log, options, report)
    report.pairs, report.negatives, report.judged = len(pairs), sum(map(len, negatives.values())), len(judged)
    out.mkdir(parents=True, exist_ok=True)
    _write_judged(out, judged)
    _write_pairs(out / "pairs.jsonl", pairs, negatives, log, images, report)
    report.images = images.root
    report.left_out = +report.left_out  # without zeros
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


class _Log:
    """What the log holds of a collection.

    texts, items: their codes. usable: searches whose text may be learned. ratings: of texts and items, by client.
    seen: what counts as seen. In a log with impressions, searches without events do not count.
    """

    def __init__(self, folder: Path, collection: str, options: Options, report: Report) -> None:
        self.texts, self.items, self.usable = dict[str, int](), dict[str, int](), list[int]()
        self.ratings = defaultdict[tuple[int, int], dict[str, int]](dict)
        clients, searches, has_impressions = dict[str | int, int](), Counter[str](), False
        clicked_for = defaultdict[tuple[int, int], set[int]](set)  # texts, by client and item
        columns, has_events, left_out = [array("q") for _ in fields(Impressions)], list[bool](), report.left_out
        beyond = f"clicks of a client on an item beyond its first {options.client_item_cap:,} texts"
        for query, events in read_log(folder):
            if query is None or query.collection != collection:
                left_out["events for searches that are not in the log, or are of another collection"] += len(events)
                continue
            number, text = report.searches, self.texts.setdefault(query.text.lower(), len(self.texts))
            own, seen = counted(query, events)
            shown = sum(event.item in query.hits for event in events)
            left_out["events for items that were not shown"] += len(events) - shown
            left_out["events of a second client on one search"] += shown - len(own)
            report.searches, report.events = number + 1, report.events + len(events)
            has_impressions |= any(event.action == "impression" for event in own)
            has_events.append(bool(own))
            if query.kind != "text":
                left_out["searches without words, or with more than words"] += 1
            elif query.is_hashed:
                left_out["searches whose text is stored as a hash (DCAR_FEEDBACK_TEXTS)"] += 1
            else:
                self.usable.append(number)
                for event in own:
                    if event.rating is not None:  # the last one counts
                        self.ratings[text, self._code(event.item)][event.client] = event.rating
            client = clients.setdefault(own[0].client if own else number, len(clients))
            if own:
                searches[own[0].client] += 1
                if searches[own[0].client] > options.client_cap:
                    left_out[f"searches of a client beyond its first {options.client_cap:,}"] += 1
                    continue
            clicked = {event.item for event in own if event.action in CLICKS}
            for position, item in enumerate(query.hits, query.offset + 1):
                if item not in seen:
                    continue
                code = self._code(item)
                if item in clicked:
                    texts = clicked_for[client, code]
                    if text not in texts and len(texts) >= options.client_item_cap:
                        left_out[beyond] += 1
                        continue
                    texts.add(text)
                row = number, text, code, client, position, item in clicked, query.version
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
        report.clients = len(searches)
        found = Impressions(*map(np.array, columns))
        found = replace(found, clicked=found.clicked.astype(bool))
        self.seen = found[np.array(has_events)[found.search]] if has_impressions else found

    def _code(self, item: str) -> int:
        return self.items.setdefault(item, len(self.items))


def estimate_propensities(seen: Impressions) -> Propensities:
    """Estimate from the pairs of each version of the index; across versions only if none stood at several positions.

    A new version moves up what was clicked by chance, so that across versions, lower positions look better.
    """
    within = _estimate(seen.pair * (int(seen.version.max(initial=0)) + 1) + seen.version, seen)
    return within if within.pairs else _estimate(seen.pair, seen)


def _estimate(pairs: np.ndarray, seen: Impressions) -> Propensities:
    _, pair = np.unique(pairs, return_inverse=True)
    width = int(seen.position.max(initial=0)) + 1
    keys, cell = np.unique(pair * width + seen.position, return_inverse=True)
    shown, clicked = np.bincount(cell, minlength=len(keys)), np.bincount(cell, seen.clicked, len(keys))
    return estimate(Cells(keys // width, keys % width, shown, clicked))


def weigh(seen: Impressions, propensities: Propensities) -> Evidence:
    """Return the evidence of each pair. Two clicks far down the page do not outweigh many near its top."""
    looked = np.maximum(propensities.at(seen.position), 1 / MAX_WEIGHT)
    _, first, pair = np.unique(seen.pair, return_index=True, return_inverse=True)
    width = int(seen.client.max(initial=0)) + 1
    keys, vote = np.unique(pair * width + seen.client, return_inverse=True)
    clicked, examined = (np.bincount(vote, each) / np.bincount(vote) for each in (seen.clicked, looked))  # of a client
    voter = keys // width
    found, looks = np.bincount(voter, clicked), PRIOR + np.bincount(voter, examined)
    certain = np.maximum(np.sqrt(found) - _CERTAIN, 0) ** 2
    relevance, estimate = (np.minimum(1, each / looks) for each in (certain, found))
    lowest = np.full(int(seen.search.max(initial=-1)) + 1, -1)
    np.maximum.at(lowest, seen.search[seen.clicked], seen.position[seen.clicked])
    skipped = ~seen.clicked & (seen.position < lowest[seen.search])
    skips = np.bincount(keys[np.unique(vote[skipped])] // width, minlength=len(first))
    clicks = np.bincount(keys[np.unique(vote[seen.clicked])] // width, minlength=len(first))
    return Evidence(seen.text[first], seen.item[first], relevance, estimate, clicks, skips)


def _shares(evidence: Evidence, min_clients: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what each pair has of the relevance of its text's best item, and whether it was hardly ever clicked."""
    enough = evidence.clicks >= min_clients
    best = np.zeros(int(evidence.text.max(initial=-1)) + 1)
    np.maximum.at(best, evidence.text[enough], evidence.relevance[enough])
    best = best[evidence.text]
    return evidence.relevance / np.maximum(best, 1e-9), (evidence.estimate <= _SKIPPED * best) & (best > 0)


def _pairs(
    evidence: Evidence, images: "_Images", options: Options, report: Report
) -> tuple[list[tuple[int, int, float]], dict[int, list[int]]]:
    """Return the training pairs (item, text, relevance), and the texts that are wrong for an item."""
    share, is_hardly_clicked = _shares(evidence, options.min_clients)
    clicks, skips, enough = evidence.clicks, evidence.skips, evidence.clicks >= options.min_clients
    report.leave_out(f"clicked pairs with fewer than {options.min_clients} clients", (clicks > 0) & ~enough)
    fits = enough & (share >= _FIT)
    weak = "clicked pairs of less than two thirds of the relevance of their query's best"
    report.leave_out(weak, enough & ~fits)
    pairs, of_item, order = (
        list[tuple[int, int, float]](),
        Counter[int](),
        np.argsort(-evidence.relevance, kind="stable"),
    )
    for place in order[fits[order]]:
        item, relevance = int(evidence.item[place]), max(float(evidence.relevance[place]), 1e-6)
        of_item[item] += 1
        if of_item[item] > options.item_cap:
            report.left_out[f"pairs of an item beyond its best {options.item_cap:,}"] += 1
        elif not images.is_known[item]:
            report.left_out["pairs of items that are no longer in the index"] += 1
        else:
            pairs.append((item, int(evidence.text[place]), round(relevance, 6)))
    few = (skips > 0) & (skips < options.min_clients) & (clicks == 0)
    report.leave_out(f"images skipped by fewer than {options.min_clients} clients", few)
    negatives = dict[int, list[int]]()
    is_wrong = (skips >= options.min_clients) & is_hardly_clicked & images.is_known[evidence.item]
    for item, text in zip(evidence.item[is_wrong].tolist(), evidence.text[is_wrong].tolist(), strict=True):
        texts = negatives.setdefault(item, [])
        if len(texts) < _MAX_NEGATIVES:
            texts.append(text)
    return pairs, negatives


def _judged(evidence: Evidence, log: _Log, options: Options, report: Report) -> list[tuple[str, str, int, str, int]]:
    """Return (text, item id, grade 0 to 3, source, clients). Judgements by hand come before clicks."""
    share, is_hardly_clicked = _shares(evidence, options.min_clients)
    clients = evidence.clicks + evidence.skips
    grades = np.where(evidence.clicks >= options.min_clients, np.ceil(3 * np.minimum(share, 1)), 0)
    counted = (clients >= options.min_clients) & ((grades > 0) | is_hardly_clicked)
    columns = (each[counted].astype(int).tolist() for each in (evidence.text, evidence.item, grades, clients))
    found = {(text, item): (grade, "clicks", count) for text, item, grade, count in zip(*columns, strict=True)}
    for key, by_client in log.ratings.items():
        trusted = [rating for client, rating in by_client.items() if client in options.judges]
        if not trusted and len(by_client) < options.min_clients:
            report.left_out[f"pairs judged by fewer than {options.min_clients} clients"] += 1
            continue
        found[key] = int(np.median(trusted or [*by_client.values()])), "judge", len(trusted or by_client)
    texts, items = [*log.texts], [*log.items]
    return [(texts[text], items[item], *rest) for (text, item), rest in sorted(found.items())]


class _Images:
    """The images of items, as `dcar train` finds them.

    is_known: bool for each item: it is in the index.
    root: the folder that holds the tars; None if every image is a file of its own.
    """

    def __init__(self, artifact: IndexVersion, items: Iterable[str]) -> None:
        self._artifact = artifact
        self.root: str | None = None
        self._members = dict[str, dict[int, str]]()
        self._rows = [artifact.row_of(item) for item in items]
        self.is_known = np.array([row is not None for row in self._rows], bool)

    def row(self, item: int) -> dict[str, Any]:
        """Return the columns of an item in an annotation file: its own caption, and its image if it is a local file."""
        row = self._rows[item]
        assert row is not None
        location, offset = self._artifact.image_location(row)
        found = self._artifact.item(row)
        texts = {"caption": found.caption, "category": found.category}
        if not os.path.isabs(location):  # noqa: PTH117  a URL
            return {"id": found.id, **texts}
        if offset >= 0:
            if location not in self._members:
                spans = index_tar(Path(location))
                self._members[location] = {span.offset: name for name, span in spans.items()}
            tar = Path(location)
            self.root, location = str(tar.parent), f"{tar.name}/{self._members[location][offset]}"
        return {"id": found.id, "image": location, **texts}


def _write_pairs(
    path: Path,
    pairs: Sequence[tuple[int, int, float]],
    negatives: dict[int, list[int]],
    log: _Log,
    images: _Images,
    report: Report,
) -> None:
    texts, rows = [*log.texts], list[dict[str, Any]]()
    wrong = {item: [texts[text] for text in found] for item, found in negatives.items()}
    for item, text, relevance in pairs:
        more = {"negatives": wrong[item]} if item in wrong else {}
        rows.append({**images.row(item), "caption": texts[text], "relevance": relevance, **more})
    for item in wrong.keys() - {item for item, *_ in pairs}:
        row = images.row(item)
        if row["caption"]:
            rows.append({**row, "negatives": wrong[item]})
        else:
            report.left_out["hard negatives of images without a caption"] += len(wrong[item])
            report.negatives -= len(wrong[item])
    report.without_image = sum("image" not in row for row in rows)
    write_json_lines(path, rows)


def _write_judged(out: Path, judged: Sequence[tuple[str, str, int, str, int]]) -> None:
    numbers = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(each[0] for each in judged), 1)}
    header = ("query_id", "query", "item_id", "grade", "source", "clients")
    for name, content in (
        ("judgements.csv", csv_text(header, *((numbers[each[0]], *each) for each in judged))),
        ("qrels.txt", "".join(f"{numbers[text]} 0 {trec_id(item)} {grade}\n" for text, item, grade, *_ in judged)),
        ("queries.tsv", "".join(f"{number}\t{text}\n" for text, number in numbers.items())),
    ):
        write_bytes(out / name, content.encode())
