"""Compare the served ranking with a candidate's by the clicks of users.

- Team-draft interleaving: in each round a coin says which ranking picks first; it adds its best result that is not
  shown yet, and then the other does. Source: Radlinski, Kurup, Joachims, "How does clickthrough data reflect retrieval
  quality?" (CIKM 2008). Results that both rank equally, from the first on, belong to no team [ours].
- The coins of a client and a query are always the same: a repeated search shows the same page, and they have one vote,
  the team of their first click. So a vote never changes, and votes are independent if the rankings are equally good.
- The test may be read at any time: let the candidate win a vote with probability p. The likelihood under a mixture over
  p, Beta(10, 10), divided by that under one p is a martingale if this p is true; it ever reaches 20 with a probability
  of at most 5 %. The interval has all p where it has not. Sources: Robbins, "Statistical methods related to the law of
  the iterated logarithm" (1970); Johari, Koomen, Pekelis, Walsh, "Always valid inference" (2022).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from math import lgamma, log
from random import Random
from typing import Any, NamedTuple

from app.search.query import Match, SearchResults
from app.search.snapshots import Snapshot
from dcar_core.util.errors import DcarError
from index_jobs.store.artifact import Artifact

SERVED, CANDIDATE, NEITHER = "S", "C", "-"  # the teams of results
_PRIOR = 10.0
_LEVEL = 0.05
_CLIENT_CAP = 100  # votes
_STEPS = 40  # of a bisection
_COMPARED = 10  # results of a query
_MAX_QUERIES, _LISTED = 20_000, 10  # whose results are compared; those that differ most
_WAIT_S = 1.0  # for a candidate


class Compared(NamedTuple):
    """What the log holds of a search that was compared.

    candidate: its collection and version. draw: names the client, and the client with the query, by hashes. teams: one
    letter for each result, "" if the candidate's were not shown. shared: results that are on the first pages of both.
    hits: ids of the candidate's first results if they were not shown.
    """

    candidate: str
    draw: str
    teams: str
    shared: int
    hits: Sequence[str] | None = None


async def compare(
    search: Callable[[Snapshot], Awaitable[SearchResults]], served: Snapshot, live: Snapshot, name: str, draw: str, *,
    k: int, max_window: int, is_shadow: bool,
) -> tuple[SearchResults, Compared | None]:  # fmt: skip
    """Return the results of both versions, interleaved, or in the shadow those of the served one.

    Without the candidate's, and None, if its search fails or is a second slower.

    Args:
        name, draw: as of `Compared`.
    """

    async def find() -> list[Match] | None:
        try:
            matches, artifact = (await search(live)).matches, served.artifact
            if all(match.item.id in artifact.known for match in matches):
                return _as_served(matches, artifact)
            return await asyncio.to_thread(_as_served, matches, artifact)
        except DcarError:
            return None

    searching = asyncio.create_task(find())
    try:
        results = await search(served)
        await asyncio.wait([searching], timeout=_WAIT_S)
    finally:
        searching.cancel()
    matches = searching.result() if searching.done() else None
    if matches is None:
        return results, None
    ids, other_ids = ([match.item.id for match in each] for each in (results.matches, matches))
    shared = len({*ids} & {*other_ids})
    if is_shadow:
        return results, Compared(name, draw, "", shared, other_ids[:_COMPARED])
    shown = interleave(ids, other_ids, k, Random(f"{draw} {served.version} {name}"))
    page = [(matches if team == CANDIDATE else results.matches)[place] for team, place in shown]
    on_page = {match.item.id for match in page}
    left = [place for place, each in enumerate(ids) if each not in on_page]
    # The next page begins with the first result of the served version that is not on this one.
    following = left[0] if left and left[0] + k <= max_window else None
    results = replace(results, matches=page, next_offset=following if left else results.next_offset)
    return results, Compared(name, draw, "".join(team for team, _ in shown), shared)


def _as_served(matches: Sequence[Match], artifact: Artifact) -> list[Match]:
    """Return the matches whose items a version has, with these items."""
    rows = [artifact.row_of(match.item.id) for match in matches]
    found = [(copy(match), row) for match, row in zip(matches, rows, strict=True) if row is not None]
    for match, row in found:
        match.row, match.item = row, artifact.item(row)
    return [match for match, _ in found]


def interleave(served: Sequence[str], candidate: Sequence[str], count: int, coins: Random) -> list[tuple[str, int]]:
    """Return the team of each result to show, and its place in the ranking of the team."""
    shown, seen = list[tuple[str, int]](), set[str]()
    for place, (mine, other) in enumerate(zip(served[:count], candidate, strict=False)):
        if mine != other:
            break
        shown.append((NEITHER, place))
        seen.add(mine)
    rankings = {SERVED: served, CANDIDATE: candidate}
    rest, order = {team: iter(enumerate(ids)) for team, ids in rankings.items()}, list[str]()
    while len(shown) < count and rest:
        order = order or coins.sample([*rest], len(rest))
        team = order.pop()
        place = next((place for place, each in rest[team] if each not in seen), -1)
        if place < 0:
            del rest[team]
            order = []
            continue
        shown.append((team, place))
        seen.add(rankings[team][place])
    return shown


def interval(wins: int, losses: int) -> tuple[float, float]:
    """Return the bounds of the share of votes that the candidate wins, valid at any time; level 95 %."""
    mixture = _log_beta(_PRIOR + wins, _PRIOR + losses) - _log_beta(_PRIOR, _PRIOR)

    def is_excluded(p: float) -> bool:
        return mixture - wins * log(p) - losses * log(1 - p) >= -log(_LEVEL)

    def bound(outside: float) -> float:
        inside = (wins + 1e-9) / (wins + losses + 2e-9)
        if not is_excluded(abs(outside - 1e-12)):
            return outside
        for _ in range(_STEPS):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_excluded(middle) else (middle, outside)
        return outside

    return bound(0.0), bound(1.0)


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


@dataclass
class Tally:
    """The searches of one comparison, and the votes: the last one first."""

    searches: int = 0
    results: int = 0
    shared: int = 0
    votes: dict[str, str] = field(default_factory=dict)  # teams by draw
    pages: dict[str, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)  # of both, by query

    def add(self, shared: int, results: int) -> None:
        self.searches += 1
        self.shared, self.results = self.shared + shared, self.results + results

    def add_page(self, query: str, served: Sequence[str], candidate: Sequence[str]) -> None:
        """Add the first results of both versions, unless those of a later search are known."""
        if len(self.pages) < _MAX_QUERIES:
            self.pages.setdefault(query, (served[:_COMPARED], candidate[:_COMPARED]))

    def _differing(self) -> list[dict[str, Any]]:
        """Return the queries whose first results have least in common."""
        shares = {
            query: len({*served} & {*candidate}) / len({*served} | {*candidate})
            for query, (served, candidate) in self.pages.items()
            if {*served} != {*candidate}
        }
        return [
            {"query": query, "served": self.pages[query][0], "candidate": self.pages[query][1]}
            for query in sorted(shares, key=shares.__getitem__)[:_LISTED]
        ]

    def summary(self) -> dict[str, Any]:
        """Return the votes, the interval and the winner: "candidate", "served", or "" while there is none."""
        of_client, counts = Counter[str](), Counter[str]()
        for draw, team in reversed(self.votes.items()):
            client, _, _ = draw.partition(".")
            of_client[client] += 1
            counts[team] += of_client[client] <= _CLIENT_CAP
        low, high = interval(counts[CANDIDATE], counts[SERVED])
        return {
            "searches": self.searches,
            "differing": self._differing(),
            "overlap": self.shared / max(1, self.results),
            "wins": counts[CANDIDATE],
            "losses": counts[SERVED],
            "ties": counts[NEITHER],
            "low": low,
            "high": high,
            "winner": "candidate" if low > 0.5 else "served" if high < 0.5 else "",
        }
